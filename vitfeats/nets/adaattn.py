"""Networks of arbitrary style transfer by statistics and by attention: AdaIN, SANet and AdaAttN, on maps of a VGG.

After Huang and Belongie, Arbitrary Style Transfer in Real-time with Adaptive Instance Normalization, ICCV 2017; Park
and Lee, Arbitrary Style Transfer with Style-Attentional Networks, CVPR 2019; Liu et al., AdaAttN: Revisit Attention
Mechanism in Arbitrary Neural Style Transfer, ICCV 2021.

A plane is whatever follows the channels of a tensor: (height, width) of a map, or positions in a row.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
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

_LEVELS = 5  # relu1_1, relu2_1, relu3_1, relu4_1, relu5_1, each half the size of the one before
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

    def forward(self, four: "Level", five: "Level") -> Float[Tensor, "batch channels rows cols"]:
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

    def forward(self, four: "Level", five: "Level") -> Float[Tensor, "batch channels rows cols"]:
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


# Whole networks -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Style:
    """One style of several.

    Attributes:
        features: Its maps relu1_1, relu2_1, relu3_1, relu4_1 and relu5_1, for all contents or for each of a batch.
        weight: Its share, in proportion to those of the others; 0 leaves it out.
        regions: Labels (batch, height, width) over its image, in any resolution; one label for all of it; or None
            where the content has none either.
    """

    features: Sequence[Float[Tensor, "batch _ _ _"]]
    weight: float = 1.0
    regions: Int[Tensor, "batch height width"] | int | None = None


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


@dataclass(frozen=True, eq=False)
class Scene:
    """What a network stylises: maps of the content, the styles, and how they are to be used (see StyleNetwork)."""

    content: Sequence[Tensor]
    styles: Sequence[Style]
    regions: Tensor | None = None
    most: int | None = None
    generator: torch.Generator | None = None

    def level(self, index: int, *, shallower: bool) -> Level:
        """Return one level, with keys of its own map or of the shallower ones, too.

        A position of a style has that style's weight divided by the number of its positions: a style does not count
        more for being larger.
        """

        def keys(features: Sequence[Tensor]) -> Tensor:
            return key_of(features, index) if shallower else normalised(features[index])

        content = self.content[index]
        batch = len(content)
        columns: list[list[Tensor]] = []
        for style in self.styles:
            value = style.features[index]
            labels = _labels(style.regions, value, batch)[:, None]
            kept = sampled(prod(value.shape[2:]), self.most, self.generator)
            parts = [part.expand(batch, -1, -1, -1).flatten(2) for part in (value, keys(style.features), labels)]
            parts = parts if kept is None else [part[:, :, kept.to(part.device)] for part in parts]
            share = torch.full((batch, 1, parts[0].shape[2]), style.weight, device=value.device)
            columns.append([*parts, (share / share.shape[2]).log()])
        values, style_keys, labels, shares = (torch.cat(column, 2) for column in zip(*columns, strict=True))
        here = _labels(self.regions, content, batch).flatten(1)
        return Level(
            content,
            keys(self.content),
            values[..., None],
            style_keys[..., None],
            shares[:, 0] if len(self.styles) > 1 else None,
            None if self.regions is None else (here, labels[:, 0]),
        )


class StyleNetwork(nn.Module, ABC):
    """From maps of a content and of styles to an image; one subclass a method.

    Args:
        channels: Of the maps relu1_1, relu2_1, relu3_1, relu4_1 and relu5_1.
        widths: Of the decoder, see :class:`Decoder`; None is the first three of ``channels``, as published.
        inner: Channels that keys are compared in, where the method attends; None is as published.
        generator: Source of the initial weights; None draws them from torch's global one.

    Raises:
        ConfigError: If there are not five channels and three widths of at least 1, or relu4_1 and relu5_1 differ in
            channels where the method adds them.
    """

    method: ClassVar[str]
    fuses: ClassVar[bool] = True
    decoder: Decoder

    def __init__(
        self,
        channels: Sequence[int],
        widths: Sequence[int] | None = None,
        inner: int | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.channels = tuple(channels)
        self.widths = tuple(channels[:3] if widths is None else widths)
        self.inner = inner
        numbers = (*self.channels, *self.widths, *([] if inner is None else [inner]))
        if len(self.channels) != _LEVELS or len(self.widths) != 3 or min(numbers) < 1:
            raise ConfigError(
                f"expected {_LEVELS} channels, 3 widths, and at least 1 each, got channels={self.channels}, "
                f"widths={self.widths}, inner={inner}"
            )
        if self.fuses and self.channels[3] != self.channels[4]:
            raise ConfigError(
                f"expected as many channels at relu4_1 as at relu5_1 for '{self.method}', which adds them, got "
                f"{self.channels[3]} and {self.channels[4]}; try 'adain', or another encoder"
            )
        where = torch.get_default_device()
        with torch.device("meta"):  # torch would draw weights of its own, from its global generator
            self.build()
        self.to_empty(device=where)
        _draw(self, generator)

    @abstractmethod
    def build(self) -> None:
        """Make the modules that are called as those of the published weights, and ``decoder``."""

    @abstractmethod
    def stylised(self, scene: Scene) -> tuple[Tensor, Tensor | None]:
        """Return the stylised map at relu4_1, and the one at relu3_1 that the decoder takes beside it, or None."""

    def forward(
        self,
        content: Sequence[Float[Tensor, "batch _ _ _"]],
        styles: Sequence[Float[Tensor, "_ _ _ _"]] | Sequence[Style],
        *,
        strength: float = 1.0,
        regions: Int[Tensor, "_ _ _"] | None = None,
        most: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, "batch 3 height width"]:
        """Return the content in the style, of the content's size; values are not bounded.

        Args:
            content: Its maps relu1_1 to relu5_1.
            styles: The maps of one style, for all contents or for each of the batch; or several :class:`Style`.
            strength: 0 to 1: how much of the stylised features is blended with those of the content as its own style
                (as in SANet; the content's own features, in AdaIN).
            regions: Labels (batch, height, width) over the content, in any resolution: each region takes the style of
                the styles' regions of the same label, or of all where there are none of it.
            most: Style positions of each style to attend to at most, drawn at random; None is all of them.
            generator: Source of the draw, see :func:`sampled`.

        Raises:
            ShapeError: If the maps are not those the network was made for, or the image is smaller than 16 pixels.
            ConfigError: If the strength or a weight is out of range, or only some of content and styles have regions.
        """
        several = [style for style in styles if isinstance(style, Style)]
        several = several or [Style([x for x in styles if isinstance(x, Tensor)])]
        self._check(content, several, strength, regions)
        scene = Scene(content, [style for style in several if style.weight > 0], regions, most, generator)
        top, beside = self.stylised(scene)
        if strength < 1:
            own_top, own_beside = self.stylised(Scene(content, [Style(content)], None, most, generator))
            top = own_top.lerp(top, strength)
            beside = None if beside is None or own_beside is None else own_beside.lerp(beside, strength)
        return self.decoder(top, [(x.shape[-2], x.shape[-1]) for x in content[2::-1]], beside)

    def _check(
        self, content: Sequence[Tensor], styles: Sequence[Style], strength: float, regions: Tensor | None
    ) -> None:
        for what, maps in [("the content", content), *(("a style", style.features) for style in styles)]:
            found = tuple(x.shape[1] for x in maps)
            if found != self.channels:
                raise ShapeError(f"expected five maps of {what} with {self.channels} channels, got {found}")
            if any(len(x) not in (1, len(content[0])) for x in maps):
                raise ShapeError(
                    f"expected one image of {what}, or one for each of {len(content[0])} contents, got {len(maps[0])}"
                )
        if min(content[3].shape[-2:]) < 2:
            raise ShapeError(
                f"expected a content of at least 16×16 pixels, got {content[0].shape[-2]}×{content[0].shape[-1]}"
            )
        if not 0 <= strength <= 1:
            raise ConfigError(f"expected a strength in 0..1, got {strength}")
        weights = [style.weight for style in styles]
        if not all(0 <= weight < float("inf") for weight in weights) or not sum(weights) > 0:
            raise ConfigError(f"expected weights of styles of 0 or more, and one above 0, got {weights}")
        if any((style.regions is None) != (regions is None) for style in styles):
            raise ConfigError(
                "expected regions of the content and of every style, or none at all; one label for the whole of a "
                "style is a region, too"
            )


class AdaINNetwork(StyleNetwork):
    """AdaIN at relu4_1 and a decoder. It attends to nothing: ``inner``, ``most`` and ``generator`` play no part.

    Several styles are blended as weighted means of the stylised features. With regions, the statistics of content and
    styles are those of each region; a style without positions of a region takes no part in it.
    """

    method = "adain"
    fuses = False

    def build(self) -> None:
        """Make the modules."""
        self.decoder = Decoder(self.channels[3], self.widths)

    def stylised(self, scene: Scene) -> tuple[Tensor, None]:
        """Return the stylised map at relu4_1."""
        content, weights = scene.content[3], [style.weight for style in scene.styles]
        batch = len(content)
        styles = [style.features[3].expand(batch, -1, -1, -1) for style in scene.styles]
        if scene.regions is None:
            return _mean([adain(content, style) for style in styles], weights), None
        labels = _labels(scene.regions, content, batch)
        of_styles = [_labels(style.regions, x, batch) for style, x in zip(scene.styles, styles, strict=True)]
        made = content.clone()
        for item in range(batch):
            for label in labels[item].unique():
                here, there = labels[item] == label, [marks[item] == label for marks in of_styles]
                if not any(marks.any() for marks in there):
                    there = [torch.ones_like(marks) for marks in there]
                taking = [index for index, marks in enumerate(there) if marks.any()]
                parts = [adain(content[item, :, here][None], styles[s][item, :, there[s]][None]) for s in taking]
                made[item, :, here] = _mean(parts, [weights[s] for s in taking])[0]
        return made, None


class SANetNetwork(StyleNetwork):
    """SANet at relu4_1 and relu5_1, fused, and a decoder. Styles and regions share the attention."""

    method = "sanet"

    def build(self) -> None:
        """Make the modules."""
        self.transformer = SANetPair(self.channels[3], self.inner)
        self.decoder = Decoder(self.channels[3], self.widths)

    def stylised(self, scene: Scene) -> tuple[Tensor, None]:
        """Return the fused map at relu4_1."""
        return self.transformer(scene.level(3, shallower=False), scene.level(4, shallower=False)), None


class AdaAttNNetwork(StyleNetwork):
    """AdaAttN at relu3_1, relu4_1 and relu5_1, and a decoder. Styles and regions share the attention."""

    method = "adaattn"

    def build(self) -> None:
        """Make the modules."""
        self.adaattn_3 = AdaAttN(self.channels[2], sum(self.channels[:3]), self.inner)
        self.transformer = AttentionPair(self.channels, self.inner)
        self.decoder = Decoder(self.channels[3], self.widths, beside=self.channels[2])

    def stylised(self, scene: Scene) -> tuple[Tensor, Tensor]:
        """Return the fused map at relu4_1, and the one at relu3_1."""
        three, four, five = (scene.level(index, shallower=True) for index in (2, 3, 4))
        return self.transformer(four, five), three.through(self.adaattn_3)


NETWORKS: dict[str, type[StyleNetwork]] = {
    network.method: network for network in (AdaAttNNetwork, SANetNetwork, AdaINNetwork)
}
"""The networks by the name of their method."""


def _mean(parts: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    shares = torch.tensor(weights, dtype=parts[0].dtype, device=parts[0].device) / sum(weights)
    return torch.einsum("s,s...->...", shares, torch.stack(list(parts)))


def _labels(regions: Tensor | int | None, x: Tensor, batch: int) -> Int[Tensor, "batch rows cols"]:
    """Return the label at the centre of each cell of a map; 0 where there are no regions."""
    rows, cols = x.shape[-2:]
    if regions is None or isinstance(regions, int):
        return torch.full((batch, rows, cols), regions or 0, device=x.device)
    if regions.ndim != 3 or len(regions) not in (1, batch):
        raise ShapeError(
            f"expected labels of regions as ({batch} or 1, height, width), got {tuple(regions.shape)}; one label for "
            "the whole of a style is a plain number"
        )
    height, width = regions.shape[1:]
    down = ((torch.arange(rows, device=x.device) + 0.5) * height / rows).long()
    right = ((torch.arange(cols, device=x.device) + 0.5) * width / cols).long()
    return regions.to(x.device)[:, down][:, :, right].expand(batch, -1, -1)


def _draw(network: StyleNetwork, generator: torch.Generator | None) -> None:
    """Draw the weights; biases are 0.

    Attention begins as what it is without learned weights, but for fewer channels: content and style are compared in
    the same random projection, and values pass as they are. From the first step, what is decoded has the style's
    statistics.
    """
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d):
            if name.startswith("decoder"):  # He's: nine layers one behind the other keep the scale of the features
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu", generator=generator)
            elif name.endswith((".f", ".g")):  # torch's own, which are smaller: a softmax of large logits learns little
                nn.init.kaiming_uniform_(module.weight, a=5**0.5, generator=generator)
            else:
                nn.init.dirac_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for module in network.modules():
        if isinstance(module, AdaAttN | SANet):
            module.g.load_state_dict(module.f.state_dict())
