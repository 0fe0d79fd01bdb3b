"""Colours of images, compared without any model: how far apart two images' colours are, and making them alike."""

import math

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from vitfeats.preprocess import ImageLike, load_image

_LAB_LOW, _LAB_HIGH = (0.0, -112.5, -112.5), (100.0, 112.5, 112.5)  # every colour of sRGB lies within
# Odd in a and b, so that greys lie in the middle of a bin: on its edge, a trace of colour would move all of them.
_LAB_BINS = (8, 9, 9)


def colour_distance(a: ImageLike, b: ImageLike) -> float:
    """Return the share of pixels that would have to change colour for two images to have the same colours, 0..1.

    It is the total variation of two joint histograms in CIELAB (D65; 8 bins of 12.5 for lightness, 9 of 25 for a and
    b, greys in the middle of theirs), half the sum of absolute differences. Where pixels are does not matter, and the
    sizes may differ. A bin is a step: colours just across its edge count as much as opposite ones;
    :func:`colour_shift` has no steps.

    Args:
        a: An image.
        b: Another one.

    Raises:
        ImageError: If one cannot be read or is not RGB in 0..1.
    """
    bounds = list(zip(_LAB_LOW, _LAB_HIGH, strict=True))
    shares = []
    for image in (a, b):
        colours = _lab(load_image(image)).reshape(-1, 3).clip(_LAB_LOW, _LAB_HIGH)
        counts, _ = np.histogramdd(colours, _LAB_BINS, bounds)
        shares.append(counts / len(colours))
    return float(np.abs(shares[0] - shares[1]).sum() / 2)


def colour_shift(a: ImageLike, b: ImageLike) -> float:
    """Return how far colours must move, on average, for two images to have the same ones, in units of CIELAB.

    For each of L, a and b, the earth mover's distance (Wasserstein-1) between the values of the two images; of the
    three, the root of the sum of squares. A shift of all colours by a vector gives its length, and no way to move
    colours is shorter. About 2.3 is a difference that one just sees. Images that agree in each channel alone are at 0.

    Args:
        a: An image.
        b: Another one; the sizes may differ.

    Raises:
        ImageError: If one cannot be read or is not RGB in 0..1.
    """
    lab_a, lab_b = (_lab(load_image(image)).reshape(-1, 3) for image in (a, b))
    return math.hypot(*(_earth_mover(lab_a[:, channel], lab_b[:, channel]) for channel in range(3)))


def match_colours(structure: ImageLike, appearance: ImageLike) -> Float[Tensor, "3 height width"]:
    """Return the structure image with the mean and standard deviation of the appearance image's colours.

    Reinhard et al., Color Transfer between Images, 2001, in CIELAB; what leaves the colours of sRGB is cut off. It is
    the row that a fool would get: it looks at no object, and keeps the structure.

    Args:
        structure: The image to recolour.
        appearance: The image whose colours are wanted; the sizes may differ.

    Returns:
        An image of the structure image's size, float32 in 0..1.

    Raises:
        ImageError: If one cannot be read or is not RGB in 0..1.
    """
    from skimage.color import lab2rgb

    made, wanted = _lab(load_image(structure)), _lab(load_image(appearance))
    spread = made.std((0, 1))
    # A channel without any spread has nothing to stretch but the rounding.
    gain = np.where(spread > 1e-6, wanted.std((0, 1)) / np.maximum(spread, 1e-6), 0.0)
    lab = (made - made.mean((0, 1))) * gain + wanted.mean((0, 1))
    lab[..., 0] = lab[..., 0].clip(0, 100)
    # Bluer than any light: scikit-image would cut it off as well, and warn. The slack is for its rounding.
    lab[..., 2] = np.minimum(lab[..., 2], 200 * (lab[..., 0] + 16) / 116 - 1e-6)
    return torch.from_numpy(lab2rgb(lab).clip(0, 1)).permute(2, 0, 1).float().contiguous()


def _lab(image: Tensor) -> Float[np.ndarray, "height width 3"]:
    """Return an image's colours in CIELAB (D65), float64."""
    from skimage.color import rgb2lab

    # An optimised image may leave 0..1 a little; no colour does.
    return rgb2lab(image.detach().cpu().clamp(0, 1).permute(1, 2, 0).double().numpy())


def _earth_mover(a: Float[np.ndarray, " n"], b: Float[np.ndarray, " m"]) -> float:
    """Return the area between the two cumulative distributions: Wasserstein-1 in one dimension."""
    a, b = np.sort(a), np.sort(b)
    values = np.sort(np.concatenate([a, b]))
    below_a = np.searchsorted(a, values[:-1], "right") / len(a)
    below_b = np.searchsorted(b, values[:-1], "right") / len(b)
    return float((np.abs(below_a - below_b) * np.diff(values)).sum())
