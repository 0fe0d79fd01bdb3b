"""Extraction of many images to disk, on one machine: decoding in threads, one model, a shard after the other."""

import os
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, is_dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from vitfeats.api import load_extractor
from vitfeats.apps.bulk.shards import STORE_TYPES, StoreType, write_shard
from vitfeats.apps.bulk.store import create_store, locked
from vitfeats.descriptor import Descriptors
from vitfeats.errors import ConfigError, ImageError, ShapeError, StoreError
from vitfeats.extractors.base import Extractor
from vitfeats.pictures import picture_items
from vitfeats.preprocess import load_image
from vitfeats.taps import Tap

Given = TypeVar("Given")
Made = TypeVar("Made")

_SPARE = 1.05  # of the disk, beyond what the first images let expect


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

    path: Path
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
    source: Path | str,
    out: Path | str,
    *,
    model: Any = None,
    taps: Sequence[str] | None = None,
    size: int | tuple[int, int] | None = None,
    stride: int | None = None,
    dtype: StoreType = "float16",
    per_shard: int = 64,
    batch_size: int = 8,
    workers: int | None = None,
    device: str | torch.device = "auto",
    strict: bool = False,
    progress: bool = False,
) -> Summary:
    """Write the descriptors of many images into a store; go on where an earlier run ended.

    A run that was killed, at whatever moment, leaves whole shards behind and nothing else; the same call makes those
    that are missing, and the store is then the one that an uninterrupted run would have made.

    Args:
        source: A folder (and the folders in it), a tar file, or a text file of paths, one a line.
        out: Folder of the store, made if missing.
        model: A name, a module, or an :class:`~vitfeats.Extractor`. None is the default model.
        taps: What to read of each image, in one forward pass; None is the model's usual tap.
        size: As for :func:`~vitfeats.load_extractor`, for a model by name; so are stride and device.
        stride: Step between tokens.
        dtype: Of the numbers on disk: "float32", "float16", "bfloat16" or "int8" with a scale for each token.
        per_shard: Images in a file.
        batch_size: Most images in one forward pass.
        workers: Threads that decode; None is one for each core.
        device: Where a model that is loaded by name goes.
        strict: Stop at an image that cannot be read, rather than note and skip it.
        progress: Show a progress bar on standard error.

    Raises:
        ImageError: If an image cannot be read, and ``strict``.
        ConfigError: If there is no image, or the store is of other images or settings.
        StoreError: If the source cannot be read, the disk cannot hold the store, another run is at work in the folder,
            or something cannot be written. Whole shards stay.
        UnknownModelError, WeightsUnavailableError, TapError: As for :func:`~vitfeats.load_extractor` and its extractor.
    """
    start = time.perf_counter()
    if dtype not in STORE_TYPES:
        raise ConfigError(f"expected dtype {', '.join(map(repr, STORE_TYPES))}, got {dtype!r}")
    if batch_size < 1 or per_shard < 1 or (workers is not None and workers < 1):
        raise ConfigError(
            f"expected batch_size, per_shard and workers of at least 1, got {batch_size}, {per_shard} and {workers}"
        )
    items = source_items(source)
    extractor = model
    if not isinstance(extractor, Extractor):
        extractor = load_extractor(model, size=size, stride=stride, device=device)
    wished = (extractor.card.default_tap,) if taps is None else taps
    asked = list(dict.fromkeys(str(extractor.resolve(Tap.parse(text))) for text in wished))
    if not asked:
        raise ConfigError("expected at least one tap, got none; for example 'key@11'")
    folder = Path(out)
    made = 0
    threads = workers or os.cpu_count() or 1
    with locked(folder), ThreadPoolExecutor(threads) as pool:
        store = create_store(folder, list(items), settings_of(extractor, asked, dtype), per_shard)
        todo = store.missing()
        wanted = [(number, name) for number in todo for name in store.ids_of(number)]
        _check_space(folder, extractor, asked, items, wanted, dtype)
        # Few: photographs wait as floats, at their own size.
        ahead = 2 * min(threads, batch_size)
        loaded = _ahead(pool, lambda place: _loaded(items[place[1]]), wanted, ahead)
        with tqdm(total=len(wanted), unit="image", disable=not progress) as bar:
            for number in todo:
                names = store.ids_of(number)
                broken: dict[str, str] = {}
                whole: list[str] = []
                images = _whole(loaded, names, whole, broken, extractor, strict)
                found: list[Descriptors] = []
                for descriptors in extractor.each(images, asked, batch_size=batch_size):
                    found.append(descriptors)
                    bar.update()
                bar.update(len(broken))
                write_shard(
                    store.shard_path(number),
                    list(zip(whole, found, strict=True)),
                    settings=store.settings,
                    dtype=dtype,
                    broken=broken,
                )
                made += len(found)
        sizes = [store.shard_path(number).stat().st_size for number in range(store.shards)]
        broken = store.broken()
    return Summary(folder, len(store) - len(broken), made, broken, time.perf_counter() - start, sum(sizes))


