"""Painting images in the style of others: stylize."""

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from vitfeats.apps.evaluation.colours import match_colours
from vitfeats.apps.style_transfer.stylizer import CELL, SHORTEST, Stylizer, kept_stylizer, load_stylizer
from vitfeats.configs import StyleMethod
from vitfeats.errors import ConfigError, ShapeError
from vitfeats.extractors.base import Extractor
from vitfeats.grid import fit_size
from vitfeats.nets.stylizing import Style
from vitfeats.preprocess import ImageLike, is_out_of_memory, load_image, to_pil
from vitfeats.resize import resize_images
from vitfeats.runs import save_image

Mask = Tensor | np.ndarray
"""Labels (height, width) over an image: booleans or whole numbers."""

LARGEST_STYLE = 512
"""Shorter side in pixels that larger styles are brought to."""


@dataclass(frozen=True, eq=False)
class Stylized:
    """A picture that was made.

    Attributes:
        tensor: (3, height, width) in 0..1, on the CPU.
    """

    tensor: Float[Tensor, "3 height width"]

    def __repr__(self) -> str:
        """Say what it is in one line."""
        return f"Stylized({self.tensor.shape[2]}×{self.tensor.shape[1]})"

    @property
    def image(self) -> Image.Image:
        """The picture as a PIL image."""
        return to_pil(self.tensor)

    def recoloured(self, image: ImageLike) -> "Stylized":
        """Return the picture with the mean and deviation of another image's colours, in CIELAB.

        The content's keep its colours (Gatys et al., Preserving Color in Neural Artistic Style Transfer, 2016, by
        luminance or histograms); the style's help where a network met them roughly.

        Raises:
            ImageError: If the image cannot be read.
        """
        return Stylized(match_colours(self.tensor, image))

    def save(self, path: Path | str) -> Path:
        """Write the picture, whole or not at all; return the path.

        Raises:
            StoreError: If it cannot be written.
        """
        return save_image(self.image, path)


def stylize(
    content: ImageLike,
    style: ImageLike | Sequence[ImageLike],
    *,
    method: StyleMethod | None = None,
    stylizer: Stylizer | None = None,
    encoder: str | Extractor | None = None,
    checkpoint: Path | str | None = None,
    strength: float = 1.0,
    weights: Sequence[float] | None = None,
    masks: tuple[Mask, Sequence[Mask | int]] | None = None,
    size: int | None = None,
    style_size: int | None = None,
    most: int | None = 4096,
    seed: int = 0,
    device: str = "auto",
) -> Stylized:
    """Paint an image in the style of another, in one pass of a network that was trained for any style.

    Args:
        content: What is painted.
        style: How; several are blended by ``weights``, or placed by ``masks``.
        method: "adaattn" (Liu et al., ICCV 2021), "sanet" (Park and Lee, CVPR 2019) or "adain" (Huang and Belongie,
            ICCV 2017). None is what ``checkpoint`` holds, else "adaattn".
        stylizer: One that is loaded already, in place of method, encoder, checkpoint and device.
        encoder: As for :func:`~vitfeats.apps.style_transfer.load_stylizer`; so are checkpoint and device.
        checkpoint: Weights; None takes those that come with the package, for ``vgg_mini``.
        strength: 0 to 1: from the content as the network returns it to the full style.
        weights: A share for each of several styles; None is equal ones.
        masks: Labels over the content, and for each style labels over it, or one label for all of it: each region of
            the content takes its style from the regions of the same label, or from everywhere where there are none.
        size: Shorter side that the content is brought to; None is its own, which any is.
        style_size: Shorter side that styles are brought to, 32 at least; None is their own, from 32 to 512. It sets the
            scale of the strokes.
        most: Positions of each style that attention looks at, at each level, drawn at random; None is all of them.
        seed: Of that draw.
        device: Where it runs.

    Returns:
        The picture, of the content's size.

    Raises:
        ImageError: If an image cannot be read.
        ShapeError: If an image is too small, a mask is not of its image's size, or memory does not hold it.
        ConfigError: If settings contradict each other.
        WeightsUnavailableError: If weights are missing or damaged.
    """
    image = _sized(load_image(content), size)
    painter = _Painter(
        _stylizer(method, stylizer, encoder, checkpoint, device), style, weights, masks, style_size, most, seed
    )
    regions = None if masks is None else _labels(masks[0], load_image(content), "the content")[None]
    return painter.paint(image[None], strength, regions)[0]


