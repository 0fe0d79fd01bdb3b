"""Tiny models from configuration, one of each family."""

from collections.abc import Callable
from typing import Any

import timm
import torch
import transformers
from torch import nn

_TIMM: dict[str, Any] = {"num_classes": 0, "embed_dim": 48, "depth": 3, "num_heads": 4}
_SIZED: dict[str, Any] = {**_TIMM, "dynamic_img_size": True, "img_size": 64}
_CONFIG: dict[str, Any] = {
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "image_size": 64,
    "patch_size": 16,
}


def _transformers(name: str, **extra: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        config = getattr(transformers, f"{name}Config")(**_CONFIG, **extra)
        return getattr(transformers, f"{name}Model")(config)

    return build


FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "timm-dino": lambda: timm.create_model("vit_small_patch8_224.dino", **_SIZED),
    "timm-deit": lambda: timm.create_model("deit_tiny_patch16_224", **_SIZED),
    "timm-augreg": lambda: timm.create_model("vit_tiny_patch16_224", **_SIZED),
    "timm-mae": lambda: timm.create_model("vit_base_patch16_224.mae", **_SIZED),
    "timm-dinov2": lambda: timm.create_model("vit_small_patch14_dinov2", **{**_SIZED, "img_size": 56}),
    "timm-dinov2-reg": lambda: timm.create_model("vit_small_patch14_reg4_dinov2", **{**_SIZED, "img_size": 56}),
    "timm-dinov3": lambda: timm.create_model("vit_small_patch16_dinov3", **_TIMM),
    "timm-clip": lambda: timm.create_model("vit_base_patch16_clip_quickgelu_224", **_SIZED),
    "timm-siglip": lambda: timm.create_model("vit_base_patch16_siglip_224", **_SIZED),
    "timm-qk-norm": lambda: timm.create_model("vit_tiny_patch16_224", **_SIZED, qk_norm=True),
    "hf-vit": _transformers("ViT"),
    "hf-dinov2": _transformers("Dinov2"),
    "hf-dinov2-reg": _transformers("Dinov2WithRegisters"),
    "hf-dinov3": _transformers("DINOv3ViT", num_register_tokens=4),
    "hf-clip": _transformers("CLIPVision"),
    "hf-siglip": _transformers("SiglipVision"),
}
"""Builders of a tiny, untrained model of every family."""


def build(family: str, seed: int = 0) -> nn.Module:
    """Return a tiny model whose every parameter is random and large enough to matter (also zero-initialised ones)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = FAMILIES[family]().eval().requires_grad_(False)
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model
