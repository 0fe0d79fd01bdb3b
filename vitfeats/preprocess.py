"""From what people have (paths, PIL, arrays, tensors) to what a network takes, with the geometry kept."""

import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image, ImageChops, ImageOps, UnidentifiedImageError
from torch import Tensor

from vitfeats.card import RGB
from vitfeats.errors import ImageError, ShapeError
from vitfeats.grid import Frame, PatchGrid, Size, as_size, check_stride, fit_size
from vitfeats.resize import check_interpolation, resize_images

ImageLike = str | os.PathLike[str] | Image.Image | np.ndarray | Tensor
Images = ImageLike | Sequence[ImageLike]

_SLACK = 0.25  # an optimised or resampled image may leave 0..1 a little; a normalised or 8-bit one leaves it by far
_MOST_PIXELS = 2**24  # 4096 × 4096: 200 MB as floats, and 65 536 tokens of 16 × 16; no model is used at more
_WHITE = 65535  # of a picture of 16 bits
_TIFF_BITS, _TIFF_BLACK, _TIFF_KIND = 258, 262, 339  # tags
# (bits, sample format) of the deep grey TIFFs that Pillow reads at their scale; those of 12 bits it takes for 16.
_TIFF_READ_RIGHT = {(16, 1), (32, 1), (32, 2), (32, 3)}


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

    def __str__(self) -> str:
        """Say how much it is: images, tokens and pixels."""
        images = f"{len(self.frames)} image{'s' if len(self.frames) > 1 else ''}"
        return f"{images} of {self.grid.tokens} tokens each (network size {self.grid.network_size})"


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
        """Return the network (height, width) for a source image of (height, width).

        Raises:
            ShapeError: If the shorter side is given, and the image is so long that its network image would have more
                than 2²⁴ pixels. A size (height, width) is taken at its word.
        """
        height, width = network = fit_size(source, self.size, self.patch)
        if isinstance(self.size, int) and height * width > _MOST_PIXELS:
            tokens = PatchGrid.covering(network, self.patch, self.stride).tokens
            short, long = self.size, min(2 * self.size, max(network))
            raise ShapeError(
                f"expected an image that comes to at most {_MOST_PIXELS} network pixels, got {source[0]}×{source[1]} "
                f"pixels, which size={self.size} makes a network size of {network} with {tokens} tokens; pass "
                f"size=(h, w), for example size={(long, short) if height > width else (short, long)}, or crop the image"
            )
        return network

    def __call__(self, images: Images, device: torch.device | str = "cpu") -> Prepared:
        """Prepare one image, a batch, or a list whose images share one network size.

        Raises:
            ImageError: If an image cannot be read or is not RGB in 0..1.
            ShapeError: If the images need different network sizes, one is too long for the size, or there is none.
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

    Pictures (files and PIL images) of every mode become RGB:

    - The EXIF rotation is applied, to a PIL image too, so that ``Image.open(path)`` gives what ``path`` gives. A
      picture that was turned by hand must not carry the tag any more.
    - Alpha is dropped, that of a palette too: the colours below it stay, whatever they are. Colour profiles are not
      applied.
    - 16 bits of grey are divided by 65535; colours of 16 bits are read as 8 by Pillow. Grey floats must be in 0..1.
    - Of an animation, or of several pages, a path gives the first picture, a PIL image the one it stands at.

    Args:
        image: A path of a regular file, a PIL image, an array (height, width, 3) of uint8 or of floats in 0..1, or a
            tensor (3, height, width) of floats in 0..1 or of uint8. Arrays of 16 bits are refused: nothing says which
            of their values is white (65535, or 4095 of a camera), as the format of a file does.

    Raises:
        ImageError: If it cannot be read or is not RGB in 0..1.
    """
    if isinstance(image, str | os.PathLike):
        with _opened(image) as picture:
            return _from_pil(picture, _shown(image))
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


