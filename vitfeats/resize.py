"""Resampling of images, feature maps and position embeddings, in torch and differentiable."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from vitfeats.errors import ConfigError, nearest_names
from vitfeats.grid import PatchGrid, Size


def check_interpolation(name: str) -> None:
    """Raise ``ConfigError`` unless images can be resized so."""
    if name not in ("bicubic", "bilinear"):
        raise ConfigError(f"expected interpolation 'bicubic' or 'bilinear', got {name!r}")


def resize_images(
    images: Float[Tensor, "batch 3 height width"], size: Size, interpolation: str = "bicubic"
) -> Float[Tensor, "batch 3 new_height new_width"]:
    """Resize images in 0..1 to ``size`` = (height, width), antialiased; values stay in 0..1.

    Bicubic overshoots at edges; it is clamped as every 8-bit image library clamps it. An image that has the size
    already is returned as it is.
    """
    if tuple(images.shape[-2:]) == tuple(size):
        return images
    # A half-precision resize would lose what the antialiasing filter is for.
    resized = F.interpolate(images.float(), size=size, mode=interpolation, align_corners=False, antialias=True)
    return resized.clamp(0, 1).to(images.dtype)


def spread_map(
    maps: Float[Tensor, "batch dim rows cols"], grid: PatchGrid, size: Size, mode: str = "bilinear"
) -> Float[Tensor, "batch dim height width"]:
    """Resample token maps to the pixels of an image of ``size`` = (height, width), differentiable in the maps.

    Each token's value stands at the token's own centre; beyond the outermost centres the border value holds. With
    overlapping tokens this is not the same as stretching the map over the image, which shifts it by up to half of
    what a patch is larger than a stride.

    Args:
        maps: One value a token and channel.
        grid: Where the tokens are.
        size: (height, width) of the result in pixels; the grid's network image is stretched over it.
        mode: "bilinear", or "nearest" for the value of the nearest token.
    """
    network_h, network_w = grid.network_size
    steps_y = (torch.arange(size[0], device=maps.device) + 0.5) * network_h / size[0]
    steps_x = (torch.arange(size[1], device=maps.device) + 0.5) * network_w / size[1]
    y, x = torch.meshgrid(steps_y, steps_x, indexing="ij")
    return sample_map(maps, grid, torch.stack([x.flatten(), y.flatten()], 1), mode).unflatten(2, size)


def carry_detail(
    made: Float[Tensor, "batch 3 h w"],
    guide: Float[Tensor, "batch 3 h w"],
    full_guide: Float[Tensor, "batch 3 height width"],
    *,
    radius: int = 4,
    epsilon: float = 1e-3,
) -> Float[Tensor, "batch 3 height width"]:
    """Enlarge an image that was made from a small one, with the fine detail of the large one it was made from.

    In each window of the small images the made colours are written as an affine map of the guide's (the guided filter
    of He, Sun and Tang, ECCV 2010, with a colour guide). The maps are smooth, so they can be enlarged; applied to the
    large guide they give detail in the made image's colours. What the maps do not explain is enlarged as it is, so that
    an image of the guide's own size comes back unchanged.

    Args:
        made: The small image that was made, in 0..1.
        guide: The small image it was made from.
        full_guide: The large one.
        radius: Half the side of a window, in pixels of the small images.
        epsilon: Smallest variance of the guide that counts as detail.
    """
    size = (full_guide.shape[-2], full_guide.shape[-1])
    if size == tuple(made.shape[-2:]):
        return made
    kind = made.dtype
    made, guide, full_guide = made.float(), guide.float(), full_guide.float()
    factors, offset = _affine_maps(made, guide, radius, epsilon)

    def applied(image: Tensor, factors: Tensor, offset: Tensor) -> Tensor:
        return torch.einsum("bgihw,bghw->bihw", factors, image) + offset

    unexplained = made - applied(guide, factors, offset)
    flat = torch.cat([factors.flatten(1, 2), offset, unexplained], 1)
    flat = F.interpolate(flat, size=size, mode="bilinear", align_corners=False)
    factors, offset, unexplained = flat[:, :9].unflatten(1, (3, 3)), flat[:, 9:12], flat[:, 12:]
    return (applied(full_guide, factors, offset) + unexplained).clamp(0, 1).to(kind)


def guided_filter(
    maps: Float[Tensor, "batch dim height width"],
    guide: Float[Tensor, "batch 3 height width"],
    *,
    radius: int,
    epsilon: float,
) -> Float[Tensor, "batch dim height width"]:
    """Smooth maps so that their edges follow those of an image (He, Sun and Tang, ECCV 2010, with a colour guide).

    In each window a map is written as an affine map of the image's colours; the means of the windows' maps are applied.

    Args:
        maps: Of any number of channels, such as a mask of zeros and ones.
        guide: The image, in 0..1.
        radius: Half the side of a window in pixels.
        epsilon: Variance of the guide below which a window is taken for flat.
    """
    factors, offset = _affine_maps(maps.float(), guide.float(), radius, epsilon)
    return (torch.einsum("bgihw,bghw->bihw", factors, guide.float()) + offset).to(maps.dtype)


def _affine_maps(made: Tensor, guide: Tensor, radius: int, epsilon: float) -> tuple[Tensor, Tensor]:
    """Return factors (batch, 3 of the guide, dim made, h, w) and offsets (batch, dim, h, w) of each pixel's window."""
    device = guide.device
    if device.type == "mps":  # which has no float64
        made, guide = made.cpu(), guide.cpu()
    guide, made = guide.double(), made.double()  # a variance is a difference of two nearly equal numbers

    def mean(x: Tensor) -> Tensor:
        side = 2 * radius + 1  # first down, then across: of large windows, a small share of the sums
        down = F.avg_pool2d(x, (side, 1), 1, (radius, 0), count_include_pad=False)
        return F.avg_pool2d(down, (1, side), 1, (0, radius), count_include_pad=False)

    def outer(a: Tensor, b: Tensor) -> Tensor:  # covariances (batch, h, w, channels of a, channels of b)
        product = mean((a[:, :, None] * b[:, None]).flatten(1, 2)).unflatten(1, (a.shape[1], b.shape[1]))
        return (product - mean(a)[:, :, None] * mean(b)[:, None]).permute(0, 3, 4, 1, 2)

    floor = epsilon * torch.eye(3, dtype=guide.dtype, device=guide.device)
    factors = torch.linalg.solve(outer(guide, guide) + floor, outer(guide, made)).permute(0, 3, 4, 1, 2)
    offset = mean(made) - torch.einsum("bgihw,bghw->bihw", factors, mean(guide))
    smooth = mean(factors.flatten(1, 2)).unflatten(1, (3, made.shape[1]))
    return smooth.float().to(device), mean(offset).float().to(device)


