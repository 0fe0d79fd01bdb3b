"""Networks in the manner of VGG, whose layers are read by the names that style transfer knows them by."""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

_BLOCKS = ((32, 2), (64, 2), (128, 2), (256, 2), (256, 1))  # channels and convolutions of each
_NORMALISED = ((64, 2), (128, 2), (256, 4), (512, 4), (512, 4))  # the same of VGG-19


class SmallVgg(nn.Sequential):
    """Convolutions 3×3 from ``relu1_1`` to ``relu5_1``, in blocks with a maximum over 2×2 between (1.7 M parameters).

    After Simonyan and Zisserman, Very Deep Convolutional Networks for Large-Scale Image Recognition, ICLR 2015, with
    fewer channels, and edges mirrored in place of zeros, which style transfer would show.

    Args:
        norm: With a batch norm behind each convolution, to be trained; :meth:`folded` is without.
        blocks: (channels, convolutions) of each block.

    Attributes:
        num_features: Channels of the last layer.
        reduction: Pixels of a side of its cells.
    """

    def __init__(self, *, norm: bool = False, blocks: Sequence[tuple[int, int]] = _BLOCKS) -> None:
        super().__init__()
        before = 3
        for block, (channels, count) in enumerate(blocks, 1):
            if block > 1:
                self.add_module(f"pool{block - 1}", nn.MaxPool2d(2))
            for number in range(1, count + 1):
                conv = nn.Conv2d(before, channels, 3, padding=1, padding_mode="reflect", bias=not norm)
                nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
                self.add_module(f"conv{block}_{number}", conv)
                if norm:
                    self.add_module(f"norm{block}_{number}", nn.BatchNorm2d(channels))
                self.add_module(f"relu{block}_{number}", nn.ReLU())
                before = channels
        self.blocks_of = tuple(blocks)
        self.num_features = before
        self.reduction = 2 ** (len(blocks) - 1)

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the layers that can be read, in the order they run."""
        return tuple(name for name, _ in self.named_children() if name.startswith("relu"))

    def forward_features(self, images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch dim rows cols"]:
        """Return the map of the last layer; the images are normalised, their sides at least 32 pixels."""
        return self(images)

    @torch.no_grad()
    def folded(self) -> "SmallVgg":
        """Return the same network without norms: in evaluation they are part of the convolutions before them.

        Raises:
            KeyError: If it has no norms.
        """
        plain = SmallVgg(blocks=self.blocks_of)
        own, new = dict(self.named_children()), dict(plain.named_children())
        for name in self.layers:
            suffix = name.removeprefix("relu")
            conv, norm, target = own[f"conv{suffix}"], own[f"norm{suffix}"], new[f"conv{suffix}"]
            scale = norm.weight / (norm.running_var + norm.eps).sqrt()  # type: ignore[operator]
            target.weight.copy_(conv.weight * scale[:, None, None, None])  # type: ignore[operator]
            target.bias.copy_(norm.bias - norm.running_mean * scale)  # type: ignore[operator]
        return plain.eval()


class NormalisedVgg(nn.Sequential):
    """VGG-19 as style transfer uses it: published as ``vgg_normalised.pth``, for images in 0..1 without mean and std.

    Its weights are scaled so that the mean activation of each channel is 1 (Gatys, Ecker and Bethge, Image Style
    Transfer Using Convolutional Neural Networks, CVPR 2016), edges are mirrored, and a first convolution 1×1 normalises
    the image. Odd sides are halved upwards. The 53 layers are in the published order; the published file has their
    numbers for names, see :meth:`named_as_here`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.add_module("conv0", nn.Conv2d(3, 3, 1))
        before = 3
        for block, (channels, count) in enumerate(_NORMALISED, 1):
            if block > 1:
                self.add_module(f"pool{block - 1}", nn.MaxPool2d(2, ceil_mode=True))
            for number in range(1, count + 1):
                self.add_module(f"pad{block}_{number}", nn.ReflectionPad2d(1))
                self.add_module(f"conv{block}_{number}", nn.Conv2d(before, channels, 3))
                self.add_module(f"relu{block}_{number}", nn.ReLU())
                before = channels

    def named_as_here(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return a state dict with the layers' names in place of their published numbers (``conv1_1`` of ``2``)."""
        names = dict(zip(map(str, range(len(self))), (name for name, _ in self.named_children()), strict=True))

        def renamed(key: str) -> str:
            layer, dot, rest = key.partition(".")
            return f"{names.get(layer, layer)}{dot}{rest}"

        return {renamed(key): value for key, value in state.items()}