def is_out_of_memory(error: Exception) -> bool:
    """Return whether an error says that memory ran out: Python's, numpy's, torch's on any device."""
    # Each allocator has its own words; only those of a GPU have a class of their own, and not all of them.
    told = (
        "DefaultCPUAllocator",
        *("CUDA out of memory", "HIP out of memory", "MPS backend out of memory", "XPU out of memory"),
        *("CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED"),
    )
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in told)
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


def _shown(path: str | os.PathLike[str]) -> str:
    # A name that is no text in this locale must not break the terminal that prints the message.
    return f"'{os.fsdecode(path)}'".encode("utf-8", "backslashreplace").decode()


def _check_file(path: str | os.PathLike[str]) -> None:
    """Refuse what is no regular file: opening a pipe waits for its writer, and a device may never end."""
    name = _shown(path)
    try:
        found = os.stat(path)
    except (FileNotFoundError, NotADirectoryError, ValueError) as error:  # ValueError: a zero byte in the name
        raise ImageError(f"expected an image file, but there is none at {name}") from error
    except OSError as error:
        raise ImageError(f"expected a readable image, but {name} could not be opened: {error}") from error
    if stat.S_ISDIR(found.st_mode):
        raise ImageError(f"expected an image file, got the folder {name}; pass its files one by one to ex.each")
    if not stat.S_ISREG(found.st_mode):
        raise ImageError(
            f"expected an image file, but {name} is a pipe, a socket or a device; read it yourself and pass a PIL image"
        )
    if found.st_size == 0:
        raise ImageError(f"expected an image, got an empty file: {name}")


def _opened(path: str | os.PathLike[str]) -> Image.Image:
    _check_file(path)
    name = _shown(path)
    try:
        image = Image.open(path)
    except UnidentifiedImageError as error:
        raise ImageError(f"expected an image, but {name} is not one that Pillow can read") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:  # the warning, made an error
        raise ImageError(_too_large(name, error)) from error
    except Exception as error:  # each of Pillow's readers has its own way to fail
        raise ImageError(f"expected a readable image, but {name} could not be opened: {error}") from error
    if image.format == "EPS":
        image.close()
        raise ImageError(f"expected a picture, but {name} is a PostScript program, which may never end; pass it as PNG")
    return image


def _too_large(name: str, error: Exception) -> str:
    return (
        f"expected an image within Pillow's limit, but {name} claims more pixels ({error}); where you trust the file, "
        "raise PIL.Image.MAX_IMAGE_PIXELS"
    )


def _from_pil(image: Image.Image, name: str = "the PIL image") -> Float[Tensor, "3 height width"]:
    try:
        check_whole_tiff(image)
        image.load()
        return _checked(_pixels(image))
    except ImageError:
        raise
    except Image.DecompressionBombError as error:  # of a picture inside the file
        raise ImageError(_too_large(name, error)) from error
    except Exception as error:  # Pillow reads lazily, and each of its decoders has its own way to fail
        if is_out_of_memory(error):
            size = f"{image.width}×{image.height}"
            raise ImageError(
                f"expected an image that fits in memory, but {name} has {size} pixels; shrink it"
            ) from error
        raise ImageError(f"expected a whole image, but {name} breaks off or is damaged: {error}") from error


def check_whole_tiff(image: Image.Image) -> None:
    """Refuse a TIFF that has fewer strips than rows: Pillow would leave the rest black without a word."""
    if image.format != "TIFF" or not getattr(image, "tile", None):  # read already
        return
    right, bottom = (max(part[1][side] for part in image.tile) for side in (2, 3))  # type: ignore[attr-defined]
    if right * bottom < image.width * image.height:  # areas: a turned file has its sides the other way round
        raise OSError(f"it has {right * bottom} of {image.width * image.height} pixels")


