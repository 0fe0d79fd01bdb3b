"""From tokens to pixels: GrabCut where OpenCV is installed, a guided filter without it."""

from importlib.util import find_spec
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from vitfeats.errors import MissingDependencyError
from vitfeats.resize import guided_filter

Method = Literal["grabcut", "guided", "none"]

_SURE_FRONT, _SURE_BACK = 0.1, 0.6  # shares of each side, those with the clearest scores, that GrabCut may not change
_ROUNDS = 5  # of GrabCut, as published
_RADIUS = 0.06  # of the guided filter's windows, in shorter sides of the image
_EPSILON = 1e-2  # variance of colours, in 0..1, below which the filter takes a window for flat


def method_of(wanted: Literal["auto", "grabcut", "guided", "none"]) -> Method:
    """Return how masks are refined: "auto" is GrabCut where OpenCV is installed, else the guided filter.

    Raises:
        MissingDependencyError: If GrabCut is asked for, and OpenCV is not installed.
    """
    installed = find_spec("cv2") is not None
    if wanted == "auto":
        return "grabcut" if installed else "guided"
    if wanted == "grabcut" and not installed:
        raise MissingDependencyError(
            "expected OpenCV for refine='grabcut', but it is not installed; try: pip install \"vitfeats[coseg]\", or "
            "refine='guided'"
        )
    return wanted


def refine_mask(
    image: Float[Tensor, "3 height width"],
    front: Bool[Tensor, "height width"],
    score: Float[Tensor, "height width"],
    method: Method,
    *,
    seed: int = 0,
) -> UInt8[np.ndarray, "height width"]:
    """Return how much each pixel is foreground, 0..255; the mask is what is above 127.

    Args:
        image: In 0..1, on the CPU.
        front: The mask as the tokens have it.
        score: How likely each pixel is foreground.
        method: "none" returns the mask; "guided" lets its edges follow the image's; "grabcut" finds anew which pixels
            are foreground, from the colours on both sides.
        seed: Of GrabCut's first guess. OpenCV has one generator a thread, which is set to it.
    """
    if method == "none" or not 0 < int(front.sum()) < front.numel():
        return as_bytes(front.float())
    if method == "guided":
        return as_bytes(guided(front.float()[None], image)[0])
    return as_bytes(grabcut(image, front, score, seed).float())


def guided(
    maps: Float[Tensor, "dim height width"], image: Float[Tensor, "3 height width"]
) -> Float[Tensor, "dim height width"]:
    """Return maps whose edges follow the image's, by a guided filter over windows of 12 % of the shorter side."""
    radius = max(2, round(_RADIUS * min(image.shape[1:])))
    return guided_filter(maps[None], image[None], radius=radius, epsilon=_EPSILON)[0]


def grabcut(
    image: Float[Tensor, "3 height width"],
    front: Bool[Tensor, "height width"],
    score: Float[Tensor, "height width"],
    seed: int = 0,
) -> Bool[Tensor, "height width"]:
    """Refine a mask by GrabCut (Rother et al., SIGGRAPH 2004), five rounds from a mask, as published.

    The tenth of the foreground with the highest scores stays foreground, and the six tenths of the background with the
    lowest stay background; all between may change. The mask is returned as it was where nothing is left of it.

    Args:
        image: In 0..1.
        front: The mask: some of the image, and not all.
        score: How likely each pixel is foreground.
        seed: Of the first guess.

    Raises:
        MissingDependencyError: If OpenCV is not installed.
    """
    method_of("grabcut")
    import cv2

    marks = np.where(front.numpy(), cv2.GC_PR_FGD, cv2.GC_PR_BGD).astype(np.uint8)
    values = score.numpy()
    inside, outside = values[front.numpy()], values[~front.numpy()]
    marks[front.numpy() & (values >= np.quantile(inside, 1 - _SURE_FRONT))] = cv2.GC_FGD
    marks[~front.numpy() & (values <= np.quantile(outside, _SURE_BACK))] = cv2.GC_BGD
    pixels = (image.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).flip(2).contiguous().numpy()  # BGR
    cv2.setRNGSeed(seed)
    background, foreground = np.zeros((1, 65)), np.zeros((1, 65))
    cv2.grabCut(pixels, marks, None, background, foreground, _ROUNDS, cv2.GC_INIT_WITH_MASK)  # type: ignore[call-overload]
    cut = torch.from_numpy(np.isin(marks, (cv2.GC_FGD, cv2.GC_PR_FGD)))
    return cut if bool(cut.any()) else front


def as_bytes(soft: Float[Tensor, "height width"]) -> UInt8[np.ndarray, "height width"]:
    """Return shares as 0..255."""
    return (soft.clamp(0, 1) * 255).round().to(torch.uint8).numpy()
