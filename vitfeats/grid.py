"""Pixel ↔ token geometry: the only module that knows where a token lies in an image.

Two frames meet here. *Source* pixels are those of the image as it was given; *network* pixels are those of the
resized image the model sees. In both, a point is ``(x, y)`` with the origin at the top-left **corner** of the image,
so the centre of the first pixel is ``(0.5, 0.5)`` and the bottom-right corner is ``(width, height)``. Sizes are
``(height, width)``. With corners as origin a resize is a plain scaling, without half-pixel shifts.
"""

import operator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vitfeats.errors import ShapeError

Size = tuple[int, int]


def as_pair(value: int | Size) -> Size:
    """Return ``value`` as ``(vertical, horizontal)``: an int stands for both."""
    return (value, value) if isinstance(value, int) else value


def as_size(value: object) -> int | Size:
    """Return a size as a plain int (the shorter side) or a pair (height, width) of ints.

    Raises:
        ShapeError: If it is neither.
    """
    try:
        if isinstance(value, list | tuple):
            height, width = (operator.index(side) for side in value)
            return height, width
        return operator.index(value)  # type: ignore[arg-type] - asked, not assumed
    except (TypeError, ValueError) as error:
        raise ShapeError(f"expected a size in whole pixels, an int or (height, width), got {value!r}") from error