def source_items(source: Path | str) -> dict[str, Callable[[], Any]]:
    """Return what opens each image of a source, by id, in the order of the ids.

    Args:
        source: A folder, a tar file, or a text file of paths, one a line.

    Raises:
        StoreError: If it cannot be read.
        ConfigError: If there is no image, or one is listed twice.
    """
    path = Path(source)
    if path.suffix.lower() in (".txt", ".lst") and path.is_file():
        try:
            lines = [line.strip() for line in path.read_text(encoding="utf-8").split("\n")]
        except (OSError, UnicodeDecodeError) as error:
            raise StoreError(f"expected a list of images, one a line, at '{path}', but: {error}") from error
        named = [(line, (lambda line=line: Path(line))) for line in lines if line]
    else:
        named = list(picture_items(path))
    found = dict(sorted(named, key=lambda item: item[0]))
    if len(found) < len(named):
        raise ConfigError(f"expected images of different names in '{path}', got some twice")
    if not found:
        raise ConfigError(f"expected images in '{path}', got none")
    return found


def settings_of(extractor: Extractor, taps: Sequence[str], dtype: StoreType) -> dict[str, Any]:
    """Return what the features of a store depend on, as plain values."""
    from hashlib import blake2b

    weights = blake2b(digest_size=16)
    for name, value in sorted(extractor.model.state_dict().items()):
        weights.update(name.encode())
        weights.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    preprocess = extractor.preprocess
    # What kinds of extractors are told beside that: final norm, q/k norm, rotary embedding, noise and steps, parts.
    told: dict[str, Any] = {
        name: getattr(extractor, name, None) for name in ("norm", "norm_qk", "rope", "anatomy", "diffusion")
    }
    return {
        **{name: _plain(value) for name, value in told.items() if value is not None},
        "model": extractor.card.name,
        "weights": weights.hexdigest(),
        "taps": list(taps),
        "size": list(preprocess.size) if isinstance(preprocess.size, tuple) else preprocess.size,
        "stride": preprocess.stride,
        "mean": list(preprocess.mean),
        "std": list(preprocess.std),
        "interpolation": preprocess.interpolation,
        "precision": "float32" if extractor.autocast is None else str(extractor.autocast).removeprefix("torch."),
        "dtype": dtype,
        "vitfeats": version("vitfeats"),
        "torch": torch.__version__,
    }


def _plain(value: Any) -> Any:
    """Return a setting as plain values."""
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else value


def _loaded(opener: Callable[[], Any]) -> Tensor | ImageError:
    try:
        return load_image(opener())
    except ImageError as error:
        return error


def _ahead(
    pool: ThreadPoolExecutor, work: Callable[[Given], Made], given: Iterable[Given], most: int
) -> Iterator[Made]:
    """Yield what work makes of each, in order, with at most so many under way or waiting."""
    under_way: deque[Future[Made]] = deque()
    try:
        for one in given:
            under_way.append(pool.submit(work, one))
            if len(under_way) >= most:
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()
    finally:
        for future in under_way:
            future.cancel()


def _whole(
    loaded: Iterator[Tensor | ImageError],
    names: Sequence[str],
    whole: list[str],
    broken: dict[str, str],
    extractor: Extractor,
    strict: bool,
) -> Iterator[Tensor]:
    """Yield the images of a shard that can be read; note why the others cannot."""
    for name in names:
        image = next(loaded)
        why = str(image) if isinstance(image, ImageError) else _too_long(image, extractor)
        if why is not None:
            if strict:
                raise ImageError(f"'{name}': {why}")
            broken[name] = why
            continue
        assert isinstance(image, Tensor)
        whole.append(name)
        yield image


def _too_long(image: Tensor, extractor: Extractor) -> str | None:
    """Return why an image is too long for the model's size, or None."""
    try:
        extractor.preprocess.network_size((image.shape[1], image.shape[2]))
    except ShapeError as error:
        return str(error)
    return None


def _check_space(
    folder: Path,
    extractor: Extractor,
    taps: Sequence[str],
    items: Mapping[str, Callable[[], Any]],
    wanted: Sequence[tuple[int, str]],
    dtype: StoreType,
) -> None:
    """Refuse a run that the disk could not hold, by what a first image takes."""
    for _, name in wanted:
        image = _loaded(items[name])
        if isinstance(image, ImageError) or _too_long(image, extractor):
            continue
        one: Descriptors = extractor(image, list(taps))  # type: ignore[assignment] - several taps
        bytes_each = STORE_TYPES[dtype].itemsize
        needed = _SPARE * len(wanted) * sum(d.features.numel() * bytes_each for d in one.values())
        free = shutil.disk_usage(folder).free
        if needed > free:
            raise StoreError(
                f"expected a disk that holds about {needed / 1e9:.1f} GB at '{folder}', but {free / 1e9:.1f} GB are "
                "free; read fewer taps, or use dtype='int8' or a larger stride"
            )
        return
