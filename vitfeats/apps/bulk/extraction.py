"""Extraction of many images into a store: what is to be done, whether it can be, and by which engine."""

import os
import shutil
import sys
import time
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from tqdm import tqdm

from vitfeats.api import device_of, load_extractor
from vitfeats.apps.bulk.files import Place, place_of, sizes_in
from vitfeats.apps.bulk.local import make_here
from vitfeats.apps.bulk.making import Made, Part, held_descriptors, settings_of
from vitfeats.apps.bulk.opening import open_source
from vitfeats.apps.bulk.ray import make_by_ray
from vitfeats.apps.bulk.reduction import Reduction
from vitfeats.apps.bulk.shards import STORE_TYPES, StoreType, shard_bytes
from vitfeats.apps.bulk.sources import Source
from vitfeats.apps.bulk.store import ABOUT, POOLED, Store, create_store, locked
from vitfeats.errors import ConfigError, ImageError, MissingDependencyError, ShapeError, StoreError
from vitfeats.extractors.base import Extractor
from vitfeats.preprocess import Prepared
from vitfeats.taps import Tap

Engine = Literal["local", "ray"]

_SPARE = 1.05  # of the disk, beyond what the first images let expect
MOST_IN_SHARD = 10_000  # images; the header of a safetensors file cannot be of any size
_LOOKED_AT = 16  # images whose tokens are counted to tell what all will take
_SAMPLE = 1000  # images that principal components are fitted on


@dataclass(frozen=True)
class Summary:
    """What a run did.

    Attributes:
        path: The store.
        images: Images that are in it now.
        made: Images that this run added.
        broken: Why images could not be read, by id.
        seconds: That it took.
        bytes: Size of all shards.
    """

    path: Path | str
    images: int
    made: int
    broken: dict[str, str]
    seconds: float
    bytes: int

    @property
    def rate(self) -> float:
        """Images a second of this run."""
        return self.made / self.seconds if self.seconds else 0.0


