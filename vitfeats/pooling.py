"""Descriptors made coarser or finer: log-binning over neighbours, and one token for each pixel."""

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from vitfeats.descriptor import Descriptor
from vitfeats.errors import ConfigError, ShapeError, UnknownFacetError
from vitfeats.grid import PatchGrid, Size, as_size, fit_size
from vitfeats.preprocess import Images, load_images
from vitfeats.resize import resize_images, spread_map

Upsampler = Callable[[Tensor, Tensor], Tensor]
"""From features (batch, dim, rows, cols) and images (batch, 3, height, width) in 0..1 to (batch, dim, h, w)."""


def log_bin(d: Descriptor, *, hierarchy: int = 2) -> Descriptor:
    """Give every token its surroundings too: the features of log-spaced bins around it, one after the other.

    As in Amir et al., Deep ViT Features as Dense Visual Descriptors, 2021. At level k the map is averaged over 3ᵏ × 3ᵏ
    tokens (those that there are), and a token takes it at the 8 places 3ᵏ tokens away; at level 0, which is the map
    itself, also at its own. A place beyond the border is the nearest one on it. Two levels are 17 bins. Differentiable.

    Args:
        d: A descriptor of patch tokens.
        hierarchy: Number of levels, at least 1; there are 1 + 8 · hierarchy bins.

    Returns:
        The same tap on the same grid with bins · dim channels, in the order (level, row, column) of the bins. CLS and
        registers have no surroundings and heads no longer share the channels: all three are None. The features take
        batch · tokens · bins · dim · 4 bytes.

    Raises:
        ConfigError: If there is no level.
        UnknownFacetError: If ``d`` is of the facet ``cls``, which has no neighbours.
    """
    if not isinstance(hierarchy, int) or hierarchy < 1:
        raise ConfigError(f"expected hierarchy of at least 1, got {hierarchy!r}; 2 is the paper's")
    if d.tap.facet == "cls":
        raise UnknownFacetError(f"expected a descriptor of patch tokens, got '{d.tap}'; try 'key@{d.tap.layer}'")
    levels = torch.stack([_averaged(d, level) for level in range(hierarchy)], 1)
    bins = _bins(d.grid, hierarchy).to(d.device)
    images = torch.arange(len(d), device=d.device) * hierarchy * d.grid.tokens
    # One gather of whole tokens costs what writing the result costs; slices of the map would be written far apart.
    binned = levels.flatten(0, 3).index_select(0, (images[:, None, None] + bins).flatten())
    return replace(d, features=binned.view(len(d), d.grid.tokens, -1), cls=None, registers=None, heads=None)


def upsample(
    d: Descriptor, size: int | Size | None = None, *, upsampler: Upsampler | None = None, image: Images | None = None
) -> Descriptor:
    """Return a dense descriptor: one token for each pixel of an image of ``size``.

    Without ``upsampler``, features are bilinear between the tokens' own centres, and beyond the outermost centres the
    border value holds. Differentiable.

    Args:
        d: A descriptor of patch tokens.
        size: (height, width) in pixels; an int is the shorter side, the source's aspect kept; None is the network
            size, the pixels that the model saw.
        upsampler: A guided upsampler (AnyUp, FeatUp, …), called once as ``upsampler(features, images)``: features
            (batch, dim, rows, cols), and ``image`` at ``size`` as (batch, 3, height, width), float32 in 0..1, not
            normalised. It takes both to cover the same area, so a map of overlapping tokens is first resampled to
            cells that tile the image. It returns (batch, dim, h, w); another size than asked is resampled bilinearly.
        image: The described images, one for each of the batch, as :func:`~vitfeats.extract` takes them. Required with
            ``upsampler``, also with one that does not look at them, and refused without.

    Returns:
        The same tap with a grid of height × width tokens of one pixel; CLS and registers are kept. The features take
        batch · height · width · dim · 4 bytes.

    Raises:
        ConfigError: If only one of ``upsampler`` and ``image`` is given.
        ShapeError: If the size is empty, the images are not as many as the batch, an int is asked for sources of
            several aspects, or the upsampler returns another batch or other channels.
        ImageError: If ``image`` cannot be read.
    """
    grid = PatchGrid(*_dense_size(d, size), 1, 1)
    pixels = grid.network_size
    # Positions in half precision would be off by a good part of a token.
    maps = d.map.to(torch.promote_types(d.dtype, torch.float32))
    if upsampler is None and image is None:
        dense = spread_map(maps, d.grid, pixels)
    elif upsampler is None or image is None:
        given, absent = ("image", "upsampler") if upsampler is None else ("upsampler", "image")
        raise ConfigError(f"expected upsampler= and image= together, got {given}= only; pass {absent}= too, or neither")
    else:
        dense = _guided(upsampler, _tiled(maps, d.grid), _guides(image, d, pixels))
        if tuple(dense.shape[2:]) != pixels:
            dense = spread_map(dense, PatchGrid(dense.shape[2], dense.shape[3], 1, 1), pixels)
    frames = tuple(replace(frame, network_size=pixels) for frame in d.frames)
    return replace(d, features=dense.flatten(2).transpose(1, 2).to(d.dtype), grid=grid, frames=frames)


