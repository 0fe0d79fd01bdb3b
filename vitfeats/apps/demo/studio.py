"""What all visitors share: networks that are loaded once, what was read last, and the threads that work."""

import hashlib
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Generic, TypeVar
from uuid import uuid4

from PIL import Image

from vitfeats.api import default_model, list_models, load_extractor
from vitfeats.apps.demo.intake import Folder, Picture, take_in
from vitfeats.configs import DemoConfig
from vitfeats.descriptor import Descriptor, Descriptors
from vitfeats.errors import ConfigError, UnknownModelError, VitFeatsError
from vitfeats.extractors.base import Extractor
from vitfeats.grid import PatchGrid, Size, fit_size
from vitfeats.runs import encoded
from vitfeats.taps import Tap

V = TypeVar("V")
T = TypeVar("T")

BUNDLED = ("mini", "vgg_mini", "ddpm_mini")
USUAL = ("dino_vit*", "dinov2_*", "dinov3_vit*16", "mae_vitb16", "clip_vitb16", "siglip2_vitb16", "vgg19", "resnet50")
FACETS = ("key", "query", "value", "token", "residual", "out")
LOADED = 3  # networks that are kept: what is asked for next is mostly what was asked for last
MOST_TOKENS = 6000  # of one picture: more of them take a CPU half a minute
LONGEST = 3  # times the shorter side that a picture's longer side may be before the shorter one is seen smaller


@dataclass(frozen=True)
class View:
    """How a picture is looked at: one tap of one model at one size.

    Attributes:
        model: A name.
        facet: Which facet.
        layer: Number of the layer among those that have it.
        size: Shorter side in pixels of what the network sees.
        stride: Step between tokens in pixels; 0 is the model's own.
    """

    model: str
    facet: str
    layer: int
    size: int
    stride: int = 0

    @classmethod
    def of(cls, model: str, facet: str, layer: float, size: float, stride: float) -> "View":
        """Return a view from the values of a page, whose numbers may be floats."""
        return cls(model, facet, int(layer), int(size), int(stride))


@dataclass(frozen=True, eq=False)
class Choices:
    """What can be read of a model.

    Attributes:
        taps: By facet, the taps of its layers in their order.
        sizes: Shorter sides of what it sees, from its usual one.
        strides: From the model's own, which is the patch, to finer ones.
        looks: The tap of what CLS attends to, or None.
        usual: (facet, number of the layer) of its default tap.
    """

    taps: dict[str, tuple[str, ...]]
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    looks: str | None
    usual: tuple[str, int]


class Kept(Generic[V]):
    """The values that were used last, up to a weight; may be used from several threads.

    Args:
        most: Largest sum of weights; one value is always kept.
        weigh: What a value weighs.
    """

    def __init__(self, most: float, weigh: Callable[[V], float]) -> None:
        self._most, self._weigh = most, weigh
        self._values: OrderedDict[Any, tuple[V, float]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Any) -> V | None:
        """Return a value, and remember that it was used; None where it is not kept."""
        with self._lock:
            if key not in self._values:
                return None
            self._values.move_to_end(key)
            return self._values[key][0]

    def put(self, key: Any, value: V) -> V:
        """Keep a value, in place of those that were used longest ago; return it."""
        with self._lock:
            self._values[key] = (value, self._weigh(value))
            self._values.move_to_end(key)
            while len(self._values) > 1 and self.weight > self._most:
                self._values.popitem(last=False)
        return value

    def clear(self) -> None:
        """Keep nothing."""
        with self._lock:
            self._values.clear()

    @property
    def weight(self) -> float:
        """The sum of the weights."""
        return sum(weight for _, weight in self._values.values())

    def __len__(self) -> int:
        """Return how many there are."""
        return len(self._values)


class Stopped(Exception):  # noqa: N818 - not an error: nobody listens any more
    """Raised in a job that nobody waits for."""


class Pool(ThreadPoolExecutor):
    """One thread for work that queues, which knows that it was shut down.

    Attributes:
        ended: Set once it was.
    """

    def __init__(self, name: str) -> None:
        super().__init__(1, f"vitfeats-demo-{name}")
        self.ended = threading.Event()

    def end(self) -> None:
        """Take no more work, drop what waits, and tell what runs."""
        self.ended.set()
        self.shutdown(wait=False, cancel_futures=True)