def extract(
    source: Source | Path | str,
    out: Path | str,
    *,
    model: Any = None,
    taps: str | Sequence[str] | None = None,
    size: int | tuple[int, int] | None = None,
    stride: int | None = None,
    dtype: StoreType = "float16",
    pca: int | None = None,
    pooled: bool = False,
    per_shard: int = 64,
    batch_size: int = 8,
    engine: Engine = "local",
    device: str | torch.device | Sequence[str | torch.device] = "auto",
    workers: int | None = None,
    actors: int | None = None,
    strict: bool = False,
    retry_broken: bool = False,
    progress: bool = False,
) -> Summary:
    """Write the descriptors of many images into a store; go on where an earlier run ended.

    A run that was killed, at whatever moment, leaves whole shards behind and nothing else; the same call makes those
    that are missing, and the store is then the one that an uninterrupted run would have made.

    Args:
        source: A folder (and the folders in it), a tar file, a text file of paths, one a line, a Parquet table; or a
            folder of tar files or tables; or what :func:`~vitfeats.apps.bulk.open_source` returns. Paths, or addresses
            that fsspec knows (``s3://bucket/photographs``).
        out: Folder of the store, made if missing; or an address.
        model: A name, a module, or an :class:`~vitfeats.Extractor`. None is the default model.
        taps: What to read of each image, in one forward pass; None is the model's usual tap.
        size: As for :func:`~vitfeats.load_extractor`, for a model by name; so is stride.
        stride: Step between tokens.
        dtype: Of the numbers on disk: "float32", "float16", "bfloat16" or "int8" with a scale for each token.
        pca: Reduce features to so many principal components, fitted on up to 1000 images of the source and kept with
            the store.
        pooled: Write one vector an image and tap (CLS as it is, the mean of other tokens) as Parquet too, a file for
            each shard in the folder ``pooled``.
        per_shard: Images in a file.
        batch_size: Most images in one forward pass.
        engine: "local" is this process; "ray" is a cluster, or several processes here.
        device: Where the model goes; several, or "all" graphics cards, share the work, each with a copy of it. "auto"
            leaves a module or an extractor where it is. For "local".
        workers: Threads that decode and resize; None is one for each core, up to 16. With "ray" of each actor, and None
            is two, or as many as there are cores for each graphics card.
        actors: For "ray": how many; None is one for each graphics card, or one where there is none.
        strict: Stop at an image that cannot be read, rather than note and skip it.
        retry_broken: Make shards again in which images are noted as broken: cannot be read, are too long for the
            model's size, or do not fit in memory even alone.
        progress: Show on standard error what is to be done, how far it is, its rate and the time left.

    Raises:
        ImageError: If an image cannot be read, and ``strict``.
        ConfigError: If there is no image, or the store is of other ids or settings.
        StoreError: If the source cannot be read, the disk cannot hold the store, another run is at work in the folder,
            or something cannot be written. Whole shards stay.
        MissingDependencyError: If Ray, or pyarrow for ``pooled``, is not installed.
        UnknownModelError, WeightsUnavailableError, TapError: As for :func:`~vitfeats.load_extractor` and its extractor.
    """
    start = time.perf_counter()
    _check_settings(dtype, engine, pca, pooled, [batch_size, per_shard, workers, actors], actors)
    images = open_source(source)
    devices = _devices(device)
    if engine == "ray" and len(devices) > 1:
        raise ConfigError("expected one device with engine='ray', whose actors have one each, got several; try actors=")
    extractor = _extractor(model, size, stride, devices[0])
    wished = (extractor.card.default_tap,) if taps is None else (taps,) if isinstance(taps, str) else taps
    asked = list(dict.fromkeys(str(extractor.resolve(Tap.parse(text))) for text in wished))
    if not asked:
        raise ConfigError("expected at least one tap, got none; for example 'key@11'")
    folder = place_of(out)
    made, new = 0, dict[str, str]()
    with locked(folder):
        settings = settings_of(extractor, asked, dtype) | ({POOLED: True} if pooled else {})
        reduction = None if pca is None else _reduction(folder, images, extractor, asked, pca, batch_size)
        if reduction is not None:
            settings["pca"] = reduction.facts()
        store = create_store(folder, images.ids, settings, per_shard, reduction=reduction)
        if retry_broken:
            store.remove_shards_of(store.broken())
        todo = store.missing()
        count = sum(len(store.ids_of(number)) for number in todo)
        expected = _expected_bytes(store, images, todo, extractor)
        _check_space(folder, expected)
        if progress:
            done = f", {len(images) - count} of them done" if count < len(images) else ""
            print(f"{len(images)} images{done}; about {_size(expected)} to write to '{folder}'", file=sys.stderr)
        parts = (Part(n, images.part(n * per_shard, (n + 1) * per_shard)) for n in todo)
        with tqdm(total=count, unit="image", disable=not progress) as bar:
            shared: dict[str, Any] = {"batch_size": batch_size, "strict": strict, "tick": bar.update}
            if not todo:
                running: Generator[Made] = (one for one in ())
            elif engine == "ray":
                running = make_by_ray(extractor, store, list(parts), threads=workers, actors=actors, **shared)
            else:
                extractors = [extractor, *(extractor.on(other) for other in devices[1:])]
                running = make_here(extractors, store, parts, threads=workers or _cores(), **shared)
            with closing(running):
                for one in running:
                    made += one.images
                    new |= one.broken
        if missing := store.missing():
            raise StoreError(
                f"expected all shards of '{folder}', but {len(missing)} were removed while others were made"
            )
        broken = store.broken(sorted({*range(store.shards)}.difference(todo))) | new
        sizes = sum(size for name, size in sizes_in(folder).items() if name.startswith("part-"))
    return Summary(folder, len(store) - len(broken), made, broken, time.perf_counter() - start, sizes)


def _check_settings(
    dtype: str, engine: str, pca: int | None, pooled: bool, counts: Sequence[int | None], actors: int | None
) -> None:
    if dtype not in STORE_TYPES:
        raise ConfigError(f"expected dtype {', '.join(map(repr, STORE_TYPES))}, got {dtype!r}")
    if engine not in get_args(Engine):
        raise ConfigError(f"expected engine {', '.join(map(repr, get_args(Engine)))}, got {engine!r}")
    if counts[1] is not None and counts[1] > MOST_IN_SHARD:
        raise ConfigError(f"expected per_shard of at most {MOST_IN_SHARD}, got {counts[1]}")
    if any(count is not None and count < 1 for count in counts):
        told = ", ".join(str(count) for count in counts[:2]) + f" and {counts[2]}"
        if actors is not None and actors < 1:
            raise ConfigError(f"expected actors of at least 1, got {actors}")
        raise ConfigError(f"expected batch_size, per_shard and workers of at least 1, got {told}")
    if actors is not None and engine != "ray":
        raise ConfigError(f"expected actors= with engine='ray', got it with engine={engine!r}; leave it out")
    if pca is not None and pca < 1:
        raise ConfigError(f"expected pca of at least 1 component, got {pca}; for example 64")
    if pooled and find_spec("pyarrow") is None:
        raise MissingDependencyError(
            'expected pyarrow for pooled=True, but it is not installed; try: pip install "vitfeats[bulk]"'
        )


