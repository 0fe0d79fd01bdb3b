"""Carrying points from one image to another by their descriptors, in the ways that the protocols of PCK name."""

from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vitfeats.descriptor import Descriptor, Points, as_points, check_inside
from vitfeats.errors import ConfigError
from vitfeats.grid import Frame, PatchGrid, Size, as_size, fit_size
from vitfeats.matching import transfer_points
from vitfeats.resize import sample_map
from vitfeats.similarity import CHUNK_BYTES, check_comparable, check_finite, check_single, similarity_blocks, unit

Enlarged = Literal["source", "network"] | int | Size


def carry_points(
    a: Descriptor,
    b: Descriptor,
    points: Points,
    *,
    predict: Literal["cell", "map", "window"] = "cell",
    enlarged: Enlarged = "source",
) -> Float[Tensor, "n 2"]:
    """Carry points of image a to where image b is most alike.

    Args:
        a: Descriptor of one image.
        b: Descriptor of one image, with as many channels.
        points: (n, 2), (x, y) in source pixels of image a.
        predict: "cell", from the nearest cell to the centre of the most similar one; "map", from pixel to pixel of
            enlarged maps; "window", a soft-argmax: see :class:`~vitfeats.configs.PckProtocol`.
        enlarged: For "map", the image whose pixels are meant: "source", as it was given; "network", as the model saw
            it; or a size in pixels, the shorter side or (height, width).

    Returns:
        (n, 2), (x, y) in source pixels of image b: centres of cells, or of pixels.

    Raises:
        ShapeError: If a descriptor holds more than one image, the channels differ, or a point lies outside.
        ConfigError: If there is no such way.
    """
    if predict == "window":
        return transfer_points(a, b, points, refine="window").detach()
    if predict not in ("cell", "map"):
        raise ConfigError(f"expected predict 'cell', 'map' or 'window', got {predict!r}")
    check_single(a, b)
    check_comparable(a, b)
    where = as_points(points, a.features)
    check_inside(where, a.frames[0])
    check_finite(a, b)
    if predict == "cell":
        asked = a.features[0, a.grid.index_of(a.frames[0].to_network(where))]
        found = [block.argmax(1) for _, block in similarity_blocks(unit(asked), unit(b.features[0]))]
        index = torch.cat(found) if found else torch.zeros(0, dtype=torch.long, device=b.device)
        return b.frames[0].to_source(b.grid.centres_of(index))
    return _carried_by_maps(a, b, where, enlarged)


def _size_of(frame: Frame, enlarged: Enlarged) -> Size:
    if enlarged == "source":
        return frame.source_size
    return frame.network_size if enlarged == "network" else fit_size(frame.source_size, as_size(enlarged), 1)


@torch.no_grad()
def _carried_by_maps(
    a: Descriptor, b: Descriptor, points: Float[Tensor, "n 2"], enlarged: Enlarged
) -> Float[Tensor, "n 2"]:
    """Carry points from their pixel of an enlarged map to the most similar pixel of another."""
    (frame_a, frame_b) = a.frames[0], b.frames[0]
    size_a, size_b = (_size_of(frame, enlarged) for frame in (frame_a, frame_b))
    source_a, source_b = ((f.source_size[1], f.source_size[0]) for f in (frame_a, frame_b))
    to_pixels = points.new_tensor([size_a[1], size_a[0]]) / points.new_tensor(source_a)
    # The pixel that the point lies in; a point on the right or lower edge belongs to the last one.
    pixel = (points * to_pixels).floor().clamp_min(0).minimum(points.new_tensor([size_a[1] - 1, size_a[0] - 1]))
    centre = (pixel + 0.5) / to_pixels
    asked = sample_map(a.map.float(), a.grid, frame_a.to_network(centre))[0].T
    best = most_similar_pixel(asked, b.map[0], b.grid, size_b)
    row, column = torch.div(best, size_b[1], rounding_mode="floor"), best % size_b[1]
    found = torch.stack([column, row], 1).to(points.dtype) + 0.5
    return found * points.new_tensor(source_b) / points.new_tensor([size_b[1], size_b[0]])


