"""Exports of a store for other programs: NumPy files, a Zarr group, a Parquet table; each is whole or not there."""

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from io import BytesIO
from itertools import chain
from pathlib import Path
from statistics import mode
from typing import Any, BinaryIO, Literal
from uuid import uuid4

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from vitfeats.apps.bulk.shards import Rows
from vitfeats.apps.bulk.store import Store
from vitfeats.descriptor import Descriptors
from vitfeats.errors import ConfigError, MissingDependencyError, StoreError, nearest_names

ExportType = Literal["float16", "float32"]
_Known = tuple[list[str], int, Int[np.ndarray, "_ 4"]]
_TYPES = {"float16": torch.float16, "float32": torch.float32}

_CHUNK, _FILE = 2**20, 2**27  # bytes of a chunk of Zarr's features, and of a file of chunks
_GROUP = 2**26  # bytes of a row group of a Parquet file, before it is compressed


def export_npy(
    store: Store, folder: Path | str, *, taps: str | Sequence[str] | None = None, dtype: ExportType = "float16"
) -> Path:
    """Write a store as NumPy files, which ``numpy.load(path, mmap_mode="r")`` opens unread; return their folder.

    For each tap, here ``key@11``, of the images that could be read, in order:

    - ``key@11.npy``: (tokens of all images, dim). Image i has the rows ``offsets[i]`` to ``offsets[i + 1]``, row-major
      over its grid. This is one layout for grids of any sizes; where all grids are the same,
      ``.reshape(images, rows, cols, dim)`` gives the usual one.
    - ``key@11.offsets.npy``: (images + 1,) int64.
    - ``key@11.grids.npy``: (images, 2) int32, rows and cols of each grid.
    - ``key@11.sizes.npy``: (images, 2) int32, (height, width) of each source image in pixels.

    ``images.json`` has their ``ids``, the ``taps``, the ``settings`` of the store and, by id, why images are
    ``broken``. One tap of one shard of the store is in memory at a time.

    Args:
        store: One of which no shard is missing.
        folder: Where to: a new path in a folder that exists, not that of the store.
        taps: Of the store; None is all.
        dtype: Of the features on disk: "float16" or "float32". What is too large for it becomes its largest number.

    Raises:
        ConfigError: If something is at the path already, or there is no such tap or type.
        StoreError: If shards are missing or damaged, no image could be read, or something cannot be written; nothing
            is left behind then.
    """
    target = Path(folder)
    chosen = _checked(store, target, taps, dtype)
    with _appearing(target) as made:
        made.mkdir()
        for tap in chosen:
            known: list[_Known] = []
            # No memory map: where the disk is full, writing to one ends the process instead of raising an error.
            with (made / f"{tap}.npy").open("xb") as file:
                for rows in _parts(store, tap):
                    if not known:
                        _write_header(file, (0, rows.vectors.shape[1]), dtype)
                    known.append(_known(rows))
                    file.write(_numbers(rows.vectors, dtype).data)
                ids, dim, arrays = _joined(known)
                file.seek(0)
                _write_header(file, (int(arrays["offsets"][-1]), dim), dtype)  # as long as before: NumPy leaves room
            for name, values in arrays.items():
                np.save(made / f"{tap}.{name}.npy", values)
            if tap == chosen[0]:
                (made / "images.json").write_text(json.dumps({**_facts(store, chosen), "ids": ids}, indent=1) + "\n")
    return target