def stylize_each(
    contents: Iterable[ImageLike],
    style: ImageLike | Sequence[ImageLike],
    *,
    batch_size: int = 1,
    strength: float = 1.0,
    size: int | None = None,
    method: StyleMethod | None = None,
    stylizer: Stylizer | None = None,
    encoder: str | Extractor | None = None,
    checkpoint: Path | str | None = None,
    weights: Sequence[float] | None = None,
    style_size: int | None = None,
    most: int | None = 4096,
    seed: int = 0,
    device: str = "auto",
) -> Iterator[Stylized]:
    """Paint many images, such as the frames of a film, in one style; yield them in order. Styles are read once.

    Args:
        contents: Any iterable of images of any sizes; it is read as it goes.
        style: As for :func:`stylize`; so are the others.
        batch_size: Images of one size that run together.
        strength: 0 to 1.
        size: Shorter side of the contents.
        method: Of style transfer.
        stylizer: One that is loaded already.
        encoder: What reads the maps.
        checkpoint: Weights.
        weights: A share for each of several styles.
        style_size: Shorter side of the styles.
        most: Positions of each style; the same ones for every image.
        seed: Of their draw.
        device: Where it runs.

    Raises:
        ConfigError: If the batch size is below 1, or there is one image in place of several; and as :func:`stylize`.
        ImageError, ShapeError: At the image that does not do; those before its batch have been yielded.
    """
    if batch_size < 1:
        raise ConfigError(f"expected batch_size of at least 1, got {batch_size}")
    if isinstance(contents, str | os.PathLike | Image.Image):
        raise ConfigError("expected several images, got one; pass [image], or call stylize")
    loaded = _stylizer(method, stylizer, encoder, checkpoint, device)
    painter = _Painter(loaded, style, weights, None, style_size, most, seed)
    return _painted(iter(contents), painter, batch_size, strength, size)


def _painted(
    contents: Iterator[ImageLike], painter: "_Painter", batch_size: int, strength: float, size: int | None
) -> Iterator[Stylized]:
    while window := list(islice(contents, batch_size)):
        images = [_sized(load_image(image), size) for image in window]
        alike = len({tuple(image.shape) for image in images}) == 1
        for batch in [torch.stack(images)] if alike else [image[None] for image in images]:
            yield from painter.paint(batch, strength)


