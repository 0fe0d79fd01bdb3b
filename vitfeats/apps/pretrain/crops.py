"""Random crops of many pictures at once, on the device, which remember where they were taken.

All geometry is one affine map a crop, so a crop is one read of the picture: turned, mirrored and resized together.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

_FINER = 2  # a crop is read at so many times its resolution and averaged: most crops reduce the picture
_BLUR = (0.1, 2.0)  # standard deviation in pixels
_GREY = (0.299, 0.587, 0.114)
_JITTER = (0.4, 0.4, 0.2, 0.1)  # brightness, contrast, saturation (factors 1 ± x), hue (± x turns), as in DINO
_RATIO = (3 / 4, 4 / 3)


@dataclass(frozen=True)
class Batch:
    """Pictures of different sizes on one canvas, in its upper left corner.

    Attributes:
        canvas: (batch, 3, height, width) of type uint8.
        sizes: (batch, 2), (width, height) of each picture in pixels.
    """

    canvas: Tensor
    sizes: Float[Tensor, "batch 2"]

    @classmethod
    def of(cls, pictures: Sequence[np.ndarray], device: torch.device) -> "Batch":
        """Lay pictures, (height, width, 3) of type uint8 each, on a canvas that holds all of them."""
        height, width = (max(picture.shape[axis] for picture in pictures) for axis in (0, 1))
        canvas = np.zeros((len(pictures), height, width, 3), np.uint8)
        for number, picture in enumerate(pictures):
            canvas[number, : picture.shape[0], : picture.shape[1]] = picture
        sizes = torch.tensor([[picture.shape[1], picture.shape[0]] for picture in pictures], dtype=torch.float32)
        return cls(torch.from_numpy(canvas).to(device).permute(0, 3, 1, 2), sizes.to(device))


@dataclass(frozen=True)
class Crops:
    """One crop of each picture.

    Attributes:
        images: In 0..1.
        placed: Affine maps from a crop's coordinates, -1..1 from edge to edge, to pixels of its picture.
    """

    images: Float[Tensor, "batch 3 side side"]
    placed: Float[Tensor, "batch 2 3"]

    def place_in(self, other: "Crops", grid: int) -> tuple[Float[Tensor, "b n 2"], Bool[Tensor, "b n"]]:
        """Return where the patches of these crops are in others of the same pictures.

        Args:
            other: The other crops.
            grid: Patches on a side.

        Returns:
            The other crops' coordinates of the centre of every patch, row by row, and whether it lies inside.
        """
        steps = (torch.arange(grid, device=self.placed.device) + 0.5) / grid * 2 - 1
        y, x = torch.meshgrid(steps, steps, indexing="ij")
        here = torch.stack([x.flatten(), y.flatten()], 1).expand(len(self.placed), -1, -1)
        # Products in half precision would be wrong by a pixel.
        with torch.autocast(self.placed.device.type, enabled=False):
            pixels = here @ self.placed[:, :, :2].mT + self.placed[:, None, :, 2]
            back = torch.linalg.inv(other.placed[:, :, :2])
            there = (pixels - other.placed[:, None, :, 2]) @ back.mT
        return there, (there.abs() <= 1 - 1 / grid).all(-1)  # half a patch from the edge: there are tokens around it


def draw_crops(
    batch: Batch,
    side: int,
    *,
    scale: tuple[float, float],
    turn: float,
    flip: float,
    colour: float,
    blur: float,
    solarise: float,
    generator: torch.Generator,
) -> Crops:
    """Draw one crop of each picture, its colours changed.

    Args:
        batch: The pictures.
        side: Of the crops in pixels.
        scale: Smallest and largest share of the picture's area.
        turn: Largest angle in degrees, either way; what then lies outside is the picture mirrored at its edge.
        flip: Probability that it is mirrored.
        colour: How much its colours are changed: what DINO changes them by is multiplied by it.
        blur: Probability that it is blurred.
        solarise: Probability that values above a half are turned round.
        generator: Source of all that is random, on the CPU: the same crops on every device.
    """
    placed = _placed(batch.sizes.cpu(), scale, turn, flip, generator).to(batch.sizes.device)
    images = _read(batch, placed, side)
    return Crops(_coloured(images, colour, blur, solarise, generator), placed)


def middle_crops(batch: Batch, side: int) -> Float[Tensor, "batch 3 side side"]:
    """Return the largest square in the middle of each picture, its colours unchanged, in 0..1."""
    half = batch.sizes.amin(1) / 2
    linear = torch.diag_embed(half[:, None].expand(-1, 2))
    return _read(batch, torch.cat([linear, batch.sizes[:, :, None] / 2], 2), side)


def _placed(
    sizes: Float[Tensor, "b 2"], scale: tuple[float, float], turn: float, flip: float, generator: torch.Generator
) -> Float[Tensor, "b 2 3"]:
    share, ratio, angle, across, down, mirrored = torch.rand(6, len(sizes), generator=generator)
    area = (scale[0] + (scale[1] - scale[0]) * share) * sizes.prod(1)
    low, high = (math.log(limit) for limit in _RATIO)
    stretch = (low + (high - low) * ratio).exp()
    extent = torch.stack([(area * stretch).sqrt(), (area / stretch).sqrt()], 1).minimum(sizes)
    centre = extent / 2 + torch.stack([across, down], 1) * (sizes - extent)
    radians = torch.deg2rad((2 * angle - 1) * turn)
    sign = torch.where(mirrored < flip, -1.0, 1.0)
    cos, sin = radians.cos(), radians.sin()
    turned = torch.stack([torch.stack([cos, -sin], 1), torch.stack([sin, cos], 1)], 1)
    linear = turned @ torch.diag_embed(torch.stack([sign * extent[:, 0], extent[:, 1]], 1) / 2)
    return torch.cat([linear, centre[:, :, None]], 2)


def _read(batch: Batch, placed: Float[Tensor, "b 2 3"], side: int) -> Float[Tensor, "b 3 side side"]:
    finer = side * _FINER
    steps = (torch.arange(finer, device=placed.device) + 0.5) / finer * 2 - 1
    y, x = torch.meshgrid(steps, steps, indexing="ij")
    pixels = torch.stack([x, y], 2).flatten(0, 1) @ placed[:, :, :2].mT + placed[:, None, :, 2]
    sizes = batch.sizes[:, None]
    mirrored = sizes - (pixels.remainder(2 * sizes) - sizes).abs()  # at each picture's own edge, not at the canvas's
    canvas = torch.tensor([batch.canvas.shape[3], batch.canvas.shape[2]], device=placed.device)
    # Not between the last pixel and the canvas beside it.
    coordinates = mirrored.clamp(min=0.5).minimum(sizes - 0.5) / canvas * 2 - 1
    grid = coordinates.unflatten(1, (finer, finer))
    read = F.grid_sample(batch.canvas.float() / 255, grid, mode="bilinear", align_corners=False)
    return F.avg_pool2d(read, _FINER)


def _coloured(
    images: Float[Tensor, "b 3 s s"], strength: float, blur: float, solarise: float, generator: torch.Generator
) -> Float[Tensor, "b 3 s s"]:
    """Change brightness, contrast, saturation and hue (four times in five), or to grey (once in five)."""
    count, device = len(images), images.device
    chance = torch.rand(4, count, generator=generator)
    amounts = (2 * torch.rand(4, count, generator=generator) - 1) * torch.tensor(_JITTER)[:, None] * strength
    amounts = (amounts * (chance[0] < 0.8)).to(device)
    grey = torch.tensor(_GREY, device=device).expand(3, 3)
    saturation = torch.where(chance[1].to(device) < 0.2 * strength, 0.0, 1 + amounts[2])[:, None, None]
    # All three are linear in the colours, so they are one matrix: its rows sum to the brightness.
    mixing = saturation * _turned_hue(amounts[3]) + (1 - saturation) * grey
    mixing = mixing * (1 + amounts[0])[:, None, None]
    images = torch.einsum("bij,bjhw->bihw", mixing, images)
    mean = torch.einsum("j,bjhw->b", grey[0], images)[:, None, None, None] / images[0, 0].numel()
    images = mean + (images - mean) * (1 + amounts[1])[:, None, None, None]
    images = _blurred(images.clamp(0, 1), chance[2] < blur, generator)
    inverted = (chance[3] < solarise).to(device)[:, None, None, None] & (images > 0.5)
    return torch.where(inverted, 1 - images, images)


def _turned_hue(turns: Float[Tensor, " b"]) -> Float[Tensor, "b 3 3"]:
    """Return rotations of colours about the axis of greys (Rodrigues' formula)."""
    angle = 2 * math.pi * turns[:, None, None]
    unit = torch.eye(3, device=turns.device)
    along = torch.full((3, 3), 1 / 3, device=turns.device)
    cross = torch.tensor([[0.0, -1, 1], [1, 0, -1], [-1, 1, 0]], device=turns.device) / math.sqrt(3)
    return angle.cos() * unit + (1 - angle.cos()) * along + angle.sin() * cross


def _blurred(
    images: Float[Tensor, "b 3 s s"], chosen: Bool[Tensor, " b"], generator: torch.Generator
) -> Float[Tensor, "b 3 s s"]:
    """Blur the chosen images with a Gaussian of a random width each."""
    widths = _BLUR[0] + (_BLUR[1] - _BLUR[0]) * torch.rand(len(images), generator=generator)
    where = chosen.nonzero()[:, 0].to(images.device)
    if not len(where):
        return images
    reach = max(1, min(round(2 * _BLUR[1]), images.shape[-1] - 1))
    steps = torch.arange(-reach, reach + 1)
    kernel = (-0.5 * (steps / widths[chosen, None]) ** 2).exp()
    kernel = (kernel / kernel.sum(1, keepdim=True)).to(images.device).repeat_interleave(3, 0)
    some = F.pad(images[where], [reach] * 4, mode="reflect").flatten(0, 1)[None]
    for shape in ((-1, 1, 2 * reach + 1, 1), (-1, 1, 1, 2 * reach + 1)):
        some = F.conv2d(some, kernel.reshape(shape), groups=len(kernel))
    return images.index_copy(0, where, some[0].unflatten(0, (-1, 3)))