class Job(Generic[T]):
    """A long piece of work in another thread, whose news are iterated over; it ends where nobody listens any more.

    Args:
        work: Called with ``tell``, which hands over news; only the newest are kept. It raises :class:`Stopped` once the
            iteration has ended, or has not asked for news for ``patience`` seconds, or the pool has.
        pool: Where it runs.
        patience: Seconds, 5 at least: they are counted about once a second.
    """

    def __init__(self, work: Callable[[Callable[[T], None]], None], pool: Pool, patience: float = 60) -> None:
        self._work, self._pool, self._patience = work, pool, patience
        self._news: list[T] = []
        self._changed = threading.Condition()
        self._left = threading.Event()
        self._asked = time.monotonic()

    def __iter__(self) -> Iterator[T]:
        """Run, and yield the newest news; raise what the work raised."""
        if self._pool.ended.is_set():
            return
        running: Future[None] = self._pool.submit(self._run)
        try:
            while True:
                with self._changed:
                    self._asked = time.monotonic()
                    self._changed.wait_for(lambda: self._news or running.done(), timeout=1.0)
                    found, self._news = self._news, []
                yield from found
                if running.done() and not self._news:
                    if not running.cancelled():  # it was, where it had not begun when the pool ended
                        running.result()
                    return
        finally:
            self._left.set()
            running.cancel()

    def tell(self, news: T) -> None:
        """Hand over news.

        Raises:
            Stopped: If nobody waits for them.
        """
        nobody = self._left.is_set() or self._pool.ended.is_set()
        if nobody or time.monotonic() - self._asked > self._patience:
            raise Stopped
        with self._changed:
            self._news = [news]
            self._changed.notify()

    def _run(self) -> None:
        try:
            self._work(self.tell)
        except Stopped:
            pass
        finally:
            with self._changed:
                self._changed.notify()


class Studio:
    """What all visitors share.

    Short work (reading a picture), work of some seconds (painting one) and long work (a splice) each have one thread,
    in which they queue; so torch's own threads are neither many nor in each other's way.

    Args:
        folder: Where uploads lie.
        config: Limits and models.

    Attributes:
        models: Names to choose from.
        long: Runs long jobs, one at a time.
        painting: Runs what takes some seconds.

    Raises:
        UnknownModelError: If no model fits a name or pattern of ``config.models``.
    """

    def __init__(self, folder: Folder, config: DemoConfig) -> None:
        self.folder, self.config = folder, config
        self.models = offered(config.models)
        self._shelf = folder.path / "made"
        self._shelf.mkdir(exist_ok=True)
        self.long, self.painting, self._short = Pool("long"), Pool("painting"), Pool("short")
        self._pictures = Kept[Picture](64e6, lambda picture: 3 * picture.image.width * picture.image.height)
        self._networks = Kept[Extractor](LOADED, lambda _: 1)
        self._read = Kept[Descriptors](400e6, _bytes)
        self._made = Kept[Any](256, lambda _: 1)

    def close(self) -> None:
        """End the threads: long work at its next news, other work once it is done."""
        for pool in (self.long, self.painting, self._short):
            pool.end()

    def forget(self) -> None:
        """Keep nothing of what was read and made so far; networks stay."""
        for kept in (self._pictures, self._read, self._made):
            kept.clear()

    def picture(self, path: str | Path | None, what: str = "a picture") -> Picture:
        """Return an uploaded picture; the last ones are kept.

        Raises:
            ImageError: If it cannot be taken.
            ConfigError: If there is none.
        """
        if path is None:
            raise ConfigError(f"expected {what}, got none; upload one, or click a sample")
        file = str(path)  # uploads lie in folders that are named after what they hold
        kept = self._pictures.get(file)
        if kept is not None and _touched(file):
            return kept
        return self._pictures.put(file, take_in(file, self.folder.path, pixels=self.config.megapixels * 1e6))

    def file(self, image: Image.Image, suffix: str = ".png") -> str:
        """Write a picture into the demo's folder, where the page can show it; return its path.

        The same picture has the same file, which appears whole: others may be looking at it.
        """
        data = encoded(image, f"made{suffix}")
        path = self._shelf / f"{hashlib.sha256(data).hexdigest()[:32]}{suffix}"
        if _touched(path):
            return str(path)
        begun = path.with_name(f"{uuid4().hex}.tmp")
        begun.write_bytes(data)
        os.replace(begun, path)
        return str(path)

    def work(self, task: Callable[[], T]) -> T:
        """Run short work in the thread for it; return its result."""
        return self._short.submit(task).result()

    def extractor(self, model: str) -> Extractor:
        """Return the extractor of a model, loaded once.

        Raises:
            ConfigError: If the model is not among those offered.
        """
        if model not in self.models:
            raise ConfigError(f"expected one of the models of this page, got '{model}'")
        return self._networks.get(model) or self._networks.put(model, load_extractor(model, device=self.config.device))

    def choices(self, model: str) -> Choices:
        """Return what can be read of a model."""
        kept = self._made.get(("choices", model))
        return kept or self._made.put(("choices", model), self.work(lambda: _choices(self.extractor(model))))

    def tap(self, view: View) -> str:
        """Return the tap of a view.

        Raises:
            ConfigError: If the model has no such facet or layer.
        """
        taps = self.choices(view.model).taps
        if view.facet not in taps:
            raise ConfigError(f"expected a facet of {view.model} ({', '.join(taps)}), got '{view.facet}'")
        if not 0 <= view.layer < len(taps[view.facet]):
            raise ConfigError(
                f"expected a layer of {view.model} from 0 to {len(taps[view.facet]) - 1}, got {view.layer}"
            )
        return taps[view.facet][view.layer]

    def read(self, picture: Picture, view: View) -> tuple[Descriptor, Descriptor | None]:
        """Return a picture's descriptor, and what CLS attends to where the model has that; the last ones are kept."""
        tap, looks = self.tap(view), self.choices(view.model).looks
        key = (picture.key, view)

        def task() -> Descriptors:
            kept = self._read.get(key)  # may have been read while this waited
            if kept is not None:
                return kept
            extractor = self._sized(view, picture)
            return self._read.put(key, extractor(picture.image, [tap] if looks is None else [tap, looks]))

        found = self._read.get(key) or self.work(task)
        return found[tap], None if looks is None else found[looks]

    def once(self, key: Any, make: Callable[[], T]) -> T:
        """Return what was made under a key before, or make it in the thread of short work; the last ones are kept."""

        def task() -> T:
            kept = self._made.get(key)  # may have been made while this waited
            return kept if kept is not None else self._made.put(key, make())

        kept = self._made.get(key)
        return kept if kept is not None else self.work(task)

    def _sized(self, view: View, picture: Picture) -> Extractor:
        """Return the extractor of a view, for a picture that may be long and narrow."""
        extractor = self.extractor(view.model)
        patch, usual = extractor.preprocess.patch, extractor.card.default_size
        stride = view.stride if view.stride and extractor.overlaps else patch
        if stride not in _strides(extractor):
            known = ", ".join(map(str, _strides(extractor)))
            raise ConfigError(f"expected a stride of {view.model} ({known}), got {stride}")
        given = seen_at(picture, view.size, extractor) if isinstance(usual, int) else usual  # some take one size only
        height, width = fit_size((picture.image.height, picture.image.width), given, patch)
        tokens = PatchGrid.covering((height, width), patch, stride).tokens
        if tokens > MOST_TOKENS:
            raise ConfigError(
                f"expected at most {MOST_TOKENS} tokens, got {tokens} at size {view.size} and stride {stride}; choose "
                "a smaller size or a larger stride"
            )
        return extractor.resized(size=given, stride=stride)


