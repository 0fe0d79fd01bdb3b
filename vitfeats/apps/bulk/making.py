"""Shards made of images: decoded and resized in threads, read by one model, written while it goes on."""

import json
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass, is_dataclass
from hashlib import blake2b
from importlib.metadata import version
from itertools import chain, islice
from typing import Any

import torch

from vitfeats.api import load_extractor
from vitfeats.apps.bulk.exports import pooled_table
from vitfeats.apps.bulk.files import joined, make_folder, write_bytes
from vitfeats.apps.bulk.shards import StoreType, write_shard
from vitfeats.apps.bulk.sources import Source
from vitfeats.apps.bulk.store import POOLED, Store, pooled_name
from vitfeats.configs import DiffusionConfig
from vitfeats.descriptor import Descriptors
from vitfeats.errors import ConfigError, ImageError, ShapeError
from vitfeats.extractors.base import Extractor
from vitfeats.preprocess import Prepared, is_out_of_memory


@dataclass(frozen=True)
class Part:
    """A shard that is to be made.

    Attributes:
        number: Of the shard.
        images: Of which it is to be made, all that the store has for it.
    """

    number: int
    images: Source


@dataclass(frozen=True)
class Made:
    """A shard that was written.

    Attributes:
        number: Of the shard.
        images: How many images it has.
        broken: Why others could not be read, by id.
    """

    number: int
    images: int
    broken: dict[str, str]


class ShardMaker:
    """Makes shards of a store with one model on one device.

    Which images share a forward pass follows from the shard and the batch size alone, so a shard has the same bytes
    wherever and whenever it is made, as long as the arithmetic of the device is the same, and batches fit in memory:
    the images of one that does not are read one by one.

    Args:
        extractor: The model.
        store: Whose shards are made; its settings say of which taps, and how they are written.
        batch_size: Most images in one forward pass.
        threads: That decode and resize.
        strict: Raise at an image that cannot be read, or does not fit in memory, rather than note and skip it.
        tick: Called with the number of images that are done with, again and again.
    """

    def __init__(
        self,
        extractor: Extractor,
        store: Store,
        *,
        batch_size: int = 8,
        threads: int = 1,
        strict: bool = False,
        tick: Callable[[int], Any] = lambda count: None,
    ) -> None:
        self._extractor, self._store = extractor, store
        self._batch_size, self._threads, self._strict, self._tick = batch_size, threads, strict, tick

    def each(self, parts: Iterable[Part]) -> Iterator[Made]:
        """Make shards one after the other; yield each when it is on disk.

        Images of the next shards are decoded, and finished ones written, while the model is at work: at most as many
        images wait as two batches or twice the threads have, and at most two shards.

        Raises:
            ImageError: If an image cannot be read, and ``strict``.
            StoreError: If a shard cannot be written, or the source cannot be read.
        """
        with ThreadPoolExecutor(self._threads) as readers, ThreadPoolExecutor(1) as writer:
            begun: deque[Part] = deque()
            most = 2 * max(self._threads, self._batch_size)
            writing: deque[Future[Made]] = deque()
            with closing(_ahead(readers, self._prepared, _images_of(parts, begun), most)) as ready:
                while (first := next(ready, None)) is not None:
                    part = begun.popleft()
                    writing.append(writer.submit(self._written, part, *self._read(part, chain([first], ready))))
                    while writing and (len(writing) > 1 or writing[0].done()):
                        yield writing.popleft().result()
            while writing:
                yield writing.popleft().result()

    def _prepared(self, source: Source, number: int) -> Prepared | str:
        """Return what the network takes of an image, or why there is nothing."""
        try:
            image = source.image(number)
            self._extractor.preprocess.network_size((int(image.shape[1]), int(image.shape[2])))
        except (ImageError, ShapeError) as error:  # the second: too long for the model's size
            return str(error)
        return self._extractor.preprocess(image)

    def _read(
        self, part: Part, ready: Iterator[Prepared | str]
    ) -> tuple[list[tuple[str, Descriptors]], dict[str, str]]:
        """Return the descriptors of the images of a shard, and why others could not be read."""
        found: list[tuple[str, Descriptors]] = []
        broken: dict[str, str] = {}

        def leave_out(name: str, why: str) -> None:
            if self._strict:
                raise ImageError(f"'{name}': {why}")
            broken[name] = why
            self._tick(1)

        def readable() -> Iterator[tuple[str, Prepared]]:
            for name in part.images.ids:
                one = next(ready)
                if isinstance(one, Prepared):
                    yield name, one
                else:
                    leave_out(name, one)

        images = readable()
        while window := list(islice(images, self._batch_size)):
            for (name, _), one in zip(window, self._described([image for _, image in window]), strict=True):
                if isinstance(one, str):
                    leave_out(name, one)
                else:
                    found.append((name, held_descriptors(one, self._store)))
                    self._tick(1)
        return found, broken

    def _described(self, images: list[Prepared]) -> list[Descriptors | str]:
        """Return the descriptors of a batch; of an image that does not fit in memory even alone, why there are none."""
        try:
            return list(self._extractor.each(images, self._store.taps, batch_size=self._batch_size))
        except ShapeError as error:
            if not isinstance(error.__cause__, Exception) or not is_out_of_memory(error.__cause__):
                raise
            why = str(error)
        if len(images) == 1:
            return [why]
        return [self._described([image])[0] for image in images]  # after the error, which holds what it was made of

    def _written(self, part: Part, images: Sequence[tuple[str, Descriptors]], broken: Mapping[str, str]) -> Made:
        """Write a shard: last, so that what goes with it is there when it is."""
        settings = self._store.settings
        if settings.get(POOLED) and images:  # nothing tells the columns of a table without images
            folder = joined(self._store.path, POOLED)
            make_folder(folder)
            write_bytes(joined(folder, pooled_name(part.number)), pooled_table(images))
        path = self._store.shard_path(part.number)
        write_shard(path, images, settings=settings, dtype=settings["dtype"], broken=broken)
        return Made(part.number, len(images), dict(broken))