def _averaged(d: Descriptor, level: int) -> Float[Tensor, "batch rows cols dim"]:
    """Return the map averaged over 3^level × 3^level tokens, those beyond the border not counted."""
    maps = d.features.unflatten(1, (d.grid.rows, d.grid.cols))
    if level == 0:
        return maps
    # Permuted here, and not d.map: of one image, torch would not see in its strides that channels come last, and be
    # several times slower.
    channels_first = maps.permute(0, 3, 1, 2).to(torch.promote_types(d.dtype, torch.float32))
    pooled = F.avg_pool2d(channels_first, 3**level, stride=1, padding=3**level // 2, count_include_pad=False)
    return pooled.permute(0, 2, 3, 1).to(d.dtype)


def _bins(grid: PatchGrid, hierarchy: int) -> Int[Tensor, "tokens bins"]:
    """Return where each token's bins are in the levels' maps laid end to end."""
    rows, cols = torch.arange(grid.rows), torch.arange(grid.cols)
    bins = []
    for level in range(hierarchy):
        steps = (-(3**level), 0, 3**level)
        for down, across in ((down, across) for down in steps for across in steps):
            if level == 0 or (down, across) != (0, 0):
                row = (rows + down).clamp(0, grid.rows - 1)
                col = (cols + across).clamp(0, grid.cols - 1)
                bins.append((level * grid.tokens + row[:, None] * grid.cols + col).flatten())
    return torch.stack(bins, 1)


def _dense_size(d: Descriptor, size: object) -> Size:
    if size is None:
        return d.grid.network_size
    asked = as_size(size)
    sizes = {fit_size(frame.source_size, asked, 1) for frame in d.frames}
    if len(sizes) > 1:
        raise ShapeError(
            f"expected sources of one aspect for size={size}, got results of {sorted(sizes)}; try size=(height, width)"
        )
    return sizes.pop()


def _tiled(maps: Float[Tensor, "batch dim rows cols"], grid: PatchGrid) -> Float[Tensor, "batch dim new_rows new_cols"]:
    """Return the map on cells that tile the network image; as it is where its tokens do."""
    height, width = grid.network_size
    corners = grid.positions_of(torch.tensor([[0.0, 0.0], [width, height]]))
    if torch.allclose(corners, torch.tensor([[-0.5, -0.5], [grid.cols - 0.5, grid.rows - 0.5]])):
        return maps
    cols, rows = (corners[1] - corners[0]).round().int().tolist()  # the image's sides in steps of the grid
    return spread_map(maps, grid, (rows, cols))


def _guides(image: Images, d: Descriptor, size: Size) -> Float[Tensor, "batch 3 height width"]:
    loaded = load_images(image)
    if len(loaded) != len(d):
        raise ShapeError(f"expected as many images as were described ({len(d)}), got {len(loaded)}")
    return torch.cat([resize_images(one[None].to(d.device), size) for one in loaded])


def _guided(
    upsampler: Upsampler, maps: Float[Tensor, "batch dim rows cols"], images: Float[Tensor, "batch 3 height width"]
) -> Float[Tensor, "batch dim h w"]:
    dense = upsampler(maps, images)
    shape = tuple(dense.shape) if isinstance(dense, Tensor) else type(dense).__name__
    if not isinstance(dense, Tensor) or dense.ndim != 4 or dense.shape[:2] != maps.shape[:2] or not dense.numel():
        raise ShapeError(
            f"expected the upsampler to return a tensor ({maps.shape[0]}, {maps.shape[1]}, height, width), got {shape}"
        )
    return dense.to(maps.device, maps.dtype)