def most_similar_pixel(
    asked: Float[Tensor, "n dim"], values: Float[Tensor, "dim rows cols"], grid: PatchGrid, size: Size
) -> Int[Tensor, " n"]:
    """Return the row-major pixel whose features, those of the map enlarged to an image, are most similar to each asked.

    Bilinear between the cells' centres, as :func:`~vitfeats.upsample`; the cosine is of the interpolated features. The
    enlarged map, ``dim`` numbers a pixel, is never made: an interpolated feature is a sum of four cells, so its product
    with what is asked is interpolated from the cells' products, and its length follows from products of neighbours.

    Args:
        asked: Features, of any length.
        values: The map.
        grid: Where its cells are.
        size: (height, width) of the image that it is enlarged to.
    """
    values = values.detach().to(torch.promote_types(values.dtype, torch.float32))
    asked = asked.detach().to(values.dtype)
    down, across = _between(grid, size, values.device)
    length = _squared_length(values, down, across).clamp_min(0).sqrt()
    # A place where neighbours cancel out is alike to nothing.
    scale = torch.where(length > 1e-6 * length.max(), 1 / length, 0.0)
    flat = values.flatten(1)
    rows = max(1, CHUNK_BYTES // (size[0] * size[1] * values.element_size()))
    found = []
    for part in asked.split(rows):
        products = _enlarged((part @ flat).unflatten(1, values.shape[1:]), down, across)
        found.append((products * scale).flatten(1).argmax(1))
    return torch.cat(found) if found else torch.zeros(0, dtype=torch.long, device=values.device)


class _Between(NamedTuple):
    """Where the pixels of an axis lie between cells.

    Attributes:
        low: (pixels,) the cell before.
        high: (pixels,) the cell after; the same where there is only one.
        share: (pixels,) how much of the feature is that of the cell after, 0..1.
    """

    low: Int[Tensor, " pixels"]
    high: Int[Tensor, " pixels"]
    share: Float[Tensor, " pixels"]


def _between(grid: PatchGrid, size: Size, device: torch.device) -> tuple[_Between, _Between]:
    """Return the places of pixels among rows, and among columns; beyond the outermost centres the border holds."""
    (network_h, network_w), axes = grid.network_size, []
    for axis, (pixels, network, cells) in enumerate(((size[1], network_w, grid.cols), (size[0], network_h, grid.rows))):
        points = torch.zeros(pixels, 2, device=device)
        points[:, axis] = (torch.arange(pixels, device=device) + 0.5) * network / pixels
        places = grid.positions_of(points)[:, axis].clamp(0, cells - 1)
        low = places.long().clamp_max(max(0, cells - 2))
        axes.append(_Between(low, (low + 1).clamp_max(cells - 1), places - low))
    return axes[1], axes[0]


def _enlarged(maps: Float[Tensor, "n rows cols"], down: _Between, across: _Between) -> Float[Tensor, "n height width"]:
    """Enlarge maps, rows first: there are fewer cells than pixels in each of them."""
    tall = torch.lerp(maps[:, down.low], maps[:, down.high], down.share[:, None])
    return torch.lerp(tall[:, :, across.low], tall[:, :, across.high], across.share)


def _squared_length(
    values: Float[Tensor, "dim rows cols"], down: _Between, across: _Between
) -> Float[Tensor, "height width"]:
    """Return the squared length of the interpolated feature at each pixel, from the products of neighbouring cells.

    Between two cells f and g, at the share t: (1−t)²⟨f, f⟩ + t²⟨g, g⟩ + 2t(1−t)⟨f, g⟩; between rows, then columns.
    """
    below = values[:, 1:] if values.shape[1] > 1 else values  # of one row, the cell after is the cell itself
    right = values[:, :, 1:] if values.shape[2] > 1 else values

    def product(first: Tensor, second: Tensor) -> Tensor:
        rows, cols = min(first.shape[1], second.shape[1]), min(first.shape[2], second.shape[2])
        return (first[:, :rows, :cols] * second[:, :rows, :cols]).sum(0)

    def between_rows(same: Tensor, step: Tensor) -> Tensor:
        """Interpolate ⟨f, g⟩ of cells f, g of one row; ``step`` has ⟨f, g'⟩ + ⟨f', g⟩ of the row and the next."""
        t = down.share[:, None]
        return (1 - t) ** 2 * same[down.low] + t**2 * same[down.high] + t * (1 - t) * step[down.low]

    own = between_rows(product(values, values), 2 * product(values, below))
    diagonals = product(values, below[:, :, 1:] if values.shape[2] > 1 else below) + product(below, right)
    beside = between_rows(product(values, right), diagonals)
    t = across.share
    return (1 - t) ** 2 * own[:, across.low] + t**2 * own[:, across.high] + 2 * t * (1 - t) * beside[:, across.low]
