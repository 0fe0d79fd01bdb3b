"""The hourglass with skip connections of Ulyanov et al., Deep Image Prior, CVPR 2018: from an image to an image."""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from vitfeats.errors import ConfigError, ShapeError

CHANNELS = (16, 32, 64, 128, 128)
"""Of the generator that Splice trains (Tumanyan et al., CVPR 2022), from the finest scale to the coarsest."""

Padding = Literal["zeros", "reflect"]

_SLOPE = 0.2  # of LeakyReLU
_MARGIN = 1 / 512


class SkipNet(nn.Module):
    """An encoder-decoder in which a thin path joins both sides at every scale; its structure alone is a prior.

    A scale halves the image by a strided convolution, hands it on, doubles what comes back, and joins it to a few
    channels of its own input. Any height and width come back as they were. The last layer is a sigmoid.

    Every batch norm uses the statistics of what it sees, in training and in evaluation alike, as the published code
    does (it never leaves training mode). Pass one image at a time where images must not influence each other.

    Args:
        inputs: Channels of the input.
        outputs: Channels of the output.
        channels: Of each scale, from the finest.
        skip: Channels of the thin path at every scale.
        kernels: Side of the convolutions of each scale, odd; one number is used for all.
        padding: "zeros" or "reflect", at the borders of these convolutions.
        residual: Add what is made to the input's logits instead of painting anew: training begins at the input itself.
        generator: Source of the initial weights; None draws them from torch's global one.

    Raises:
        ConfigError: If there is no scale, or not as many kernels as scales, or a number is out of range.
    """

    def __init__(
        self,
        inputs: int = 3,
        outputs: int = 3,
        channels: Sequence[int] = CHANNELS,
        *,
        skip: int = 4,
        kernels: int | Sequence[int] = 3,
        padding: Padding = "zeros",
        residual: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        sides = [kernels] * len(channels) if isinstance(kernels, int) else list(kernels)
        _check(inputs, outputs, channels, skip, sides, padding)
        if residual and inputs != outputs:
            raise ConfigError(f"expected as many outputs as inputs for residual, got {outputs} and {inputs}")
        self.scales = len(channels)
        self.residual = residual
        where = torch.get_default_device()
        with torch.device("meta"):  # torch would draw weights of its own, from its global generator
            inside: _Scale | None = None
            for scale in reversed(range(self.scales)):
                before = inputs if scale == 0 else channels[scale - 1]
                inside = _Scale(before, channels[scale], skip, sides[scale], padding, inside)
            assert inside is not None
            self.body = inside
            self.head = nn.Conv2d(channels[0], outputs, 1)
        self.to_empty(device=where)
        initialise(self, generator=generator)

    @property
    def smallest(self) -> int:
        """Smallest side of an image: below it, the coarsest scale would be a single pixel, which has no spread."""
        return 2**self.scales + 1

    def forward(self, image: Float[Tensor, "batch inputs height width"]) -> Float[Tensor, "batch outputs height width"]:
        """Return an image of the same size, in 0..1.

        Raises:
            ShapeError: If both sides of a single image are smaller than :attr:`smallest`.
        """
        if len(image) == 1 and max(image.shape[-2:]) < self.smallest:
            raise ShapeError(
                f"expected an image with a side of at least {self.smallest} pixels for {self.scales} scales, got "
                f"{image.shape[-2]}×{image.shape[-1]}; enlarge it"
            )
        made = self.head(self.body(image))
        # Logits of pure black and white are infinite; within this margin of them, 8 bits show no difference.
        return (made + image.clamp(_MARGIN, 1 - _MARGIN).logit() if self.residual else made).sigmoid()


class _Scale(nn.Module):
    """One scale: half the size, what lies deeper, twice the size, joined to a thin path, and mixed."""

    def __init__(
        self, before: int, width: int, skip: int, side: int, padding: Padding, inside: "_Scale | None"
    ) -> None:
        super().__init__()
        self.beside = _convolved(before, skip, 1) if skip else None
        self.down = nn.Sequential(
            _convolved(before, width, side, stride=2, padding=padding), _convolved(width, width, side, padding=padding)
        )
        self.inside = inside
        deep = width if inside is None else inside.width
        self.join = _Norm(skip + deep)
        self.mix = _convolved(skip + deep, width, side, padding=padding)
        self.polish = _convolved(width, width, 1)
        self.skip, self.width = skip, width

    def forward(self, x: Tensor) -> Tensor:
        beside = None if self.beside is None else self.beside(x)
        deep = self.down(x)
        if self.inside is not None:
            deep = self.inside(deep)
        deep = F.interpolate(deep, scale_factor=2, mode="bilinear", align_corners=False)
        # A side of odd length came back one longer: it loses its last line, as the centre crop of the published code.
        deep = deep[..., : x.shape[-2], : x.shape[-1]]
        return self.polish(self._mixed(beside, deep))

    def _mixed(self, beside: Tensor | None, deep: Tensor) -> Tensor:
        """Return ``mix(join(cat([beside, deep])))``, without the concatenation.

        A convolution over concatenated channels is the sum of two. Apart, each has a number of channels that CPU
        kernels are made for: of 36 channels at the finest scale, the backward pass took three times as long.
        """
        convolution, norm, activation = self.mix
        assert isinstance(convolution, nn.Conv2d)
        weight = convolution.weight
        mixed = _convolve(convolution, self.join(deep, slice(self.skip, None)), weight[:, self.skip :])
        if beside is not None:
            thin = self.join(beside, slice(0, self.skip))
            mixed = mixed + _convolve(convolution, thin, weight[:, : self.skip], bias=False)
        return activation(norm(mixed))


def _convolve(convolution: nn.Conv2d, x: Tensor, weight: Tensor, *, bias: bool = True) -> Tensor:
    return convolution._conv_forward(x, weight, convolution.bias if bias else None)


def initialise(network: nn.Module, gain: float = 0.02, *, generator: torch.Generator | None = None) -> None:
    """Draw the weights as Splice does: Xavier's normal times ``gain``, N(1, gain) for batch norms; biases are 0."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.xavier_normal_(module.weight, gain, generator)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, 1.0, gain, generator)
        else:
            continue
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def _convolved(before: int, after: int, side: int, *, stride: int = 1, padding: Padding = "zeros") -> nn.Sequential:
    convolution = nn.Conv2d(before, after, side, stride, padding=side // 2, padding_mode=padding)
    return nn.Sequential(convolution, _Norm(after), nn.LeakyReLU(_SLOPE, inplace=True))


class _Norm(nn.BatchNorm2d):
    """A batch norm without running statistics: they would be averages over both images that Splice paints."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, track_running_stats=False)

    def forward(self, input: Tensor, channels: slice = slice(None)) -> Tensor:
        """Return some channels of the norm, given these channels of its input."""
        weight, bias = self.weight[channels], self.bias[channels]
        if len(input) == 1:  # a group for each channel: the same numbers, in a quarter to half of the time on a CPU
            return F.group_norm(input, len(weight), weight, bias, self.eps)
        return F.batch_norm(input, None, None, weight, bias, training=True, eps=self.eps)


def _check(
    inputs: int, outputs: int, channels: Sequence[int], skip: int, sides: Sequence[int], padding: Padding
) -> None:
    if not channels or min(inputs, outputs, *channels) < 1 or skip < 0:
        raise ConfigError(
            f"expected at least one scale and one channel each, got inputs={inputs}, outputs={outputs}, "
            f"channels={tuple(channels)}, skip={skip}"
        )
    if len(sides) != len(channels) or any(side < 1 or side % 2 == 0 for side in sides):
        raise ConfigError(f"expected one odd kernel for each of {len(channels)} scales, got {tuple(sides)}")
    if padding not in ("zeros", "reflect"):
        raise ConfigError(f"expected padding 'zeros' or 'reflect', got {padding!r}")