def settings_of(extractor: Extractor, taps: Sequence[str], dtype: StoreType) -> dict[str, Any]:
    """Return what the features of a store depend on, as plain values."""
    weights = blake2b(digest_size=16)
    for name, value in sorted(extractor.model.state_dict().items()):
        weights.update(name.encode())
        weights.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
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


def store_extractor(store: Store, *, model: Any = None, device: str | torch.device = "auto") -> Extractor:
    """Load the model that a store was made with, set as it was, so that what it reads can be compared with the store.

    Args:
        store: Of which.
        model: The module, or the name or folder to load instead, where the store has the name of a model that cannot be
            loaded by it.
        device: Where it goes.

    Raises:
        ConfigError: If what is found is not the model that the store was made with.
        UnknownModelError, WeightsUnavailableError: If it cannot be loaded.
    """
    known = store.settings
    given: dict[str, Any] = {name: known[name] for name in ("norm", "norm_qk", "rope") if known.get(name)}
    if known.get("rope") == "pre":
        del given["rope"]
    if known.get("diffusion"):
        given["diffusion"] = DiffusionConfig(**known["diffusion"])
    size = tuple(known["size"]) if isinstance(known["size"], list) else known["size"]
    named = known["model"] if model is None else model
    extractor = load_extractor(
        named, size=size, stride=known["stride"], device=device, dtype=known["precision"], **given
    )
    here = json.loads(json.dumps(settings_of(extractor, store.taps, known["dtype"])))
    told = [name for name in here if here[name] != known.get(name) and name not in ("model", "vitfeats", "torch")]
    if told:
        hint = "; pass model=" if "weights" in told else ", which no name can set"
        raise ConfigError(
            f"expected the model that '{store.path}' was made with ({known['model']}), but '{named}' differs in: "
            f"{', '.join(told)}{hint}"
        )
    return extractor


def held_descriptors(found: Descriptors, store: Store) -> Descriptors:
    """Return descriptors as the store has them, on the CPU: a graphics card is not where they wait to be written."""
    items = [(str(tap), store.reduce(d).to("cpu")) for tap, d in found.items()]
    return Descriptors(items)


def _plain(value: Any) -> Any:
    """Return a setting as plain values."""
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else value


def _images_of(parts: Iterable[Part], begun: deque[Part]) -> Iterator[tuple[Source, int]]:
    """Yield the images of all parts; note each part when its first image is taken."""
    for part in parts:
        begun.append(part)
        yield from ((part.images, number) for number in range(len(part.images)))


def _ahead(
    pool: ThreadPoolExecutor, work: Callable[..., Any], given: Iterable[tuple[Any, ...]], most: int
) -> Generator[Any]:
    """Yield what work makes of each, in order, with at most so many under way or waiting."""
    under_way: deque[Future[Any]] = deque()
    try:
        for one in given:
            under_way.append(pool.submit(work, *one))
            if len(under_way) >= most:
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()
    finally:
        for future in under_way:
            future.cancel()
