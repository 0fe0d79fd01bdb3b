"""Style transfer by statistics and by attention: the modules of AdaIN, SANet and AdaAttN, on maps of a VGG.

After Huang and Belongie, Arbitrary Style Transfer in Real-time with Adaptive Instance Normalization, ICCV 2017; Park
and Lee, Arbitrary Style Transfer with Style-Attentional Networks, CVPR 2019; Liu et al., AdaAttN: Revisit Attention
Mechanism in Arbitrary Neural Style Transfer, ICCV 2021.

A plane is whatever follows the channels of a tensor: (height, width) of a map, or positions in a row.
"""

from collections.abc import Callable, Sequence
from functools import partial
from math import prod
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vitfeats.errors import ConfigError, ShapeError
from vitfeats.grid import Size

EPSILON = 1e-5
"""Added to the variance of a channel before its root is taken."""

ATTENTION_BYTES = 64 * 2**20
"""Most memory of the attention weights that are held at a time, in bytes; their gradients come on top."""

_LEAST_VARIANCE = 1e-10  # of attended values: at 0 the root has no gradient


# Statistics -----------------------------------------------------------------------------------------------------------


def moments(
    x: Float[Tensor, "batch channels *plane"],
) -> tuple[Float[Tensor, "batch channels *one"], Float[Tensor, "batch channels *one"]]:
    """Return the mean and the standard deviation of each channel over its plane, each side of the plane 1.

    The deviation is the root of the unbiased variance plus :data:`EPSILON`; the variance of a single position is 0.
    Half precision is widened to float32, in which the statistics are returned.
    """
    plane, count = tuple(range(2, x.ndim)), prod(x.shape[2:])
    variance, mean = torch.var_mean(_wide(x), plane, correction=min(1, count - 1), keepdim=True)
    return mean, (variance + EPSILON).sqrt()


def normalised(x: Float[Tensor, "batch channels *plane"]) -> Float[Tensor, "batch channels *plane"]:
    """Return the features with mean 0 and deviation 1 in each channel (0 everywhere in a channel of one value)."""
    mean, std = moments(x)
    return ((x - mean) / std).to(x.dtype)


def adain(
    content: Float[Tensor, "batch channels *here"], style: Float[Tensor, "batch channels *there"]
) -> Float[Tensor, "batch channels *here"]:
    """Return the content's features with the mean and the deviation of the style's in each channel.

    Both planes have as many sides.
    """
    mean, std = moments(style)
    return (normalised(content) * std + mean).to(content.dtype)


def key_of(features: Sequence[Float[Tensor, "batch _ _ _"]], level: int) -> Float[Tensor, "batch dim rows cols"]:
    """Return AdaAttN's keys: normalised features of a level and of all shallower ones, their channels concatenated.

    Args:
        features: Maps of one image batch, from the finest.
        level: Index of the level; the shallower maps are brought to its size, each cell the nearest of theirs.
    """
    size = features[level].shape[-2:]
    shallower = [F.interpolate(x, size=size, mode="nearest") for x in features[:level]]
    return torch.cat([normalised(x) for x in (*shallower, features[level])], 1)


# Attention ------------------------------------------------------------------------------------------------------------


