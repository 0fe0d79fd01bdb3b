"""PCK: the percentage of correct keypoints."""

from collections.abc import Sequence
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from vitfeats.descriptor import Points, as_points
from vitfeats.errors import ConfigError, ShapeError

_SLACK = 1e-6

D = TypeVar("D", float, Tensor)


def pck(
    predicted: Points,
    target: Points,
    reference: tuple[float, float],
    *,
    alpha: float = 0.1,
    strict: bool = False,
    visible: Tensor | np.ndarray | Sequence[bool] | None = None,
) -> float:
    """Return the share of predicted points within ``alpha · max(reference)`` of their target, 0..1.

    Yang & Ramanan, Articulated Human Detection with Flexible Mixtures
    of Parts, TPAMI 2013.

    Args:
        predicted: (n, 2), (x, y) in pixels of the target image.
        target: (n, 2), where they should be.
        reference: (height, width) in the same pixels: of the target image for PCK@img, of the object's box for
            PCK@bbox. Of a box without a side longer than 0, only points that are met exactly are correct.
        alpha: Fraction of the longer side, above 0.
        strict: Whether a point at exactly that distance is wrong (``<``) or correct (``≤``).
        visible: (n,), which points to count; None is all.

    Returns:
        A share in 0..1; NaN if there is no point to count.

    Raises:
        ShapeError: If the points are not (n, 2) each, or their numbers differ.
        ConfigError: If ``alpha`` is not positive, or the reference negative.
    """
    made, wanted = (as_points(points, torch.zeros(1), torch.float64) for points in (predicted, target))
    if made.shape != wanted.shape:
        raise ShapeError(f"expected as many predicted points as targets, got {len(made)} and {len(wanted)}")
    if not alpha > 0 or not all(side >= 0 for side in reference):  # a NaN, too
        raise ConfigError(
            f"expected alpha above 0 and a reference (height, width) of at least 0, got {alpha} and {tuple(reference)}"
        )
    counted = (
        torch.ones(len(made), dtype=torch.bool) if visible is None else torch.as_tensor(visible, dtype=torch.bool).cpu()
    )
    if counted.shape != (len(made),):
        raise ShapeError(f"expected visible of shape ({len(made)},), got {tuple(counted.shape)}")
    distance = (made - wanted).norm(dim=1)[counted]
    return float(within(distance, alpha * max(reference), strict=strict).double().mean())


def within(distance: D, reach: float, *, strict: bool = False) -> D:
    """Return which distances are at most ``reach``, or with ``strict`` less: a boolean, or booleans of the same shape.

    With a slack far below any pixel, a millionth of the reach: a point exactly at the threshold must not fall to either
    side by rounding (0.29 · 100 is 28.999999999999996, and 10.1 − 0.1 is more than 10 in float32).
    """
    return distance < reach * (1 - _SLACK) if strict else distance <= reach * (1 + _SLACK)
