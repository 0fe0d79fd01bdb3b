"""From what people have (paths, PIL, arrays, tensors) to what a network takes, with the geometry kept."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from vitfeats.card import RGB
from vitfeats.errors import ImageError, ShapeError
from vitfeats.grid import Frame, PatchGrid, Size, as_size, check_stride, fit_size
from vitfeats.resize import check_interpolation, resize_images

ImageLike = str | os.PathLike[str] | Image.Image | np.ndarray | Tensor
Images = ImageLike | Sequence[ImageLike]

_SLACK = 0.25  # an optimised or resampled image may leave 0..1 a little; a normalised or 8-bit one leaves it by far


@dataclass(frozen=True)
class Prepared:
    """A batch as the network takes it.

    Attributes:
        pixels: (batch, 3, height, width), normalised.
        grid: The token grid that will cover it.
        frames: One frame an image.
    """

    pixels: Float[Tensor, "batch 3 height width"]
    grid: PatchGrid
    frames: tuple[Frame, ...]


@dataclass(frozen=True)
class Preprocess:
    """Resize and normalise images for one model at one size.

    Attributes:
        size: Shorter side in pixels, or (height, width); each side is snapped to the nearest patch multiple.
        patch: Patch size in pixels.
        stride: Step between tokens in pixels; divides the patch.
        mean: Per-channel mean.
        std: Per-channel standard deviation.
        interpolation: "bicubic" or "bilinear"; always antialiased.

    Raises:
        ConfigError: If the interpolation is none of the two.
        ShapeError: If the stride does not divide the patch, or the size is smaller than one patch.
    """

    size: int | Size
    patch: int
    stride: int
    mean: RGB
    std: RGB
    interpolation: str = "bicubic"

    def __post_init__(self) -> None:
        """Refuse a stride or a size that no image could satisfy."""
        check_interpolation(self.interpolation)
        object.__setattr__(self, "size", as_size(self.size))
        check_stride(self.patch, self.stride)
        fit_size((self.patch, self.patch), self.size, self.patch)

    def network_size(self, source: Size) -> Size:
        """Return the network (height, width) for a source image of (height, width)."""
        return fit_size(source, self.size, self.patch)

    def __call__(self, images: Images, device: torch.device | str = "cpu") -> Prepared:
        """Prepare one image, a batch, or a list whose images share one network size.

        Raises:
            ImageError: If an image cannot be read or is not RGB in 0..1.
            ShapeError: If the images need different network sizes, or there is none.
        """
        loaded = load_images(images)
        sizes = [(int(image.shape[-2]), int(image.shape[-1])) for image in loaded]
        network = [self.network_size(size) for size in sizes]
        if len(set(network)) > 1:
            other = next(size for size in network if size != network[0])
            raise ShapeError(
                f"expected images that share one network size, got {network[0]} and {other} (height, width); "
                f"pass size=(h, w) to load_extractor, for example size={network[0]}, or use ex.each for mixed sizes"
            )
        # One resize for images of one source size; a float batch keeps its graph.
        if len(set(sizes)) == 1:
            pixels = resize_images(torch.stack([image.to(device) for image in loaded]), network[0], self.interpolation)
        else:
            pixels = torch.cat([resize_images(i[None].to(device), network[0], self.interpolation) for i in loaded])
        frames = tuple(Frame(size, network[0]) for size in sizes)
        return Prepared(self.normalise(pixels), PatchGrid.covering(network[0], self.patch, self.stride), frames)

    def normalise(self, pixels: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch 3 height width"]:
        """Take off the mean and divide by the standard deviation."""
        mean, std = (pixels.new_tensor(values)[:, None, None] for values in (self.mean, self.std))
        return (pixels - mean).div_(std)  # in place on the new tensor: one allocation less


def load_images(images: Images) -> list[Float[Tensor, "3 height width"]]:
    """Return the images as float32 tensors (3, height, width) in 0..1, each at its own size.

    Raises:
        ImageError: If one cannot be read or is not RGB in 0..1; the message says which.
        ShapeError: If there is none.
    """
    if isinstance(images, Tensor | np.ndarray) and images.ndim == 4:
        items: Sequence[Any] = list(images)
    elif isinstance(images, list | tuple):
        items = images
    else:
        items = [images]
    if not items:
        raise ShapeError("expected at least one image, got none")
    return [image for item in items for image in _load(item)]


def load_image(image: ImageLike) -> Float[Tensor, "3 height width"]:
    """Return one image as a float32 tensor (3, height, width) in 0..1.

    Args:
        image: A path (the EXIF rotation is applied, the alpha channel dropped), a PIL image, an array (height, width,
            3) of uint8 or of floats in 0..1, or a tensor (3, height, width) of floats in 0..1 or of uint8.

    Raises:
        ImageError: If it cannot be read or is not RGB in 0..1.
    """
    if isinstance(image, str | os.PathLike):
        return _from_pil(_open(image))
    if isinstance(image, Image.Image):
        return _from_pil(image)
    if isinstance(image, np.ndarray):
        return _checked(_channels_first(image))
    if isinstance(image, Tensor):
        if image.ndim != 3 or image.shape[0] != 3:
            raise ImageError(_channels_message("a tensor (3, height, width)", tuple(image.shape), 0))
        return _checked(image)
    raise ImageError(
        f"expected a path, a PIL image, an array (height, width, 3) or a tensor (3, height, width), "
        f"got {type(image).__name__}"
    )


def to_pil(image: Float[Tensor, "3 height width"]) -> Image.Image:
    """Return a tensor (3, height, width) in 0..1 as a PIL image; values outside are clamped."""
    pixels = (image.detach().float().clamp(0, 1) * 255).round().to("cpu", torch.uint8)
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())


def _load(item: Any) -> Iterator[Float[Tensor, "3 height width"]]:
    if isinstance(item, Tensor) and item.ndim == 4:  # a list of batches
        yield from (load_image(image) for image in item)
    else:
        yield load_image(item)


def _opened(path: str | os.PathLike[str]) -> Image.Image:
    name = os.fspath(path)
    if os.path.isdir(name):
        raise ImageError(f"expected an image file, got the folder '{name}'; pass its files one by one to ex.each")
    if not os.path.exists(name):
        raise ImageError(f"expected an image file, but there is none at '{name}'")
    if os.path.getsize(name) == 0:
        raise ImageError(f"expected an image, got an empty file: '{name}'")
    try:
        return Image.open(name)
    except UnidentifiedImageError as error:
        raise ImageError(f"expected an image, but '{name}' is not one that Pillow can read") from error
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ImageError(f"expected a readable image, but '{name}' could not be opened: {error}") from error


def _open(path: str | os.PathLike[str]) -> Image.Image:
    with _opened(path) as image:
        try:
            image.load()
            return ImageOps.exif_transpose(image)
        except Exception as error:  # each of Pillow's decoders has its own way to fail
            raise ImageError(
                f"expected a whole image, but '{os.fspath(path)}' breaks off or is damaged: {error}"
            ) from error


def _from_pil(image: Image.Image) -> Float[Tensor, "3 height width"]:
    if image.mode.startswith(("I", "F")):  # Pillow would cut their values off at 255 without a word
        raise ImageError(
            f"expected a picture of 8 bits a channel, got Pillow's mode {image.mode!r}; pass an array "
            "(height, width, 3) of floats in 0..1 instead"
        )
    try:
        array = np.asarray(image.convert("RGB"))
    except (OSError, ValueError, SyntaxError) as error:  # Pillow reads lazily: the file may break off only here
        raise ImageError(f"expected a whole image, but the PIL image breaks off or is damaged: {error}") from error
    return _checked(array.transpose(2, 0, 1))


def _channels_first(array: np.ndarray) -> np.ndarray:
    if array.ndim != 3 or array.shape[2] != 3:
        raise ImageError(_channels_message("an array (height, width, 3)", array.shape, 2))
    return array.transpose(2, 0, 1)


def _channels_message(expected: str, shape: tuple[int, ...], axis: int) -> str:
    message = f"expected {expected} with 3 channels, got shape {shape}"
    if len(shape) == 2:
        return f"{message}; repeat a grey image over 3 channels"
    if len(shape) == 3 and shape[axis] in (1, 4):
        return f"{message}; {'repeat the grey channel 3 times' if shape[axis] == 1 else 'drop the alpha channel'}"
    if len(shape) == 3 and shape[2 - axis] == 3:
        return f"{message}; the channels are on the other end: move them"
    return message


def _as_tensor(pixels: np.ndarray) -> Tensor:
    try:
        return torch.from_numpy(np.array(pixels, dtype=pixels.dtype.newbyteorder("="), order="C"))
    except TypeError as error:
        raise ImageError(
            f"expected uint8 in 0..255 or floats in 0..1, got {pixels.dtype}; convert the image"
        ) from error


def _checked(pixels: np.ndarray | Tensor) -> Float[Tensor, "3 height width"]:
    tensor = _as_tensor(pixels) if isinstance(pixels, np.ndarray) else pixels
    if min(tensor.shape[1:]) < 1:
        raise ImageError(f"expected an image of at least 1×1 pixel, got shape {tuple(tensor.shape)}")
    if tensor.dtype == torch.uint8:
        return tensor.float() / 255
    if not tensor.is_floating_point():
        raise ImageError(f"expected uint8 in 0..255 or floats in 0..1, got {tensor.dtype}; convert the image")
    low, high = (float(value) for value in tensor.detach().aminmax())
    if not (np.isfinite(low) and np.isfinite(high)):
        raise ImageError("expected finite values in 0..1, got NaN or infinity")
    if low < -_SLACK or high > 1 + _SLACK:
        normalised = low < -_SLACK
        cause = "pass the image before normalisation; vitfeats normalises it" if normalised else "divide by 255"
        raise ImageError(f"expected values in 0..1, got {low:.3g}..{high:.3g}; {cause}")
    return tensor.float()