def attend(
    query: Float[Tensor, "batch dim *here"],
    key: Float[Tensor, "batch dim *there"],
    value: Float[Tensor, "batch channels *there"],
    *,
    log_weights: Float[Tensor, "batch m"] | None = None,
    regions: tuple[Int[Tensor, "batch n"], Int[Tensor, "batch m"]] | None = None,
    chunk: int | None = None,
) -> Float[Tensor, "batch channels *here"]:
    """Return at each content position the mean of the style's values, weighted by a softmax over style positions.

    The logits are plain products of query and key, not divided by the root of their length. They are computed in
    float32 at least, also under autocast: they are so large that bfloat16 would change which position is looked at.

    Content positions are taken in chunks, so that memory grows with the number of style positions and not with the
    product of both; the result is the same. Where gradients are wanted, the weights of a chunk are computed again in
    the backward pass.

    Args:
        query: Of the content.
        key: Of the style.
        value: Of the style.
        log_weights: Added to the logits of each style position, so that positions of several styles, put in one row,
            have shares of their own; −inf leaves a position out.
        regions: A label of each content position and of each style position: a content position attends to style
            positions of its own label only, or to all where there are none of it.
        chunk: Content positions at a time; None is what fits into :data:`ATTENTION_BYTES`.

    Raises:
        ConfigError: If ``chunk`` is less than 1, or all style positions of an image are left out.
    """
    if chunk is not None and chunk < 1:
        raise ConfigError(f"expected a chunk of at least 1 content position, got {chunk}")
    if log_weights is not None and not log_weights.isfinite().any(1).all():
        raise ConfigError("expected a finite log-weight of at least one style position of each image, got none")
    with torch.autocast(query.device.type, enabled=False):
        queries, keys = _wide(query).flatten(2).transpose(1, 2), _wide(key).flatten(2)
        values = _wide(value).flatten(2).transpose(1, 2)
        bytes_each = keys.shape[0] * keys.shape[2] * keys.element_size()
        rows = chunk or max(1, ATTENTION_BYTES // bytes_each)
        parts = queries.split(rows, 1)
        labels = [None] * len(parts) if regions is None else [(x, regions[1]) for x in regions[0].split(rows, 1)]
        run: Callable[..., Tensor] = _attended
        if len(parts) > 1 and torch.is_grad_enabled():  # a single chunk is within the bound already
            run = partial(checkpoint, _attended, use_reentrant=False, preserve_rng_state=False)
        found = [run(*pair, keys, values, log_weights) for pair in zip(parts, labels, strict=True)]
        attended = torch.cat(found, 1).transpose(1, 2)
    return attended.reshape(*attended.shape[:2], *query.shape[2:]).to(value.dtype)


def attend_moments(
    query: Float[Tensor, "batch dim *here"],
    key: Float[Tensor, "batch dim *there"],
    value: Float[Tensor, "batch channels *there"],
    *,
    log_weights: Float[Tensor, "batch m"] | None = None,
    regions: tuple[Int[Tensor, "batch n"], Int[Tensor, "batch m"]] | None = None,
    chunk: int | None = None,
) -> tuple[Float[Tensor, "batch channels *here"], Float[Tensor, "batch channels *here"]]:
    """Return at each content position the attention-weighted mean and standard deviation of the style's values.

    With weights S and values V they are S·V and √(S·V² − (S·V)²). A variance below 1e-10, which rounding alone can
    make, counts as that and has no gradient, so that a style of one colour gives no NaN. The arguments and errors are
    those of :func:`attend`.
    """
    kind, value = value.dtype, _wide(value).flatten(2)
    # A variance is a difference of two nearly equal numbers: less so where the values are about 0. It does not depend
    # on what is taken off.
    centre = value.detach().mean(2, keepdim=True)
    both = torch.cat([value - centre, (value - centre) ** 2], 1)
    both = attend(query, key.flatten(2), both, log_weights=log_weights, regions=regions, chunk=chunk)
    mean, square = both.chunk(2, 1)
    std = (square - mean**2).clamp(min=_LEAST_VARIANCE).sqrt()
    return (mean + centre.reshape(*centre.shape[:2], *[1] * (query.ndim - 2))).to(kind), std.to(kind)


def sampled(count: int, most: int | None, generator: torch.Generator | None = None) -> Int[Tensor, " kept"] | None:
    """Return the indices of ``most`` positions, drawn without repetition; None where all of them stay.

    Args:
        count: How many positions there are.
        most: How many to keep at most; None keeps all.
        generator: Source of the draw; None is a new one with seed 0. The global one is left alone.

    Raises:
        ConfigError: If ``most`` is less than 1.
    """
    if most is None or count <= most:
        return None
    if most < 1:
        raise ConfigError(f"expected at least 1 style position to be kept, got most={most}; None keeps all")
    source = torch.Generator().manual_seed(0) if generator is None else generator
    return torch.randperm(count, generator=source, device=source.device)[:most]


def _attended(
    queries: Tensor,
    labels: tuple[Tensor, Tensor] | None,
    keys: Tensor,
    values: Tensor,
    log_weights: Tensor | None,
) -> Tensor:
    """Attend from (batch, n, dim) to keys (batch, dim, m) and values (batch, m, channels)."""
    logits = queries @ keys
    if labels is not None:
        same = labels[0][:, :, None] == labels[1][:, None]
        if log_weights is not None:
            same &= (log_weights > -torch.inf)[:, None]
        logits = logits.masked_fill(~(same | ~same.any(2, keepdim=True)), -torch.inf)
    if log_weights is not None:
        logits = logits + log_weights[:, None]
    return logits.softmax(2) @ values


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


# Modules, with the names of the published weights ---------------------------------------------------------------------


class AdaAttN(nn.Module):
    """Normalised content, scaled and shifted at each position by what it attends to in the style.

    Args:
        channels: Of content and style.
        key_channels: Of their keys, see :func:`key_of`.
        inner: Channels that keys are compared in; None is all of them, as published.
    """

    def __init__(self, channels: int, key_channels: int, inner: int | None = None) -> None:
        super().__init__()
        self.f = nn.Conv2d(key_channels, inner or key_channels, 1)
        self.g = nn.Conv2d(key_channels, inner or key_channels, 1)
        self.h = nn.Conv2d(channels, channels, 1)

    def forward(
        self,
        content: Float[Tensor, "batch channels rows cols"],
        style: Float[Tensor, "batch channels height width"],
        content_key: Float[Tensor, "batch dim rows cols"],
        style_key: Float[Tensor, "batch dim height width"],
        *,
        log_weights: Float[Tensor, "batch m"] | None = None,
        regions: tuple[Int[Tensor, "batch n"], Int[Tensor, "batch m"]] | None = None,
    ) -> Float[Tensor, "batch channels rows cols"]:
        """Return the stylised content; ``log_weights`` and ``regions`` are those of :func:`attend`."""
        mean, std = attend_moments(
            self.f(content_key), self.g(style_key), self.h(style), log_weights=log_weights, regions=regions
        )
        return std * normalised(content) + mean


class SANet(nn.Module):
    """Content plus what each of its positions attends to in the style; keys are the normalised features themselves.

    Args:
        channels: Of content and style.
        inner: Channels that keys are compared in; None is all of them, as published.
    """

    def __init__(self, channels: int, inner: int | None = None) -> None:
        super().__init__()
        self.f = nn.Conv2d(channels, inner or channels, 1)
        self.g = nn.Conv2d(channels, inner or channels, 1)
        self.h = nn.Conv2d(channels, channels, 1)
        self.out_conv = nn.Conv2d(channels, channels, 1)

    def forward(
        self,
        content: Float[Tensor, "batch channels rows cols"],
        style: Float[Tensor, "batch channels height width"],
        content_key: Float[Tensor, "batch channels rows cols"],
        style_key: Float[Tensor, "batch channels height width"],
        *,
        log_weights: Float[Tensor, "batch m"] | None = None,
        regions: tuple[Int[Tensor, "batch n"], Int[Tensor, "batch m"]] | None = None,
    ) -> Float[Tensor, "batch channels rows cols"]:
        """Return the stylised content; the keys are :func:`normalised` content and style."""
        attended = attend(
            self.f(content_key), self.g(style_key), self.h(style), log_weights=log_weights, regions=regions
        )
        return self.out_conv(attended) + content


class Level(NamedTuple):
    """One level of the content, and the style positions of all styles in one row, ready to be attended to.

    Attributes:
        content: Map of the content.
        content_key: Its keys.
        style: Values (batch, channels, m, 1).
        style_key: Keys (batch, dim, m, 1).
        log_weights: See :func:`attend`.
        regions: See :func:`attend`.
    """

    content: Tensor
    content_key: Tensor
    style: Tensor
    style_key: Tensor
    log_weights: Tensor | None
    regions: tuple[Tensor, Tensor] | None

    def through(self, attention: nn.Module) -> Tensor:
        """Return what an :class:`AdaAttN` or :class:`SANet` makes of it."""
        maps = (self.content, self.style, self.content_key, self.style_key)
        return attention(*maps, log_weights=self.log_weights, regions=self.regions)


class AttentionPair(nn.Module):
    """AdaAttN at relu4_1 and relu5_1; the coarser map is doubled and added to the finer, and a convolution follows.

    Args:
        channels: Of the five levels.
        inner: See :class:`AdaAttN`.
    """

    def __init__(self, channels: Sequence[int], inner: int | None = None) -> None:
        super().__init__()
        self.attn_adain_4_1 = AdaAttN(channels[3], sum(channels[:4]), inner)
        self.attn_adain_5_1 = AdaAttN(channels[4], sum(channels), inner)
        self.merge_conv = nn.Conv2d(channels[3], channels[3], 3)

    def forward(self, four: Level, five: Level) -> Float[Tensor, "batch channels rows cols"]:
        """Return the fused map, of the size of relu4_1."""
        return _merged(self.merge_conv, four.through(self.attn_adain_4_1), five.through(self.attn_adain_5_1))


class SANetPair(nn.Module):
    """SANet at relu4_1 and relu5_1, fused as in :class:`AttentionPair`.

    Args:
        channels: Of both levels.
        inner: See :class:`SANet`.
    """

    def __init__(self, channels: int, inner: int | None = None) -> None:
        super().__init__()
        self.sanet4_1 = SANet(channels, inner)
        self.sanet5_1 = SANet(channels, inner)
        self.merge_conv = nn.Conv2d(channels, channels, 3)

    def forward(self, four: Level, five: Level) -> Float[Tensor, "batch channels rows cols"]:
        """Return the fused map, of the size of relu4_1."""
        return _merged(self.merge_conv, four.through(self.sanet4_1), five.through(self.sanet5_1))


class Decoder(nn.Module):
    """Nine 3×3 convolutions with mirrored edges from relu4_1 to an image; after three of them the map is doubled.

    Args:
        channels: Of the map at relu4_1.
        widths: Channels of its layers at the sizes of relu1_1, relu2_1 and relu3_1; (64, 128, 256) as published.
        beside: Channels of a second map, of the size of relu3_1, that joins after the first doubling; 0 for none.
    """

    doubled_after: ClassVar = (0, 4, 6)

    def __init__(self, channels: int, widths: Sequence[int], beside: int = 0) -> None:
        super().__init__()
        one, two, three = widths
        sides = [channels, three, three, three, three, two, two, one, one, 3]
        inputs = [channels, three + beside, *sides[2:-1]]
        self.convs = nn.ModuleList(
            nn.Conv2d(before, after, 3, padding=1, padding_mode="reflect")
            for before, after in zip(inputs, sides[1:], strict=True)
        )

    def forward(
        self,
        x: Float[Tensor, "batch channels rows cols"],
        sizes: Sequence[Size],
        beside: Float[Tensor, "batch _ _ _"] | None = None,
    ) -> Float[Tensor, "batch 3 height width"]:
        """Return an image; its values are not bounded, those of a good one lie in 0..1.

        Args:
            x: Stylised map of relu4_1.
            sizes: (height, width) after each doubling: those of relu3_1, relu2_1 and relu1_1.
            beside: The second map, if the decoder takes one.
        """
        left = list(sizes)
        for index, conv in enumerate(self.convs):
            if index == self.doubled_after[0] + 1 and beside is not None:
                x = torch.cat([x, beside], 1)
            x = conv(x)
            if index < len(self.convs) - 1:
                x = x.relu()
            if index in self.doubled_after:
                x = doubled(x, left.pop(0))
        return x


def doubled(x: Float[Tensor, "batch channels _ _"], size: Size) -> Float[Tensor, "batch channels height width"]:
    """Return a map of twice the size, each cell four times, less or plus the last line of a side of odd length.

    Args:
        x: The map.
        size: (height, width) of the result. Half of an odd side may have been rounded down or up.

    Raises:
        ShapeError: If a side is not twice that of the map, or one more or less.
    """
    missing = [wanted - 2 * side for wanted, side in zip(size, x.shape[-2:], strict=True)]
    if max(map(abs, missing)) > 1:
        raise ShapeError(
            f"expected maps that halve from level to level, got one of {tuple(x.shape[-2:])} below one of {size}"
        )
    x = F.interpolate(x, scale_factor=2, mode="nearest")[..., : size[0], : size[1]]
    return F.pad(x, (0, max(0, missing[1]), 0, max(0, missing[0])), mode="replicate") if 1 in missing else x


def _merged(conv: nn.Conv2d, four: Tensor, five: Tensor) -> Tensor:
    size = (four.shape[-2], four.shape[-1])
    return conv(F.pad(four + doubled(five, size), (1, 1, 1, 1), mode="reflect"))
