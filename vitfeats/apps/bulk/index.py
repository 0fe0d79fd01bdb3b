"""Indexes over a store, by faiss: built a shard at a time, and refused where the store is another one by now."""

import json
import math
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal, get_args
from uuid import uuid4
from zipfile import BadZipFile

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from vitfeats.apps.bulk.files import read_bytes
from vitfeats.apps.bulk.shards import Rows
from vitfeats.apps.bulk.store import Store
from vitfeats.descriptor import write_whole
from vitfeats.errors import ConfigError, MissingDependencyError, StoreError
from vitfeats.similarity import rows_at_a_time, unit

Of = Literal["images", "patches"]

FORMAT = "vitfeats.index/1"
FEW = 100_000
"""Rows up to which "auto" is "flat": one query looks at all of them in about the time of reading a hit from disk."""

_ABOUT, _INDEX, _PLACES = "index.json", "index.faiss", "places.npz"
_SAMPLE = 200_000  # rows to train on, at most
_EACH = 39  # rows to train on for each list, at least: faiss warns below
_HEAD = 256  # bytes of a shard: what safetensors begins with, and in it the digest of the shard's header


@dataclass(frozen=True, eq=False)
class Index:
    """An index in memory: opened once, it serves many searches.

    Attributes:
        store: Path of the store that it is of.
        tap: Of the vectors.
        of: Whether a row is an image or a token.
        faiss: What faiss searches.
        images: (images,) place in the store's list of each image that could be read.
        offsets: (images + 1,) first row of each image, and the end of the last.
        skipped: Rows that are not finite, and are no hits.
    """

    store: str
    tap: str
    of: Of
    faiss: Any
    images: np.ndarray
    offsets: np.ndarray
    skipped: np.ndarray

    def __repr__(self) -> str:
        """Say what it is of in one line."""
        return f"Index({self.faiss.ntotal} {self.of}, {self.tap} of '{self.store}')"


def build_index(
    store: Store,
    tap: str | None = None,
    *,
    of: Of = "images",
    kind: str = "auto",
    path: Path | str | None = None,
    seed: int = 0,
) -> Path:
    """Build an index over a store, for searches that do not read all of it.

    The store is read a shard at a time. In memory are one shard, up to 200,000 vectors to train on, and then the index,
    for a moment twice where it grows.

    Args:
        store: All shards of it must be there.
        tap: Of the store; None is its first.
        of: "images", a row each, for :func:`~vitfeats.apps.bulk.search.search_images`; or "patches", a row a token,
            for :func:`~vitfeats.apps.bulk.search.search_patches`.
        kind: "flat" compares with every row, in float32: exact, 4 · dim bytes a row. "ivf" has 4 · √rows lists, looks
            into some of them, and keeps rows in float16: 2 · dim bytes a row. "auto" is "flat" up to 100,000 rows and
            "ivf" beyond. Any other text is a description for ``faiss.index_factory``: with ``"OPQ48,IVF4096,PQ48"``
            a row has 48 bytes, where memory is short.
        path: A folder, made or replaced; None is one in the store.
        seed: Of the sample to train on, and of the lists.

    Returns:
        The folder, which appears whole or not at all.

    Raises:
        MissingDependencyError: If faiss is not installed.
        ConfigError: If there is no such tap or kind, or too few rows to train it.
        StoreError: If shards are missing or damaged, no image could be read, or the index cannot be written.
    """
    faiss = _faiss()
    if of not in get_args(Of):
        raise ConfigError(f"expected of='images' or of='patches', got {of!r}")
    store.check_whole()
    tap = store.taps[0] if tap is None else tap
    folder = _folder(store, tap, of, path)
    state = _state(store)  # before the first row is read: what changes meanwhile makes the index one of before
    index = None if kind == "flat" else _trained(faiss, store, tap, of, kind, seed)
    images: list[int] = []
    counts: list[int] = []
    skipped: list[int] = []
    first = 0
    for number in range(store.shards):
        rows = store.rows(number, tap)
        vectors, sizes = vectors_of(rows, of)
        for part in _parts(vectors):
            index = faiss.IndexFlatIP(part.shape[1]) if index is None else index
            finite = part.isfinite().all(1)
            skipped += [index.ntotal + row for row in (~finite).nonzero()[:, 0].tolist()]
            index.add(part.where(finite[:, None], 0.0).numpy())
        here = store.ids_of(number)
        numbers = {name: at for at, name in enumerate(here, first)}
        images += [numbers[name] for name in rows.ids]
        counts += sizes
        first += len(here)
        del rows, vectors  # before the next shard is read
    if index is None:
        raise _nothing(store)
    offsets = np.concatenate([[0], np.cumsum(counts)])
    places = {"images": np.array(images), "offsets": offsets, "skipped": np.array(skipped, np.int64)}
    about = {"format": FORMAT, "store": state, "tap": tap, "of": of, "kind": kind, "rows": index.ntotal}
    _write(faiss, folder, index, places, about)
    return folder