def seen_at(picture: Picture, size: int, extractor: Extractor) -> int | Size:
    """Return the shorter side at which a picture is seen, or (height, width) where it is long and narrow.

    Then its longer side is :data:`LONGEST` times ``size`` at most, and the shorter one as many patches as the model
    needs, even where that gives up the aspect.
    """
    width, height = picture.image.size
    if max(width, height) <= LONGEST * min(width, height):
        return size
    least = extractor.card.patch * (1 if extractor.overlaps else 2)  # what pads by reflection needs more than one cell
    scale = LONGEST * size / max(width, height)
    return max(least, round(scale * height)), max(least, round(scale * width))


def offered(wanted: Sequence[str]) -> tuple[str, ...]:
    """Return the names of models that a demo offers: those that come with the package, and those asked for.

    Raises:
        UnknownModelError: If no model fits a name or pattern.
    """
    known = [card.name for card in list_models() if not card.name.startswith("hyperfeatures:")]
    found = dict.fromkeys(BUNDLED)
    for pattern in (*(wanted or USUAL), default_model()):
        fitting = [name for name in known if fnmatch(name, pattern)]
        if not fitting and pattern == default_model():
            fitting = [pattern]  # timm:…, hf:… or a folder, which whoever began the demo has chosen
        if not fitting:
            raise UnknownModelError(f"expected names or patterns of `vitfeats models`, got {pattern!r}")
        found |= dict.fromkeys(fitting)
    return tuple(found)


def _choices(extractor: Extractor) -> Choices:
    taps = {facet: found for facet in FACETS if (found := _layers(extractor, facet))}
    if "token" in taps:  # of transformers, `out` is the same
        taps.pop("out", None)
    usual = extractor.resolve(Tap.parse(extractor.card.default_tap))
    here = taps.get(usual.facet, ())
    facet = usual.facet if here else next(iter(taps))
    layer = here.index(str(usual)) if str(usual) in here else len(taps[facet]) - 1
    looks = _layers(extractor, "attention") if extractor.card.has_cls else ()
    return Choices(taps, _sizes(extractor), _strides(extractor), looks[-1] if looks else None, (facet, layer))


def _layers(extractor: Extractor, facet: str) -> tuple[str, ...]:
    found: list[str] = []
    for number in range(max(extractor.card.depth, len(extractor.card.layers))):
        try:
            found.append(str(extractor.resolve(Tap(facet, number))))
        except VitFeatsError:
            break
    return tuple(found)


def _sizes(extractor: Extractor) -> tuple[int, ...]:
    usual, patch = extractor.card.default_size, extractor.card.patch
    if isinstance(usual, tuple):  # the only one it takes
        return (min(usual),)
    return tuple(dict.fromkeys(round(usual * times / patch) * patch for times in (1, 1.5, 2)))


def _strides(extractor: Extractor) -> tuple[int, ...]:
    patch = extractor.card.patch
    return tuple(patch // part for part in (1, 2, 4) if patch % part == 0 and (part == 1 or extractor.overlaps))


def _touched(file: str | Path) -> bool:
    """Tell that a file is in use, and so not old; return whether it is there."""
    try:
        os.utime(file)
    except OSError:
        return False
    return True


def _bytes(found: Descriptors) -> float:
    return float(sum(d.features.numel() * d.features.element_size() for d in found.values()))