def _devices(device: str | torch.device | Sequence[str | torch.device]) -> list[str | torch.device]:
    """Return the devices that share the work."""
    if device == "all":
        return [f"cuda:{number}" for number in range(torch.cuda.device_count())] or ["auto"]
    found = [device] if isinstance(device, str | torch.device) else list(device)
    if not found:
        raise ConfigError("expected a device, or several, got none; try 'auto'")
    return found


def _extractor(
    model: Any, size: int | tuple[int, int] | None, stride: int | None, device: str | torch.device
) -> Extractor:
    """Return an extractor of what was given, on the first device."""
    if isinstance(model, Extractor):
        if size is not None or stride is not None:
            raise ConfigError(
                "expected size and stride with a model by name, got an extractor, which has its own; "
                "call extractor.resized"
            )
        extractor = model
    else:
        where = "auto" if isinstance(model, torch.nn.Module) else device
        extractor = load_extractor(model, size=size, stride=stride, device=where)
    wanted = None if device == "auto" else device_of(device)
    return extractor if wanted is None or extractor.device == wanted else extractor.on(wanted)


def _cores() -> int:
    """Return how many threads decode: beyond 16 the model is what they wait for."""
    return min(os.cpu_count() or 1, 16)


def _reduction(
    folder: Place, images: Source, extractor: Extractor, taps: Sequence[str], dims: int, batch_size: int
) -> Reduction:
    """Return the reduction that the store has, or fit one on images spread evenly over the source."""
    if ABOUT in sizes_in(folder):
        there = Store(folder).reduction
        if there is None or there.dims != dims:
            known = "without" if there is None else f"with pca={there.dims}"
            raise ConfigError(
                f"expected pca as the store in '{folder}' has it, {known}, got {dims}. Use another folder"
            )
        return there
    numbers = np.unique(np.linspace(0, len(images) - 1, min(_SAMPLE, len(images))).round().astype(int))
    readable = (image for number in numbers if (image := _readable(images, int(number), extractor)) is not None)
    return Reduction.fit(extractor.each(readable, list(taps), batch_size=batch_size), dims)


def _readable(images: Source, number: int, extractor: Extractor) -> Prepared | None:
    """Return what the network takes of an image, or None where it cannot be read or is too long."""
    try:
        return extractor.preprocess(images.image(number))
    except (ImageError, ShapeError):
        return None


def _expected_bytes(store: Store, images: Source, todo: Sequence[int], extractor: Extractor) -> float:
    """Return what is to be written, by what one image takes, and by how many tokens some others have."""
    step = store.per_shard
    numbers = [n for shard in todo for n in range(shard * step, min(len(store), (shard + 1) * step))]
    spread = [numbers[place] for place in np.linspace(0, len(numbers) - 1, min(_LOOKED_AT, len(numbers))).astype(int)]
    readable = [(n, one) for n in spread if (one := _readable(images, n, extractor)) is not None]
    if not readable:
        return 0.0
    number, first = readable[0]
    (found,) = extractor.each([first], store.taps)
    held = held_descriptors(found, store)
    some = [[(f"{store.ids[number]}{place}", held) for place in range(count)] for count in (1, 2)]
    alone, both = (len(shard_bytes(one, settings=store.settings, dtype=store.settings["dtype"])) for one in some)
    tokens = sum(one.grid.tokens for _, one in readable) / len(readable) / first.grid.tokens
    item = STORE_TYPES[store.settings["dtype"]].itemsize
    dense = sum(d.features.numel() * item for d in held.values() if d.grid.tokens > 1)
    tables = sum(4 * d.dim + 8 for d in held.values()) if store.settings.get(POOLED) else 0
    return float((both - alone + dense * (tokens - 1) + tables) * len(numbers) + (alone + alone - both) * len(todo))


def _check_space(folder: Place, expected: float) -> None:
    """Refuse a run that the disk could not hold; object storage holds what it is given."""
    if isinstance(folder, str):
        return
    needed, free = _SPARE * expected, shutil.disk_usage(folder).free
    if expected and needed > free:
        raise StoreError(
            f"expected a disk that holds about {_size(needed)} at '{folder}', but {_size(free)} are free; read fewer "
            "taps, or use dtype='int8', pca=64 or a larger stride"
        )


def _size(count: float) -> str:
    """Say how many bytes these are."""
    unit, name = next(((10**power, name) for power, name in ((9, "GB"), (6, "MB")) if count >= 10**power), (1000, "kB"))
    return f"{count / unit:.0f} {name}" if count >= 10 * unit else f"{count / unit:.1f} {name}"
