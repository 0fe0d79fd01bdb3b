"""Styles to learn from that need no download: drawn patterns, textures, and colourful pictures among the contents."""

from collections.abc import Mapping

import numpy as np
from skimage.color import rgb2lab

from vitfeats import patterns, samples
from vitfeats.preprocess import load_image, to_pil


def usual_styles(
    pictures: Mapping[str, np.ndarray] | None = None, *, patterns_of: int = 160, colourful: int = 160, size: int = 256
) -> list[np.ndarray]:
    """Return styles: drawn patterns, the textures of scikit-image, and the most colourful of given pictures.

    Args:
        pictures: (height, width, 3) of type uint8 each, by name; None is none.
        patterns_of: How many patterns.
        colourful: How many of the pictures.
        size: Side of the patterns in pixels.

    Returns:
        (height, width, 3) of type uint8 each.
    """
    drawn = [np.asarray(pattern) for pattern in patterns.usual(patterns_of, size=size)]
    textures = [np.asarray(to_pil(load_image(image))) for image in samples.load("textures")]
    found = pictures or {}
    ranked = sorted(found, key=lambda name: (-colourfulness(found[name]), name))
    return drawn + textures + [found[name] for name in ranked[:colourful]]


def colourfulness(picture: np.ndarray) -> float:
    """Return how far a picture's colours lie from grey and from each other, in units of CIELAB.

    The mean chroma plus the spread of the colours' a and b, after a look at every fourth pixel.
    """
    lab = rgb2lab(picture[::4, ::4])
    colours = lab[..., 1:].reshape(-1, 2)
    return float(np.linalg.norm(colours, axis=1).mean() + colours.std(0).sum())