@dataclass(frozen=True)
class PatchGrid:
    """The grid of tokens that covers one network image.

    Token ``(row, col)`` covers network pixels ``[col·stride, col·stride + patch)`` horizontally, the same vertically;
    its centre is ``(col·stride + patch/2 + shift, row·stride + patch/2 + shift)``. Tokens are numbered row by row.

    Attributes:
        rows: Tokens from top to bottom, at least 1.
        cols: Tokens from left to right, at least 1.
        patch: Side of a token's square in network pixels; ``(height, width)`` where it is not square.
        stride: Step between neighbouring tokens in network pixels; ``(vertical, horizontal)`` where they differ.
        shift: How far the middle of what a token sees lies below and right of the middle of its square, in network
            pixels; ``(down, right)`` where they differ. 0 for patches; (1 − stride)/2 in a ResNet, whose strided
            convolutions look around the first pixel of each square.

    Raises:
        ShapeError: If any of them is smaller than 1.
    """

    rows: int
    cols: int
    patch: int | Size
    stride: int | Size
    shift: float | tuple[float, float] = 0.0

    def __post_init__(self) -> None:
        """Refuse an empty grid."""
        if min(self.rows, self.cols, *as_pair(self.patch), *as_pair(self.stride)) < 1:
            raise ShapeError(f"expected rows, cols, patch and stride of at least 1, got {self}")

    @classmethod
    def covering(cls, size: Size, patch: int, stride: int) -> "PatchGrid":
        """Return the grid that covers a network image of ``size`` = (height, width) exactly.

        Raises:
            ShapeError: If the stride does not divide the patch, or the image is not a whole number of strides.
        """
        check_stride(patch, stride)
        if min(size) < patch or any((side - patch) % stride for side in size):
            raise ShapeError(
                f"expected a network size of at least one patch ({patch}) plus whole strides ({stride}), got {size}"
            )
        return cls((size[0] - patch) // stride + 1, (size[1] - patch) // stride + 1, patch, stride)

    @property
    def tokens(self) -> int:
        """Number of tokens, ``rows · cols``."""
        return self.rows * self.cols

    @property
    def network_size(self) -> Size:
        """(height, width) in network pixels of the area that the grid covers."""
        (patch_h, patch_w), (step_y, step_x) = as_pair(self.patch), as_pair(self.stride)
        return (self.rows - 1) * step_y + patch_h, (self.cols - 1) * step_x + patch_w

    @property
    def _first(self) -> tuple[float, float]:
        """(y, x) of the first token's centre."""
        down, right = self.shift if isinstance(self.shift, tuple) else (self.shift, self.shift)
        patch_h, patch_w = as_pair(self.patch)
        return patch_h / 2 + down, patch_w / 2 + right

    def centres(self) -> Float[Tensor, "tokens 2"]:
        """Return the (x, y) centre of every token in network pixels, row by row."""
        every = torch.arange(self.tokens)
        return self.centres_of(every)

    def centres_of(self, index: Int[Tensor, " n"]) -> Float[Tensor, "n 2"]:
        """Return the (x, y) centres in network pixels of the tokens with these row-major indices."""
        step_y, step_x = as_pair(self.stride)
        first_y, first_x = self._first
        x = (index % self.cols) * step_x + first_x
        y = torch.div(index, self.cols, rounding_mode="floor") * step_y + first_y
        return torch.stack([x, y], dim=-1).to(torch.float32)

    def positions_of(self, points: Float[Tensor, "n 2"]) -> Float[Tensor, "n 2"]:
        """Return continuous (col, row) grid positions of network points; a token's centre has whole numbers."""
        (step_y, step_x), (first_y, first_x) = as_pair(self.stride), self._first
        return (points - points.new_tensor([first_x, first_y])) / points.new_tensor([step_x, step_y])

    def index_of(self, points: Float[Tensor, "n 2"]) -> Int[Tensor, " n"]:
        """Return the row-major index of the token whose centre is nearest; points outside go to the border."""
        position = (self.positions_of(points) + 0.5).floor().long()
        col = position[:, 0].clamp(0, self.cols - 1)
        row = position[:, 1].clamp(0, self.rows - 1)
        return row * self.cols + col


@dataclass(frozen=True)
class Frame:
    """How one source image was scaled to its network image.

    Attributes:
        source_size: (height, width) of the image as given, in pixels.
        network_size: (height, width) of the image the model saw, in pixels. The two scale factors may differ a
            little, because each side is snapped to a whole number of patches.

    Raises:
        ShapeError: If a side is smaller than 1.
    """

    source_size: Size
    network_size: Size

    def __post_init__(self) -> None:
        """Refuse an empty image."""
        if min(*self.source_size, *self.network_size) < 1:
            raise ShapeError(f"expected sizes (height, width) of at least 1 pixel, got {self}")

    @property
    def scale(self) -> tuple[float, float]:
        """(x, y) factors from source to network pixels."""
        (source_h, source_w), (network_h, network_w) = self.source_size, self.network_size
        return network_w / source_w, network_h / source_h

    def to_network(self, points: Float[Tensor, "n 2"]) -> Float[Tensor, "n 2"]:
        """Map (x, y) source pixels to network pixels."""
        return points * points.new_tensor(self.scale)

    def to_source(self, points: Float[Tensor, "n 2"]) -> Float[Tensor, "n 2"]:
        """Map (x, y) network pixels to source pixels."""
        return points / points.new_tensor(self.scale)


def check_stride(patch: int, stride: int) -> None:
    """Raise ``ShapeError`` unless ``stride`` divides ``patch`` (so that the grid covers the image exactly)."""
    if not isinstance(stride, int) or stride < 1 or patch % stride:
        fitting = [s for s in range(1, patch + 1) if patch % s == 0]
        raise ShapeError(f"expected a stride that divides the patch size {patch}, got {stride!r}; try one of {fitting}")


def fit_size(source: Size, size: int | Size, patch: int) -> Size:
    """Return the network size (height, width) for a source image, each side snapped to the nearest patch multiple.

    Args:
        source: (height, width) of the source image in pixels.
        size: The shorter side in pixels, the aspect kept; or (height, width), the aspect given up.
        patch: Patch size in pixels; half a patch is rounded up.

    Raises:
        ShapeError: If the asked size is smaller than one patch.
    """
    # In whole numbers: in floats, half a patch is rounded up for one source size and down for another.
    wanted, unit = ((size * source[0], size * source[1]), min(source)) if isinstance(size, int) else (size, 1)
    if min(wanted) < patch * unit:
        raise ShapeError(f"expected a size of at least one patch ({patch} pixels), got {size}; try size={14 * patch}")
    height, width = ((2 * side + patch * unit) // (2 * patch * unit) * patch for side in wanted)
    return height, width
