"""The networks that come with the package: no download, no set-up."""

from pathlib import Path

import timm
import torch
from torch import nn

from vitfeats.card import ModelCard
from vitfeats.models.conv import relus
from vitfeats.models.weights import load_state, read_checkpoint
from vitfeats.nets.vgg import SmallVgg

ASSETS = Path(__file__).parent.parent / "assets"

_PAPER = "trained for vitfeats on Caltech-101; see assets/README.md"

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
        paper=_PAPER,
    ),
    ModelCard(
        name="vgg_mini",
        family="vitfeats",
        source="bundled:vgg_mini.safetensors",
        patch=16,
        depth=9,
        dim=256,
        heads=None,
        prefix_tokens=0,
        has_cls=False,
        interpolation="bilinear",
        default_tap="out@relu4_1",
        layers=relus(2, 2, 2, 2, 1),
        licence="Apache-2.0",
        paper=_PAPER,
    ),
)


def load(card: ModelCard, checkpoint: str | None = None) -> nn.Module:
    """Build the network of a row and load its weights, or those of ``checkpoint``."""
    file = checkpoint or str(ASSETS / card.source.partition(":")[2])
    with torch.random.fork_rng(devices=[]):  # weights are drawn before they are replaced
        model = SmallVgg().eval() if card.layers else build()
    load_state(model, read_checkpoint(file), file)
    return model


def build() -> nn.Module:
    """Build the network of ``mini``, untrained: timm's ViT-Ti/16 with stored positions for 7×7 patches."""
    return timm.create_model(
        "vit_tiny_patch16_224", pretrained=False, num_classes=0, img_size=112, dynamic_img_size=True
    )
