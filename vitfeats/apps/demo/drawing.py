"""What is drawn over pictures, fast: a click is answered with a picture in a few hundredths of a second."""

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw
from torch import Tensor

from vitfeats.apps.demo.intake import Picture
from vitfeats.descriptor import Descriptor
from vitfeats.grid import PatchGrid
from vitfeats.pca import PCA
from vitfeats.preprocess import to_pil
from vitfeats.resize import spread_map

RING, CROSS = (214, 39, 40), (255, 255, 255)
_OVER = 0.7  # share of the heat map's colour


def components(picture: Picture, d: Descriptor, fitted: PCA) -> Image.Image:
    """Return the first three components of a picture's tokens as colours, at its proportions."""
    return cells(fitted.to_rgb(d)[0], d.grid, picture.shown.size)


def cells(values: Float[Tensor, "3 rows cols"], grid: PatchGrid, size: tuple[int, int]) -> Image.Image:
    """Return colours on a token grid as a picture of a size (width, height); each token is a cell."""
    return to_pil(spread_map(values[None].float().cpu(), grid, (size[1], size[0]), "nearest")[0])


def heat(
    picture: Picture,
    values: Float[Tensor, "rows cols"],
    grid: PatchGrid,
    *,
    ring: tuple[float, float] | None = None,
    cross: tuple[float, float] | None = None,
) -> Image.Image:
    """Draw a map over a picture, from its own least to its own largest value.

    Args:
        picture: Below.
        values: On the token grid.
        grid: The token grid.
        ring: A point (x, y) of ``picture.image`` that was asked about.
        cross: One that was found.
    """
    low, high = values.aminmax()
    level = ((values - low) / (high - low).clamp_min(1e-12) * 255).round().to(torch.uint8).cpu()
    colours = _palette()[level.numpy()[_nearest(grid, picture.shown.size)]]
    over = _OVER * colours + (1 - _OVER) * _dimmed()[picture.grey][..., None]
    return pointed(Image.fromarray(over.round().astype(np.uint8)), picture, ring=ring, cross=cross)


def pointed(
    drawn: Image.Image,
    picture: Picture,
    *,
    ring: tuple[float, float] | None = None,
    cross: tuple[float, float] | None = None,
) -> Image.Image:
    """Return what was drawn over a picture with a ring and a cross, both at (x, y) of ``picture.image``."""
    result = drawn.copy()
    pen = ImageDraw.Draw(result)
    radius = max(6, drawn.width // 70)
    if ring is not None:
        x, y = picture.drawn_at(*ring)
        for more, width, colour in ((1.5, 5, "white"), (0, 2, RING)):
            pen.ellipse(
                (x - radius - more, y - radius - more, x + radius + more, y + radius + more),
                outline=colour,
                width=width,
            )
    if cross is not None:
        x, y = picture.drawn_at(*cross)
        for width, colour in ((5, "black"), (2, CROSS)):
            pen.line((x - radius, y, x + radius, y), fill=colour, width=width)
            pen.line((x, y - radius, x, y + radius), fill=colour, width=width)
    return result


def _nearest(grid: PatchGrid, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Return (row, column) indices of the nearest token for each pixel of a picture of (width, height)."""
    width, height = size
    network_h, network_w = grid.network_size
    across = (torch.arange(width) + 0.5) * network_w / width
    down = (torch.arange(height) + 0.5) * network_h / height
    cols = grid.index_of(torch.stack([across, torch.zeros(width)], 1)) % grid.cols
    rows = grid.index_of(torch.stack([torch.zeros(height), down], 1)) // grid.cols
    return rows.numpy()[:, None], cols.numpy()[None, :]


def _palette() -> UInt8[np.ndarray, "256 3"]:
    from matplotlib import colormaps

    return (colormaps["magma"](np.arange(256))[:, :3] * 255).round().astype(np.uint8)


def _dimmed() -> np.ndarray:
    """Return how bright each grey value is drawn below a heat map: never black, so that the picture is seen."""
    return (np.arange(256) + 80) * 255 / 335