class _Painter:
    """A stylizer with its styles read."""

    def __init__(
        self,
        stylizer: Stylizer,
        style: ImageLike | Sequence[ImageLike],
        weights: Sequence[float] | None,
        masks: tuple[Mask, Sequence[Mask | int]] | None,
        style_size: int | None,
        most: int | None,
        seed: int,
    ) -> None:
        self.stylizer, self.most, self.seed = stylizer, most, seed
        given: list[Any] = list(style) if isinstance(style, list | tuple) else [style]
        if not given:
            raise ConfigError("expected at least one style, got none")
        shares = [1.0] * len(given) if weights is None else list(weights)
        if len(shares) != len(given):
            raise ConfigError(f"expected a weight for each of {len(given)} styles, got {len(shares)}")
        marks: list[Any] = [None] * len(given)
        if masks is not None:
            if len(masks) != 2 or len(masks[1]) != len(given):
                raise ConfigError(f"expected masks=(of the content, [one of each of {len(given)} styles])")
            marks = list(masks[1])
        self.styles = [self._read(*each, style_size) for each in zip(given, shares, marks, strict=True)]

    def _read(self, image: ImageLike, weight: float, mask: Any, size: int | None) -> Style:
        loaded = load_image(image)
        short = min(loaded.shape[1:])
        if short < CELL:
            raise ShapeError(f"expected a style of at least {CELL}×{CELL} pixels, got {_told(loaded)}; enlarge it")
        if size is not None and size < SHORTEST:
            raise ShapeError(f"expected a style_size of at least {SHORTEST} pixels, got {size}")
        own = max(SHORTEST, min(short, LARGEST_STYLE))
        wanted = fit_size((loaded.shape[1], loaded.shape[2]), size or own, CELL)
        labels: Tensor | int | None = mask
        if mask is not None:  # True is the label 1
            labels = int(mask) if isinstance(mask, int) else _labels(mask, loaded, "the style")[None]
        pixels = resize_images(loaded[None].to(self.stylizer.device), wanted)
        with torch.no_grad(), _in_memory(f"a style of {wanted[0]}×{wanted[1]} pixels"):
            return Style(self.stylizer.maps(pixels), float(weight), labels)

    def paint(
        self, images: Float[Tensor, "batch 3 height width"], strength: float, regions: Tensor | None = None
    ) -> list[Stylized]:
        """Return each of the images in the styles."""
        source = torch.Generator().manual_seed(self.seed)
        many = "1 image" if len(images) == 1 else f"{len(images)} images"
        told = f"{many} of {images.shape[2]}×{images.shape[3]} pixels"
        with torch.no_grad(), _in_memory(told):
            made = self.stylizer(
                images, self.styles, strength=strength, regions=regions, most=self.most, generator=source
            )
        return [Stylized(one) for one in made.float().cpu()]


class _in_memory:  # noqa: N801 - a context manager, used as a function
    """Say what to lower where memory does not hold it."""

    def __init__(self, what: str) -> None:
        self.what = what

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: Any, _trace: Any) -> None:
        # The encoder has said it in its own words already, with other settings to lower.
        reason = error.__cause__ if isinstance(error, ShapeError) else error
        if isinstance(reason, Exception) and is_out_of_memory(reason):
            raise ShapeError(
                f"expected images that fit in memory, got {self.what}; lower size=, style_size=, most= or batch_size="
            ) from reason


def _stylizer(
    method: StyleMethod | None,
    stylizer: Stylizer | None,
    encoder: str | Extractor | None,
    checkpoint: Path | str | None,
    device: str,
) -> Stylizer:
    if stylizer is not None:
        if (method, encoder, checkpoint) != (None, None, None):
            raise ConfigError("expected stylizer= alone, got it with method=, encoder= or checkpoint=")
        return stylizer
    if isinstance(encoder, Extractor):
        return load_stylizer(method, encoder=encoder, checkpoint=checkpoint, device=device)
    return kept_stylizer(method, encoder, None if checkpoint is None else str(checkpoint), device)


def _sized(image: Float[Tensor, "3 height width"], size: int | None) -> Float[Tensor, "3 new_height new_width"]:
    if size is None:
        return image
    if size < CELL:
        raise ShapeError(f"expected a size of at least {CELL} pixels, got {size}")
    return resize_images(image[None], fit_size((image.shape[1], image.shape[2]), size, 1))[0]


def _labels(mask: Any, image: Tensor, what: str) -> Tensor:
    """Return a mask as whole numbers, if it is one of the image's size."""
    labels = mask if isinstance(mask, Tensor) else torch.from_numpy(np.array(mask))  # a copy: some are read-only
    if labels.is_floating_point() or labels.is_complex() or tuple(labels.shape) != tuple(image.shape[1:]):
        raise ShapeError(
            f"expected a mask of {what} as labels (height, width) of its size {_told(image)}, booleans or whole "
            f"numbers, got {tuple(labels.shape)} of {str(labels.dtype).removeprefix('torch.')}"
        )
    return labels.long()


def _told(image: Tensor) -> str:
    return f"{image.shape[1]}×{image.shape[2]}"