def export_zarr(
    store: Store, path: Path | str, *, taps: str | Sequence[str] | None = None, dtype: ExportType = "float16"
) -> Path:
    r"""Write a store as a group of Zarr version 3, which ``zarr.open(path)`` opens; return its path.

    It has a group for each tap, with the arrays ``features``, ``offsets``, ``grids`` and ``sizes``, which are those of
    :func:`export_npy`; an array ``ids`` of strings; and the attributes ``taps``, ``settings`` and ``broken``. Ids are
    no attribute, as all attributes are read whenever a group is opened. Bytes of an id that are no text are escaped:
    ``\udcff``.

    Features are not compressed, as that gains little. A chunk is about 1 MiB, and whole images where most have the
    same number of tokens; a file has about 128 MiB of chunks, and is written once and whole. The store is read twice,
    at first for the size of the arrays; one tap of one shard and about four files are in memory at a time. Arguments
    are those of :func:`export_npy`.

    Raises:
        MissingDependencyError: If zarr is not installed.
        ConfigError, StoreError: As for :func:`export_npy`.
    """
    zarr = _imported("zarr", "zarr")
    target = Path(path)
    chosen = _checked(store, target, taps, dtype)
    with _appearing(target) as made:
        made.mkdir()  # by itself, Zarr would make all folders above it
        root = zarr.create_group(str(made), zarr_format=3, attributes=_facts(store, chosen))
        for tap in chosen:
            ids, dim, arrays = _joined([_known(rows) for rows in _parts(store, tap)])
            group = root.create_group(tap)
            _write_features(group, (_numbers(rows.vectors, dtype) for rows in _parts(store, tap)), dim, arrays, dtype)
            for name, values in arrays.items():
                group.create_array(name, data=values)
            if tap == chosen[0]:
                texts = np.array([_text(name) for name in ids], dtype=np.dtypes.StringDType())
                root.create_array("ids", data=texts)
    return target


