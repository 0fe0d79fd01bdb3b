"""The model that comes with the package: no download, no set-up."""

from pathlib import Path

import timm
from torch import nn

from vitfeats.card import ModelCard
from vitfeats.models.weights import load_state, read_checkpoint

ASSETS = Path(__file__).parent.parent / "assets"

CARDS = (
    ModelCard(
        name="mini",
        family="vitfeats",
        source="bundled:mini.safetensors",
        patch=16,
        depth=12,
        dim=192,
        heads=3,
        position_rule="timm",
        licence="Apache-2.0",
        paper="trained for vitfeats on Caltech-101; see assets/README.md",
    ),
)


def load(card: ModelCard, checkpoint: str | None = None) -> nn.Module:
    """Build ``mini`` and load its weights, or those of ``checkpoint``."""
    file = checkpoint or str(ASSETS / card.source.partition(":")[2])
    model = build()
    load_state(model, read_checkpoint(file), file)
    return model


def build() -> nn.Module:
    """Build the network of ``mini``, untrained: timm's ViT-Ti/16 with stored positions for 7×7 patches."""
    return timm.create_model(
        "vit_tiny_patch16_224", pretrained=False, num_classes=0, img_size=112, dynamic_img_size=True
    )
