"""A small network in the manner of VGG, whose layers are read by the names that style transfer knows them by."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

_BLOCKS = ((32, 2), (64, 2), (128, 2), (256, 2), (256, 1))  # channels and convolutions of each


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