def _pixels(image: Image.Image) -> np.ndarray:
    """Return a picture, upright, as (3, height, width): uint8, or float32 in 0..1 where it has more than 8 bits."""
    upright = ImageOps.exif_transpose(image)  # a copy, with or without a rotation
    if image.mode.startswith(("I", "F")):  # Pillow would cut their values off at 255 without a word
        _check_deep_tiff(image)
        grey = _deep_grey(upright)
        return np.broadcast_to(grey, (3, *grey.shape))
    if image.format == "JPEG" and image.mode == "CMYK" and "adobe" not in image.info:
        upright = ImageChops.invert(upright)  # Pillow takes every one for Adobe's, whose ink is written as its lack
    upright.info.pop("transparency", None)  # for a palette's, Pillow warns that it is lost
    if image.mode == "La":
        upright = upright.convert("LA")  # the only way from it to RGB
    return np.asarray(upright.convert("RGB")).transpose(2, 0, 1)


def _deep_grey(image: Image.Image) -> np.ndarray:
    values = np.asarray(image)
    if image.mode == "F":
        return values
    low, high = int(values.min(initial=0)), int(values.max(initial=0))
    # Mode I has 32 bits and no white of its own: up to 255 it may as well be a picture of 8 bits.
    if low < 0 or high > _WHITE or (image.mode == "I" and 0 < high <= 255):
        raise ImageError(
            f"expected a picture of 8 or 16 bits a channel, got Pillow's mode {image.mode!r} with values "
            f"{low}..{high}; divide by the value that is white and pass an array (height, width, 3) of floats in 0..1"
        )
    return values.astype(np.float32) / _WHITE


def _check_deep_tiff(image: Image.Image) -> None:
    tags = getattr(image, "tag_v2", None)
    if tags is None:
        return
    bits, kind, inverted = tags.get(_TIFF_BITS, (1,))[0], tags.get(_TIFF_KIND, (1,))[0], tags.get(_TIFF_BLACK) == 0
    if inverted or (bits, kind) not in _TIFF_READ_RIGHT:
        what = "0 is white" if inverted else f"numbers have {bits} bits" + (" and a sign" if kind == 2 else "")
        raise ImageError(
            f"expected a grey TIFF of 16 bits without a sign in which 0 is black, got one whose {what}; read it "
            "yourself and pass an array (height, width, 3) of floats in 0..1"
        )


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
        # Of bytes a copy in their own layout; torch changes layout and type together, which takes a third of the time.
        order = "K" if pixels.dtype == np.uint8 else "C"
        return torch.from_numpy(np.array(pixels, dtype=pixels.dtype.newbyteorder("="), order=order))
    except TypeError as error:
        raise ImageError(_numbers_message(pixels.dtype, pixels.dtype.kind in "iu")) from error


def _numbers_message(dtype: object, counts: bool) -> str:
    cure = "divide the image by the value that is white, 255 or 65535" if counts else "convert the image to floats"
    return f"expected uint8 in 0..255 or floats in 0..1, got {dtype}; {cure}"


def _checked(pixels: np.ndarray | Tensor) -> Float[Tensor, "3 height width"]:
    tensor = _as_tensor(pixels) if isinstance(pixels, np.ndarray) else pixels
    if min(tensor.shape[1:]) < 1:
        raise ImageError(f"expected an image of at least 1×1 pixel, got shape {tuple(tensor.shape)}")
    if tensor.dtype == torch.uint8:
        return tensor.to(torch.float32, memory_format=torch.contiguous_format).div_(
            255
        )  # in place on the new tensor: a large picture fits twice as often
    if not tensor.is_floating_point():
        raise ImageError(_numbers_message(tensor.dtype, tensor.dtype != torch.bool and not tensor.is_complex()))
    low, high = (float(value) for value in tensor.detach().float().aminmax())
    if not (np.isfinite(low) and np.isfinite(high)):
        raise ImageError("expected finite values in 0..1, got NaN or infinity")
    if low < -_SLACK or high > 1 + _SLACK:
        white = 255 if high <= 255 * (1 + _SLACK) else "the value that is white"
        normalised = low < -_SLACK
        cause = "pass the image before normalisation; vitfeats normalises it" if normalised else f"divide by {white}"
        raise ImageError(f"expected values in 0..1, got {low:.3g}..{high:.3g}; {cause}")
    return tensor.float()