def export_parquet(
    store: Store, path: Path | str, *, taps: str | Sequence[str] | None = None, pool: Literal["mean"] | None = "mean"
) -> Path:
    r"""Write a store as one Parquet file with a row for each image that could be read, in order; return its path.

    Columns are ``id``; ``height`` and ``width`` of the source image in pixels; and for each tap, here ``key@11``,

    - with ``pool="mean"`` ``key@11``: the mean of the image's tokens, a list of dim float32 (of a single token, as in
      ``cls@11``, that token);
    - with ``pool=None`` ``key@11``: all tokens one after the other, a flat list of rows · cols · dim float32, of which
      pandas makes one array to ``.reshape(rows, cols, -1)``; and ``key@11_rows`` and ``key@11_cols``, its grid.

    Numbers are compressed with zstd, their bytes apart (BYTE_STREAM_SPLIT). A row group is about 64 MiB before that, or
    one image. The file's metadata has, under ``vitfeats``, JSON of the ``taps``, ``settings`` and ``broken`` images.
    Bytes of an id that are no text are escaped: ``\udcff``. A shard and a row group are in memory at a time. The other
    arguments are those of :func:`export_npy`.

    Raises:
        MissingDependencyError: If pyarrow is not installed.
        ConfigError, StoreError: As for :func:`export_npy`; also if there is no such pooling.
    """
    arrow = _imported("pyarrow", "bulk")
    if pool not in ("mean", None):
        raise ConfigError(f"expected pool 'mean' or None, got {pool!r}")
    target = Path(path)
    chosen = _checked(store, target, taps)
    with _appearing(target) as made:
        shards = zip(*(_parts(store, tap) for tap in chosen), strict=True)
        tables = (_table(dict(zip(chosen, shard, strict=True)), pool) for shard in shards)
        first = next(tables)
        schema = first.schema.with_metadata({"vitfeats": json.dumps(_facts(store, chosen))})
        with import_module("pyarrow.parquet").ParquetWriter(made, schema, **_layout(schema)) as writer:
            waiting = first.slice(0, 0)
            for table in chain([first], tables):
                waiting = arrow.concat_tables([waiting, table])
                most = max(1, _GROUP * len(waiting) // waiting.nbytes)
                while len(waiting) >= most:
                    writer.write_table(waiting.slice(0, most))
                    waiting = waiting.slice(most)
            if len(waiting):
                writer.write_table(waiting)
    return target


def pooled_table(images: Sequence[tuple[str, Descriptors]]) -> bytes:
    """Return a Parquet file of one vector an image and tap. The same images give the same bytes.

    Columns are those of :func:`export_parquet` with ``pool="mean"``, so that several files can be read as one table.

    Args:
        images: Of each image its id and the descriptors of its taps, a batch of 1 each; the same taps of each, and at
            least one image.

    Raises:
        MissingDependencyError: If pyarrow is not installed.
        ConfigError: If there is no image, as then nothing tells the columns.
    """
    _imported("pyarrow", "bulk")
    if not images:
        raise ConfigError("expected at least one image for a table, got none; leave out a table without images")
    ids = [name for name, _ in images]
    shard: dict[str, Rows] = {}
    for tap in images[0][1]:
        own = [descriptors[tap] for _, descriptors in images]
        vectors = torch.cat([d.features[0].detach().to("cpu", torch.float32) for d in own])
        shard[str(tap)] = Rows(ids, vectors, [d.grid for d in own], [d.frames[0] for d in own])
    table, content = _table(shard, "mean"), BytesIO()
    import_module("pyarrow.parquet").write_table(table, content, **_layout(table.schema))
    return content.getvalue()


def _checked(store: Store, target: Path, taps: str | Sequence[str] | None, dtype: str = "float32") -> list[str]:
    """Return the taps to export; refuse what cannot be done before anything is written."""
    if dtype not in _TYPES:
        raise ConfigError(f"expected dtype {' or '.join(map(repr, _TYPES))}, got {dtype!r}")
    asked = store.taps if taps is None else [taps] if isinstance(taps, str) else taps
    chosen = list(dict.fromkeys(map(str, asked)))
    unknown = [tap for tap in chosen if tap not in store.taps]
    if unknown or not chosen:
        got = f"{unknown[0]!r}. {nearest_names(unknown[0], store.taps)}" if unknown else "none"
        raise ConfigError(f"expected taps of the store ({', '.join(store.taps)}), got {got}")
    if os.path.lexists(target):
        raise ConfigError(f"expected a new path, but '{target}' exists; remove it, or export to another")
    if target.parent.resolve() == Path(store.path).resolve():  # the store may be an address
        # A run on the store takes what is half-written there for its own, and removes it.
        raise ConfigError(f"expected a path outside the store, got '{target}'; export to another folder")
    store.check_whole()
    if len(store.broken()) == len(store.ids):
        raise StoreError(f"expected images that could be read, but in '{store.path}' there is none")
    return chosen


@contextmanager
def _appearing(target: Path) -> Iterator[Path]:
    """Give a path beside ``target`` to write to; it becomes ``target`` at the end, and is removed after an error."""
    temporary = target.parent / f".{uuid4().hex}.tmp"
    try:
        yield temporary
        for path in filter(Path.is_file, (temporary, *temporary.rglob("*"))):
            with path.open("rb") as file:  # the name must not reach the disk before what it stands for
                os.fsync(file.fileno())
        os.rename(temporary, target)
    except StoreError:
        raise
    except OSError as error:
        raise StoreError(f"expected to write '{target}', but: {error}") from error
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        temporary.unlink(missing_ok=True)


def _parts(store: Store, tap: str) -> Iterator[Rows]:
    """Yield what there is of a tap, a shard after the other; one of broken images alone is left out."""
    parts = (store.rows(number, tap) for number in range(store.shards))
    return (rows for rows in parts if rows.ids)


def _numbers(vectors: Float[Tensor, "rows dim"], dtype: str) -> Float[np.ndarray, "rows dim"]:
    limits = torch.finfo(_TYPES[dtype])  # an infinity would be made of what is merely large
    return vectors.clamp(limits.min, limits.max).to(_TYPES[dtype]).numpy()


def _facts(store: Store, taps: list[str]) -> dict[str, Any]:
    return {"taps": taps, "settings": store.settings, "broken": store.broken()}


def _known(rows: Rows) -> _Known:
    """Return of a shard the ids, the channels, and of each image rows, cols, height and width."""
    pairs = zip(rows.grids, rows.frames, strict=True)
    return rows.ids, rows.vectors.shape[1], np.array([(g.rows, g.cols, *f.source_size) for g, f in pairs], np.int32)


def _joined(known: list[_Known]) -> tuple[list[str], int, dict[str, np.ndarray]]:
    """Return of a store the ids, the channels, and the arrays of a row an image."""
    facts = np.concatenate([facts for _, _, facts in known])
    offsets = np.concatenate([[0], facts[:, :2].prod(1, dtype=np.int64).cumsum()])
    arrays = {"offsets": offsets, "grids": facts[:, :2], "sizes": facts[:, 2:]}
    return [name for ids, _, _ in known for name in ids], known[0][1], arrays


def _text(name: str) -> str:
    """Return an id as UTF-8 can have it; a file's name may be other bytes."""
    return name.encode(errors="backslashreplace").decode()


def _write_header(file: BinaryIO, shape: tuple[int, int], dtype: str) -> None:
    facts = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, facts)


