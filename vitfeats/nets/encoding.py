"""Tokens and a summary of any network that is trained here, in one form, with patches hidden from it if asked."""

from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from vitfeats.errors import ConfigError


class Encoded(NamedTuple):
    """What a network says of images.

    Attributes:
        summary: The CLS token; of networks without one, the mean of the patches.
        patches: Row by row.
    """

    summary: Float[Tensor, "batch dim"]
    patches: Float[Tensor, "batch tokens dim"]


def encode(
    network: nn.Module,
    images: Float[Tensor, "batch 3 height width"],
    *,
    hidden: Bool[Tensor, "batch tokens"] | None = None,
    mask: Float[Tensor, " dim"] | None = None,
) -> Encoded:
    """Run a network of timm, or one whose ``forward_features`` gives tokens or a map.

    Args:
        network: The network.
        images: Normalised.
        hidden: Patches in whose place it sees ``mask``; a vision transformer only.
        mask: The token that stands for what is hidden.

    Raises:
        ConfigError: If patches are to be hidden from a network without patches.
    """
    forward: Any = network.forward_features
    if hidden is None:
        found = forward(images)
    else:
        embed = getattr(network, "patch_embed", None)
        if not isinstance(embed, nn.Module):
            raise ConfigError(
                f"expected a vision transformer to hide patches from, got {type(network).__name__}; set masked=0"
            )

        def hide(_module: nn.Module, _inputs: Any, seen: Tensor) -> Tensor:
            assert mask is not None
            return torch.where(hidden.reshape(*seen.shape[:-1], 1), mask.to(seen.dtype), seen)

        handle = embed.register_forward_hook(hide)
        try:
            found = forward(images)
        finally:
            handle.remove()
    if found.dim() == 4:
        patches = found.flatten(2).mT
        return Encoded(patches.mean(1), patches)
    prefix = int(getattr(network, "num_prefix_tokens", 0))
    patches = found[:, prefix:]
    return Encoded(found[:, 0] if getattr(network, "cls_token", None) is not None else patches.mean(1), patches)
