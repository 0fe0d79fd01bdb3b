"""The abstract Extractor: everything that does not depend on the kind of network."""

import copy
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from itertools import islice
from typing import Any, TypeVar, overload

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn

from vitfeats.card import ModelCard
from vitfeats.descriptor import Descriptor, Descriptors
from vitfeats.errors import ConfigError, ShapeError, UnknownFacetError
from vitfeats.grid import Frame, PatchGrid, Size
from vitfeats.preprocess import ImageLike, Images, Prepared, Preprocess, is_out_of_memory, load_image
from vitfeats.taps import Reading, Tap

T = TypeVar("T")

Taps = str | Tap | Sequence[str | Tap]

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Extractor(ABC):
    """Reads taps of one network at one size. To support a new kind of network, write :meth:`read` and :meth:`resolve`.

    A subclass is made as ``Kind(model, card, preprocess, dtype=…)``; whatever other keyword settings it takes,
    ``load_extractor`` passes on.

    An extractor holds no state between calls and may be called from several threads at once.

    Attributes:
        model: The network.
        card: What is known about it.
        preprocess: How images become its input; knows size and stride.
        device: Where it runs.
        autocast: The type of automatic mixed precision, or None for full precision.
        frugal: Set True to leave out work inside of a layer too, where no tap needs it. What is read is the same but
            for rounding: a tap then need not have the same bits alone and beside others, which it has without.
    """

    frugal = False

    def __init__(self, model: nn.Module, card: ModelCard, preprocess: Preprocess, dtype: str | torch.dtype) -> None:
        """Take a network that is already on its device."""
        self.model = model
        self.card = card
        self.preprocess = preprocess
        first = next((tensor for tensor in model.parameters()), None)
        self.device = torch.device("cpu") if first is None else first.device
        self._input_dtype = torch.float32 if first is None else first.dtype
        self.autocast = autocast_type(dtype, self.device)
        _refuse_batch_statistics(model)

    @abstractmethod
    def resolve(self, tap: Tap) -> Tap:
        """Return the tap with its layer counted from the start.

        Raises:
            TapError: If the model has no such layer.
            UnknownFacetError: If the model has no such facet.
        """

    @abstractmethod
    def read(self, batch: Prepared, taps: Sequence[Tap]) -> dict[Tap, Reading]:
        """Read different, resolved taps in one forward pass over a prepared batch.

        Called with grad mode and autocast set. Must leave the model as it was, whatever is raised.
        """

    @property
    def overlaps(self) -> bool:
        """Whether tokens may overlap: whether a stride smaller than the patch can be read."""
        return True

    @property
    def differentiable(self) -> bool:
        """Whether gradients reach an image that requires them."""
        return True

    def attention(self, images: Images, layer: int) -> Float[Tensor, "batch heads n n"]:
        """Return the whole attention matrix of a block, prefix tokens first, rows summing to 1, in float32.

        Memory is batch · heads · n² · 4 bytes: 28 MB for one image of 785 tokens and 12 heads.

        Raises:
            UnknownFacetError: If the model has no attention over tokens.
            TapError: If it has no such block.
        """
        raise UnknownFacetError(
            f"expected a model with attention over tokens, got {self.card.name} ({type(self).__name__}); "
            f"it can be read at '{self.card.usual_tap}'"
        )

    @overload
    def __call__(self, images: Images, taps: str | Tap | None = None) -> Descriptor: ...
    @overload
    def __call__(self, images: Images, taps: Sequence[str | Tap]) -> Descriptors: ...
    def __call__(self, images: Images, taps: Taps | None = None) -> Descriptor | Descriptors:
        """Extract one tap, or several in one forward pass that ends at the deepest.

        Args:
            images: One image or a list: paths, PIL images, arrays (height, width, 3), tensors (3, height, width) or
                (batch, 3, height, width) in 0..1. All must come to one network size; else use :meth:`each`.
            taps: ``"key@11"`` gives a Descriptor; a sequence of taps gives Descriptors; None is the card's default.

        Raises:
            ImageError, ShapeError: If the images do not do.
            TapError, UnknownFacetError: If a tap does not exist or does not fire.
        """
        asked = self._resolve_all(taps)
        return self._extract(images, asked, single=not _is_several(taps))

    def describe(self, pixels: Float[Tensor, "batch 3 height width"], taps: Sequence[str | Tap]) -> Descriptors:
        """Extract from pixels as they are: nothing is resized, and values outside 0..1 are taken too.

        For what a network makes on its way to an image; gradients reach it if it requires them.

        Args:
            pixels: Before normalisation, each side a whole number of patches.
            taps: As for a call; at least one.

        Raises:
            ShapeError: If the sides do not fit the patches.
            TapError, UnknownFacetError: If a tap does not exist or does not fire.
        """
        size = (int(pixels.shape[2]), int(pixels.shape[3]))
        grid = PatchGrid.covering(size, self.preprocess.patch, self.preprocess.stride)
        here = self.preprocess.normalise(pixels.to(self.device))
        batch = Prepared(here, grid, (Frame(size, size),) * len(pixels))
        found = self._extract(batch, self._resolve_all(taps), single=False)
        assert isinstance(found, Descriptors)
        return found

    @overload
    def each(
        self, images: Iterable[ImageLike | Prepared], taps: str | Tap | None = None, *, batch_size: int = 8
    ) -> Iterator[Descriptor]: ...
    @overload
    def each(
        self, images: Iterable[ImageLike | Prepared], taps: Sequence[str | Tap], *, batch_size: int = 8
    ) -> Iterator[Descriptors]: ...
    def each(
        self, images: Iterable[ImageLike | Prepared], taps: Taps | None = None, *, batch_size: int = 8
    ) -> Iterator[Descriptor | Descriptors]:
        """Extract images of any sizes; yield one Descriptor (or Descriptors) an image, in the order given.

        Reads ``batch_size`` images at a time, runs those that share a network size together, and holds no more.

        Args:
            images: Any iterable of single images; it is read as it goes. What ``preprocess`` made of single images is
                taken too, so that it can be made in other threads, ahead of the network.
            taps: As for a call.
            batch_size: Most images in one forward pass, at least 1.

        Raises:
            ConfigError: If the batch size is smaller than 1.
            ImageError: At the image that cannot be read; those before its batch have been yielded.
        """
        if batch_size < 1:
            raise ConfigError(f"expected batch_size of at least 1, got {batch_size}")
        if isinstance(images, str | os.PathLike | Image.Image):
            raise ConfigError("expected several images, got one; pass [image], or call the extractor itself")
        asked = self._resolve_all(taps)
        return self._each(iter(images), asked, not _is_several(taps), batch_size)

    def resized(self, *, size: int | Size | None = None, stride: int | None = None) -> "Extractor":
        """Return an extractor of the same network (shared, not copied) at another size or stride.

        Args:
            size: Shorter side in pixels, or (height, width); None keeps it.
            stride: Step between tokens in pixels; None keeps it.

        Raises:
            ShapeError: If the stride does not divide the patch, or the size is smaller than one patch.
        """
        other = copy.copy(self)
        changes = {name: value for name, value in (("size", size), ("stride", stride)) if value is not None}
        other.preprocess = replace(self.preprocess, **changes)
        return other

    def on(self, device: str | torch.device) -> "Extractor":
        """Return an extractor of a copy of the network on another device, of the same precision."""
        other = copy.deepcopy(self)
        other.model.to(device)
        for one in (other, *(value for value in vars(other).values() if isinstance(value, Extractor))):
            one.device = torch.device(device)
        return other

    def __repr__(self) -> str:
        """Say what it is in one line."""
        precision = "float32" if self.autocast is None else f"{str(self.autocast).removeprefix('torch.')} autocast"
        return (
            f"{type(self).__name__}({self.card.name}: size {self.preprocess.size}, stride {self.preprocess.stride}, "
            f"{precision} on {self.device})"
        )

    def _resolve_all(self, taps: Taps | None) -> list[tuple[str, Tap]]:
        several: Sequence[str | Tap]
        several = [self.card.default_tap] if taps is None else [taps] if isinstance(taps, str | Tap) else taps
        if not isinstance(several, Sequence):
            raise ConfigError(f"expected a tap such as 'key@11' or a sequence of taps, got {several!r}")
        if not several:
            raise ConfigError("expected at least one tap, got none; for example 'key@11'")
        return [(str(tap), self.resolve(Tap.parse(tap))) for tap in several]

    def _each(
        self, images: Iterator[ImageLike | Prepared], asked: list[tuple[str, Tap]], single: bool, batch_size: int
    ) -> Iterator[Descriptor | Descriptors]:
        while window := list(islice(images, batch_size)):
            groups: dict[tuple[int, int], list[int]] = {}
            loaded = [image if isinstance(image, Prepared) else load_image(image) for image in window]
            for index, image in enumerate(loaded):
                if isinstance(image, Prepared):
                    size = image.grid.network_size
                else:
                    size = self.preprocess.network_size((int(image.shape[1]), int(image.shape[2])))
                groups.setdefault(size, []).append(index)
            done: dict[int, Descriptor | Descriptors] = {}
            for members in groups.values():
                together = self._extract(self._gathered([loaded[index] for index in members]), asked, single=False)
                assert isinstance(together, Descriptors)
                for position, index in enumerate(members):
                    items = [(text, together[tap][position]) for text, tap in asked]
                    done[index] = items[0][1] if single else Descriptors(items)
            yield from (done[index] for index in range(len(window)))

    def _gathered(self, images: list[Any]) -> Images | Prepared:
        """Return images of one network size as one batch."""
        if not any(isinstance(image, Prepared) for image in images):
            return images
        ready = [image if isinstance(image, Prepared) else self.preprocess(image) for image in images]
        pixels = torch.cat([one.pixels for one in ready]).to(self.device)
        return Prepared(pixels, ready[0].grid, tuple(frame for one in ready for frame in one.frames))

    def _extract(
        self, images: Images | Prepared, asked: list[tuple[str, Tap]], single: bool
    ) -> Descriptor | Descriptors:
        readings, batch = self.run(images, lambda batch: self.read(batch, list(dict.fromkeys(t for _, t in asked))))
        items = [(text, self._descriptor(tap, readings[tap], batch)) for text, tap in asked]
        return items[0][1] if single else Descriptors(items)

    def run(self, images: Images | Prepared, work: Callable[[Prepared], T]) -> tuple[T, Prepared]:
        """Prepare images and call ``work(batch)`` with grad mode and autocast as this extractor wants them.

        What is prepared already is taken as it is.

        The grad mode is on only where an image requires gradients. ``no_grad`` and not ``inference_mode``: what is
        extracted may enter a graph later, as the target of a loss.

        Raises:
            ImageError, ShapeError: If the images do not do, or do not fit in memory.
        """
        batch = None
        try:
            batch = images if isinstance(images, Prepared) else self.preprocess(images, self.device)
            wanted = torch.is_grad_enabled() and batch.pixels.requires_grad
            with torch.set_grad_enabled(wanted), self._precision():
                if self.autocast is None:
                    batch = Prepared(batch.pixels.to(self._input_dtype), batch.grid, batch.frames)
                return work(batch), batch
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            what = f"images at size={self.preprocess.size}" if batch is None else str(batch)
            raise ShapeError(
                f"expected images that fit in the memory of {self.device}, got {what}; lower size= or the number of "
                "images (batch_size= of ex.each), raise stride=, or load with dtype='bfloat16'"
            ) from error

    def _precision(self) -> AbstractContextManager[Any]:
        if self.autocast is None:  # full precision also inside somebody's autocast region
            return torch.autocast(self.device.type, enabled=False)
        return torch.autocast(self.device.type, dtype=self.autocast)

    def _descriptor(self, tap: Tap, reading: Reading, batch: Prepared) -> Descriptor:
        grid = batch.grid if reading.grid is None else reading.grid
        if tap.facet == "cls":  # one token that stands for the whole image
            size = batch.frames[0].network_size
            grid = PatchGrid(1, 1, size, size)
        heads = None if tap.facet == "attention" else self._heads(reading.features.shape[-1])
        frames: tuple[Frame, ...] = batch.frames
        return Descriptor(reading.features, grid, frames, tap, self.card.name, reading.cls, reading.registers, heads)

    def _heads(self, dim: int) -> int | None:
        """Return how many heads share ``dim`` channels: fewer than the card's where heads share their keys."""
        if self.card.heads is None:
            return None
        return dim // (self.card.dim // self.card.heads)


def autocast_type(dtype: str | torch.dtype, device: torch.device) -> torch.dtype | None:
    """Return the autocast type for a ``dtype`` setting: None is full precision.

    Args:
        dtype: "auto" (bfloat16 on a GPU, full precision on a CPU), "float32", "bfloat16", "float16" or a torch type.
        device: Where the model runs.

    Raises:
        ConfigError: If it is none of these.
    """
    if dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else None
    chosen = _DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if chosen not in _DTYPES.values():
        raise ConfigError(f"expected dtype 'auto', 'float32', 'bfloat16' or 'float16', got {dtype!r}")
    return None if chosen == torch.float32 else chosen


def _is_several(taps: Taps | None) -> bool:
    return taps is not None and not isinstance(taps, str | Tap)


def _refuse_batch_statistics(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training:
            raise ConfigError(
                f"expected a model whose features do not depend on the rest of the batch, but '{name}' is a "
                f"{type(module).__name__} in training mode; call model.eval() first"
            )