def open_index(store: Store, path: Path | str) -> Index:
    """Read an index into memory.

    Args:
        store: The one that it was built of, as it was then.
        path: What :func:`build_index` returned.

    Raises:
        MissingDependencyError: If faiss is not installed.
        StoreError: If there is no index, it cannot be read, or it is of another store or an earlier state of this one.
    """
    faiss = _faiss()
    folder = Path(path)
    about = _about(folder)
    if about is None:
        raise StoreError(f"expected an index ({FORMAT}) at '{folder}', but there is none; build_index makes one")
    store.check_whole()
    if about["store"] != _state(store):
        raise StoreError(
            f"expected an index of '{store.path}' as it is now, but '{folder}' was built of another store, or before "
            "shards of this one were made again; build it again"
        )
    try:
        index = faiss.read_index(str(folder / _INDEX))
        with np.load(folder / _PLACES) as places:
            found = Index(place_told(store), about["tap"], about["of"], index, **places)
    except (OSError, RuntimeError, TypeError, ValueError, BadZipFile) as error:  # faiss has RuntimeError for all
        raise StoreError(f"expected a whole index at '{folder}', but it cannot be read: {error}") from error
    if not about["rows"] == index.ntotal == found.offsets[-1]:
        raise StoreError(f"expected an index of {about['rows']} rows at '{folder}', got {index.ntotal}; build it again")
    return found


def place_told(store: Store) -> str:
    """Return where a store is, the same text however its path was given."""
    return str(store.path.resolve() if isinstance(store.path, Path) else store.path)


def vectors_of(rows: Rows, of: Of) -> tuple[Float[Tensor, "rows dim"], list[int]]:
    """Return the vectors that are compared, and how many each image has.

    The tokens themselves for patches. For images the mean of the tokens of each, in float64: of a tap with one token,
    such as ``cls``, that token.
    """
    counts = [grid.tokens for grid in rows.grids]
    if of == "patches" or max(counts, default=1) == 1:
        return rows.vectors, counts
    means = [part.mean(0, dtype=torch.float64) for part in rows.vectors.split(counts)]
    return torch.stack(means), [1] * len(means)


def rows_of_block(dim: int, queries: int = 1) -> int:
    """Return how many vectors of ``dim``, and how many rows of scores of ``queries``, fit a block in float64."""
    return rows_at_a_time(torch.empty(max(dim, queries), 0, dtype=torch.float64))


def _parts(vectors: Float[Tensor, "rows dim"]) -> Iterator[Float[Tensor, "part dim"]]:
    """Yield vectors in float32, of length 1, a block at a time."""
    if len(vectors):
        for part in vectors.split(rows_of_block(vectors.shape[1])):
            yield unit(part.double()).float().contiguous()