def sample_map(
    maps: Float[Tensor, "batch dim rows cols"], grid: PatchGrid, points: Float[Tensor, "n 2"], mode: str = "bilinear"
) -> Float[Tensor, "batch dim n"]:
    """Read token maps at (x, y) network pixels, the same points for the whole batch, differentiable in the maps.

    Args:
        maps: One value a token and channel.
        grid: Where the tokens are; beyond the outermost centres the border value holds.
        points: (x, y) in network pixels.
        mode: "bilinear", or "nearest" for the value of the nearest token.
    """
    # grid_sample with align_corners=False: −1 and 1 are the outer edges of the outermost cells.
    where = (grid.positions_of(points) + 0.5) / points.new_tensor([grid.cols, grid.rows]) * 2 - 1
    where = where.to(maps.dtype).expand(len(maps), 1, -1, -1)
    return F.grid_sample(maps, where, mode=mode, padding_mode="border", align_corners=False)[:, :, 0]


@dataclass(frozen=True)
class PositionRule:
    """How a model family resamples its learned position embedding to another grid.

    Attributes:
        offset: Added to the target grid before the scale factor is taken (0.1 in DINO and DINOv2). With an offset the
            *scale factor* steers the sampling, so that ``(rows + offset) / stored_rows`` is used instead of the exact
            ratio: this is what the released models were evaluated with, and it moves every sampling point a little.
        antialias: Whether a smaller grid is low-pass filtered.
    """

    offset: float
    antialias: bool


POSITION_RULES: dict[str, PositionRule] = {
    "dino": PositionRule(offset=0.1, antialias=False),
    "dinov2": PositionRule(offset=0.1, antialias=False),
    "dinov2_reg": PositionRule(offset=0.0, antialias=True),
    "timm": PositionRule(offset=0.0, antialias=True),
    "transformers": PositionRule(offset=0.0, antialias=False),
}
"""The rules by name: DINO's and DINOv2's releases, DINOv2 with registers, and what the two libraries do themselves."""


def check_position_rule(name: str | None) -> None:
    """Raise ``ConfigError`` unless there is such a position rule, or none is asked for."""
    if name is not None and name not in POSITION_RULES:
        raise ConfigError(f"expected a position rule, got {name!r}. {nearest_names(name, POSITION_RULES)}")


def resize_positions(
    stored: Float[Tensor, "1 dim old_rows old_cols"], rows: int, cols: int, rule: str
) -> Float[Tensor, "1 dim rows cols"]:
    """Resample a position embedding to a grid of ``rows`` × ``cols``, bicubic, by a named rule.

    Raises:
        ConfigError: If there is no such rule.
    """
    check_position_rule(rule)
    chosen = POSITION_RULES[rule]
    if not chosen.offset:
        return F.interpolate(
            stored.float(), size=(rows, cols), mode="bicubic", align_corners=False, antialias=chosen.antialias
        ).to(stored.dtype)
    factors = ((rows + chosen.offset) / stored.shape[-2], (cols + chosen.offset) / stored.shape[-1])
    return F.interpolate(
        stored.float(),
        scale_factor=factors,
        mode="bicubic",
        align_corners=False,
        antialias=chosen.antialias,
        recompute_scale_factor=False,
    ).to(stored.dtype)
