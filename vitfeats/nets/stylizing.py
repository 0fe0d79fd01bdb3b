"""Networks of arbitrary style transfer, from maps of a VGG to images: several styles, regions, a strength.

After Huang and Belongie, Arbitrary Style Transfer in Real-time with Adaptive Instance Normalization, ICCV 2017; Park
and Lee, Arbitrary Style Transfer with Style-Attentional Networks, CVPR 2019; Liu et al., AdaAttN: Revisit Attention
Mechanism in Arbitrary Neural Style Transfer, ICCV 2021.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from vitfeats.errors import ConfigError, ShapeError
from vitfeats.nets.adaattn import (
    AdaAttN,
    AttentionPair,
    Decoder,
    Level,
    SANet,
    SANetPair,
    adain,
    key_of,
    normalised,
    sampled,
)

_LEVELS = 5  # relu1_1, relu2_1, relu3_1, relu4_1, relu5_1, each half the size of the one before


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
        elif isinstance(module, AttentionPair | SANetPair):
            # The mean of the maps that are added, two or, with the content beside what it attends to, four: what is
            # decoded has the scale of one map, whatever the method.
            module.merge_conv.weight.data /= 2 if isinstance(module, AttentionPair) else 4
