"""The head that self-distillation projects tokens with: a small network and a set of prototypes."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


class ProjectionHead(nn.Module):
    """Three linear layers, a bottleneck of unit length, and its cosine with prototypes (Caron et al., DINO, ICCV 2021).

    Args:
        dim: Channels of a token.
        hidden: Channels of the layers between.
        bottleneck: Channels of the bottleneck.
        prototypes: How many there are: the entries of the distribution that student and teacher agree on.
        generator: Source of the initial weights; None draws them from torch's global one.
    """

    def __init__(
        self,
        dim: int,
        *,
        hidden: int = 1024,
        bottleneck: int = 192,
        prototypes: int = 1024,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        where = torch.get_default_device()
        with torch.device("meta"):  # torch would draw weights of its own, from its global generator
            self.layers = nn.Sequential(
                nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, bottleneck)
            )
        self.layers.to_empty(device=where)
        # The length of a prototype is not learned: it would let the student sharpen its answers by length alone.
        self.prototypes = nn.Parameter(torch.empty(prototypes, bottleneck))
        with torch.no_grad():
            for layer in self.layers:
                if isinstance(layer, nn.Linear):
                    nn.init.trunc_normal_(layer.weight, std=0.02, generator=generator)
                    nn.init.zeros_(layer.bias)
            nn.init.normal_(self.prototypes, generator=generator)

    def forward(self, tokens: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch prototypes"]:
        """Return the cosine of each token's bottleneck and each prototype, -1..1."""
        bottleneck = self.layers(tokens)
        # In half precision a cosine near 1 is right to 0.004, which a teacher's temperature makes a tenth of a logit.
        with torch.autocast(bottleneck.device.type, enabled=False):
            unit = F.normalize(bottleneck.float(), dim=-1, eps=1e-6)
            return F.linear(unit, F.normalize(self.prototypes.float(), dim=-1))
