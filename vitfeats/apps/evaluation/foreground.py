"""Foreground of images, as masks that you give or as a split of an image's tokens; no segmenter is needed."""

import math
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from vitfeats.descriptor import Descriptor
from vitfeats.errors import ImageError, ShapeError
from vitfeats.grid import Size
from vitfeats.pca import PCA
from vitfeats.similarity import check_single, unit

Mask = Tensor | np.ndarray
"""(height, width) of bool: which pixels are foreground."""

_MOST_ROUNDS = 100  # of 2-means; it settles in about ten
_ALIKE = 1e-10  # squared distance of two mean directions that only rounding tells apart


def foreground_iou(a: Mask, b: Mask) -> float:
    """Return intersection over union of two foreground masks, 0..1; NaN if both are empty.

    Args:
        a: (height, width) of bool.
        b: Another one; where the sizes differ, both are stretched to the larger height and width, to the nearest pixel.

    Raises:
        ImageError: If a mask is not of bool.
        ShapeError: If a mask is not (height, width).
    """
    first, second = _as_mask(a), _as_mask(b)
    size = (max(first.shape[0], second.shape[0]), max(first.shape[1], second.shape[1]))
    first, second = _stretched(first, size), _stretched(second, size)
    union = int((first | second).sum())
    return int((first & second).sum()) / union if union else math.nan


def foreground_mask(d: Descriptor, start: Bool[Tensor, "rows cols"] | None = None) -> Bool[Tensor, "rows cols"]:
    """Split an image's tokens in two by 2-means of their directions (cosine); True is the foreground.

    Without ``start``, the split starts along the first principal component, and the part that holds most border tokens
    is background. With the mask of another image as ``start``, it starts there and takes over its labels: "is the
    split of that image one of this image, too?" Other colours often make another split the strongest, but leave this
    one where it was. An image that does not have it ends up in another one.

    A split is not always an object: it is whatever divides the tokens best. Where you have masks, use those.

    Args:
        d: A descriptor of one image.
        start: Mask on the same grid to start from, or None.

    Returns:
        The mask; nothing is foreground where all tokens are alike.

    Raises:
        ShapeError: If there is more than one image, fewer than two tokens, or ``start`` is on another grid.
    """
    check_single(d)
    directions = replace(d.detach(), features=unit(d.features.detach().float()))
    if start is None:
        along = PCA(1).fit(directions).transform(directions)[0, :, 0]
        return _without_border(_settled(directions.features[0], along > 0).view(d.grid.rows, d.grid.cols))
    if tuple(start.shape) != (d.grid.rows, d.grid.cols):
        raise ShapeError(
            f"expected start on the grid of {d.grid.rows}×{d.grid.cols} tokens, got {tuple(start.shape)}; "
            "resize one image to the other's size"
        )
    return _settled(directions.features[0], start.flatten().to(d.device)).view(d.grid.rows, d.grid.cols)


def _settled(tokens: Float[Tensor, "n dim"], inside: Bool[Tensor, " n"]) -> Bool[Tensor, " n"]:
    """Return where 2-means comes to rest; none of the tokens where nothing divides them."""
    for _ in range(_MOST_ROUNDS):
        if not 0 < int(inside.sum()) < len(inside):
            return torch.zeros_like(inside)
        front, back = tokens[inside].mean(0), tokens[~inside].mean(0)
        if float((front - back).square().sum()) < _ALIKE:
            return torch.zeros_like(inside)
        nearer = tokens @ (front - back) > (front.square().sum() - back.square().sum()) / 2
        if torch.equal(nearer, inside):
            break
        inside = nearer
    return inside


def _without_border(inside: Bool[Tensor, "rows cols"]) -> Bool[Tensor, "rows cols"]:
    """Return the part that holds fewer of the border tokens; the given one where both hold as many."""
    border = torch.ones_like(inside)
    border[1:-1, 1:-1] = False
    return ~inside if float(inside[border].double().mean()) > 0.5 else inside


def _as_mask(mask: object) -> Bool[Tensor, "height width"]:
    if not isinstance(mask, Tensor | np.ndarray) or mask.dtype not in (torch.bool, np.dtype(bool)):
        got = mask.dtype if isinstance(mask, Tensor | np.ndarray) else type(mask).__name__
        raise ImageError(f"expected a mask of bool, a tensor or an array, got {got}; try mask > 0.5")
    if mask.ndim != 2 or min(mask.shape) < 1:
        raise ShapeError(f"expected a mask (height, width), got shape {tuple(mask.shape)}; one for each image")
    return torch.as_tensor(np.ascontiguousarray(mask) if isinstance(mask, np.ndarray) else mask).cpu()


def _stretched(mask: Bool[Tensor, "height width"], size: Size) -> Bool[Tensor, "new_height new_width"]:
    return F.interpolate(mask[None, None].float(), size=size, mode="nearest-exact")[0, 0] > 0.5