def _trained(faiss: Any, store: Store, tap: str, of: Of, kind: str, seed: int) -> Any:
    """Return an index without rows, that knows how rows are spread."""
    sample, count = _sample(store, tap, of, seed)
    lists = max(1, min(round(4 * math.sqrt(count)), len(sample) // _EACH))
    chosen = ("flat" if count <= FEW else "ivf") if kind == "auto" else kind
    text = {"flat": "Flat", "ivf": f"IVF{lists},SQfp16"}.get(chosen, chosen)
    try:
        index = faiss.index_factory(sample.shape[1], text, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        raise ConfigError(
            f"expected kind 'auto', 'flat', 'ivf' or a description that faiss.index_factory knows, got {kind!r}"
        ) from error
    inverted = faiss.try_extract_index_ivf(index)
    if inverted is not None:
        inverted.cp.seed = seed
    if not index.is_trained:
        try:
            index.train(sample)
        except RuntimeError as error:
            reason = str(error).strip().rpartition("\n")[2]
            raise ConfigError(
                f"expected a kind that {len(sample)} rows are enough to train, got {kind!r}; try 'flat' ({reason})"
            ) from error
    return index


def _sample(store: Store, tap: str, of: Of, seed: int) -> tuple[np.ndarray, int]:
    """Return some of the vectors, each as likely to be among them (Vitter's algorithm R), and how many there are."""
    rng = np.random.default_rng(seed)
    kept, seen = np.zeros((0, 0), np.float32), 0
    for number in range(store.shards):
        for part in _parts(vectors_of(store.rows(number, tap), of)[0]):
            vectors = part[part.isfinite().all(1)].numpy()
            order = np.arange(seen, seen + len(vectors))
            at = np.where(order < _SAMPLE, order, rng.integers(0, order + 1))
            if not seen:
                kept = np.empty((_SAMPLE, vectors.shape[1]), np.float32)  # memory is taken as it is filled
            kept[at[at < _SAMPLE]] = vectors[at < _SAMPLE]
            seen += len(vectors)
    if not seen:
        raise _nothing(store)
    return kept[: min(seen, _SAMPLE)], seen


def _folder(store: Store, tap: str, of: Of, path: Path | str | None) -> Path:
    if path is None and not isinstance(store.path, Path):
        raise ConfigError(f"expected path=, a folder for the index, as the store is at an address: {store.path}")
    folder = store.path / "indexes" / f"{of}-{tap}" if path is None else Path(path)
    if folder.exists() and _about(folder) is None and not (folder.is_dir() and not any(folder.iterdir())):
        raise StoreError(
            f"expected an index or nothing at '{folder}', got something else, which is not replaced; give another path"
        )
    return folder


def _write(faiss: Any, folder: Path, index: Any, places: dict[str, np.ndarray], about: dict[str, Any]) -> None:
    """Write an index into a folder of another name, which then takes the place of the one before."""
    temporary = folder.parent / f".{uuid4().hex}.tmp"
    try:
        temporary.mkdir(parents=True)
        faiss.write_index(index, str(temporary / _INDEX))
        np.savez(temporary / _PLACES, **places)  # type: ignore[arg-type] - its stub takes them for an option
        for name in (_INDEX, _PLACES):
            with (temporary / name).open("rb") as file:
                os.fsync(file.fileno())
        write_whole(temporary / _ABOUT, (json.dumps(about, indent=1) + "\n").encode())
        if folder.exists():
            shutil.rmtree(folder)
        temporary.rename(folder)
    except (OSError, RuntimeError) as error:
        raise StoreError(f"expected to write an index at '{folder}', but: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _about(folder: Path) -> dict[str, Any] | None:
    """Return what an index says of itself; None where there is none."""
    try:
        found = json.loads((folder / _ABOUT).read_bytes())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and found.get("format") == FORMAT else None


def _state(store: Store) -> str:
    """Return a digest of all that a store holds, made from the digests that its shards have in their first bytes."""
    found = blake2b(digest_size=16)
    for number in range(store.shards):
        found.update(read_bytes(store.shard_path(number), 0, _HEAD))
    return found.hexdigest()


def _nothing(store: Store) -> StoreError:
    return StoreError(f"expected images that could be read and finite vectors in '{store.path}', got none")


def _faiss() -> Any:
    try:
        import faiss  # type: ignore[import-not-found] - an extra
    except ImportError as error:
        raise MissingDependencyError(
            'expected faiss for an index, but it is not installed; try: pip install "vitfeats[index]"'
        ) from error
    return faiss
