"""Read a vision transformer of your own.

The module below is neither timm's nor transformers': it has names of its own, and random weights. A card says what the
model is, an anatomy where its parts are; nothing of the module is changed. The picture shows the principal components
of its keys: without training they follow little but the colours of the patches. Seconds on a CPU.

    python examples/own_module.py --out own_module.png
"""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vitfeats as vf
from vitfeats.extractors.vit import Anatomy

DIM, HEADS, DEPTH, PATCH, SIDE = 64, 4, 3, 8, 28  # SIDE: the module takes images of 28 × 28 patches, 224 pixels


class Attend(nn.Module):
    """Attention with three separate projections."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(DIM, DIM) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        """Return x attended to, (batch, n, dim)."""
        q, k, v = (f(x).unflatten(2, (HEADS, -1)).transpose(1, 2) for f in (self.to_q, self.to_k, self.to_v))
        return self.to_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Layer(nn.Module):
    """One block: attention, then a small network, each around a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.attend = Attend()
        self.mix = nn.Sequential(nn.LayerNorm(DIM), nn.Linear(DIM, 4 * DIM), nn.GELU(), nn.Linear(4 * DIM, DIM))
        self.before = nn.LayerNorm(DIM)

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output, (batch, n, dim)."""
        x = x + self.attend(self.before(x))
        return x + self.mix(x)


class TinyViT(nn.Module):
    """A vision transformer of three blocks, with CLS in front."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, DIM, PATCH, PATCH)
        self.summary = nn.Parameter(torch.randn(1, 1, DIM) * 0.02)
        self.places = nn.Parameter(torch.randn(1, 1 + SIDE * SIDE, DIM) * 0.02)
        self.layers = nn.ModuleList(Layer() for _ in range(DEPTH))
        self.last_norm = nn.LayerNorm(DIM)

    def forward(self, image: Tensor) -> Tensor:
        """Return CLS of (batch, 3, 224, 224) images, (batch, dim)."""
        patches = self.stem(image).flatten(2).transpose(1, 2)
        x = torch.cat([self.summary.expand(len(image), -1, -1), patches], 1) + self.places
        for layer in self.layers:
            x = layer(x)
        return self.last_norm(x)[:, 0]


CARD = vf.ModelCard(
    name="tiny",
    family="example",
    source="module",
    patch=PATCH,
    depth=DEPTH,
    dim=DIM,
    heads=HEADS,
    default_size=(224, 224),
)
ANATOMY = Anatomy(
    block="layers.{}",
    attention="layers.{}.attend",
    query="layers.{}.attend.to_q",
    key="layers.{}.attend.to_k",
    value="layers.{}.attend.to_v",
    final_norm="last_norm",
    patch_projection="stem",
)


def main(out: Path = Path("own_module.png")) -> Path:
    """Read four facets in one pass; write a picture of the keys' principal components."""
    torch.manual_seed(0)
    extractor = vf.load_extractor(TinyViT().eval(), card=CARD, anatomy=ANATOMY)
    coffee = vf.samples.coffee()
    found = extractor(coffee, ["key@1", "token@-1", "cls@-1", "attention@1"])
    for descriptor in found.values():
        print(descriptor, file=sys.stderr)
    vf.plot.pca(coffee, found["key@1"]).save(out)
    print(f"wrote {out}: principal components of key@1, random weights")
    return out


if __name__ == "__main__":
    main(Path(sys.argv[2]) if sys.argv[1:2] == ["--out"] else Path("own_module.png"))