def _write_features(
    group: Any, parts: Iterable[np.ndarray], dim: int, arrays: Mapping[str, np.ndarray], dtype: str
) -> None:
    counts = np.diff(arrays["offsets"]).tolist()
    usual, row = mode(counts), dim * np.dtype(dtype).itemsize  # tokens of most images; bytes of one
    chunk = usual * max(1, min(_CHUNK // (usual * row), len(counts)))  # tokens
    whole = chunk * max(1, min(_FILE // (chunk * row), -(-sum(counts) // chunk)))
    sizes = {"shape": (sum(counts), dim), "chunks": (chunk, dim), "shards": (whole, dim)}
    array = group.create_array("features", dtype=dtype, compressors=None, **sizes)
    start = 0
    for block in _blocks(parts, whole):  # whole files alone: of one that is written in parts, a part can be lost
        array[start : start + len(block)] = block
        start += len(block)


def _blocks(parts: Iterable[np.ndarray], count: int) -> Iterator[np.ndarray]:
    """Yield the rows of arrays in blocks of ``count``; only the last may be shorter."""
    waiting: list[np.ndarray] = []
    lacking = count
    for part in parts:
        while len(part) >= lacking:
            yield np.concatenate([*waiting, part[:lacking]])
            part, waiting, lacking = part[lacking:], [], count
        waiting.append(part)
        lacking -= len(part)
    if lacking < count:
        yield np.concatenate(waiting)


def _table(shard: Mapping[str, Rows], pool: str | None) -> Any:
    """Return the table of a shard, whose rows are given by tap."""
    import pyarrow as pa

    ids, _, facts = _known(next(iter(shard.values())))
    height, width = map(pa.array, facts[:, 2:].T)
    columns = {"id": pa.array([_text(name) for name in ids], pa.string()), "height": height, "width": width}
    for tap, rows in shard.items():
        counts, dim = [grid.tokens for grid in rows.grids], rows.vectors.shape[1]
        if pool == "mean":
            means = torch.stack([tokens.mean(0) for tokens in rows.vectors.split(counts)])
            columns[tap] = pa.FixedSizeListArray.from_arrays(pa.array(means.numpy().reshape(-1)), dim)
        else:  # 64-bit offsets, as the numbers of a shard may be more than 2³¹
            offsets = pa.array(np.cumsum([0, *counts], dtype=np.int64) * dim)
            columns[tap] = pa.LargeListArray.from_arrays(offsets, pa.array(rows.vectors.numpy().reshape(-1)))
            columns[f"{tap}_rows"], columns[f"{tap}_cols"] = map(pa.array, _known(rows)[2][:, :2].T)
    return pa.table(columns)


def _layout(schema: Any) -> dict[str, Any]:
    """Return how Parquet keeps the columns: no dictionaries, which are larger than numbers that never come twice."""
    lists = [f"{field.name}.list.element" for field in schema if field.type.num_fields]
    return {"compression": "zstd", "use_dictionary": False, "use_byte_stream_split": lists}


def _imported(package: str, extra: str) -> Any:
    try:
        return import_module(package)
    except ImportError as error:
        raise MissingDependencyError(
            f'expected {package} for this export, but it is not installed; try: pip install "vitfeats[{extra}]"'
        ) from error
