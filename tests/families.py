"""Tiny models from configuration, one of each family."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import timm
import torch
import transformers
from torch import nn

from vitfeats.card import ModelCard

_TIMM: dict[str, Any] = {"num_classes": 0, "embed_dim": 48, "depth": 3, "num_heads": 4}
_SIZED: dict[str, Any] = {**_TIMM, "dynamic_img_size": True, "img_size": 64}
_FIXED: dict[str, Any] = {**_TIMM, "img_size": (48, 80)}
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
    "timm-deit-distilled": lambda: timm.create_model("deit_tiny_distilled_patch16_224", **_SIZED),
    "timm-siglip2": lambda: timm.create_model("vit_base_patch16_siglip_256.v2_webli", **_SIZED),
    "timm-aimv2": lambda: timm.create_model("aimv2_large_patch14_224", **{**_SIZED, "img_size": 56}),
    "timm-eva": lambda: timm.create_model("eva_large_patch14_196", **{**_SIZED, "img_size": 56}),
    "timm-eva02": lambda: timm.create_model("eva02_tiny_patch14_224", **{**_SIZED, "img_size": 56}),
    "timm-dinov3-qkvb": lambda: timm.create_model("vit_small_patch16_dinov3_qkvb", **_TIMM),
    "timm-pe-core": lambda: timm.create_model("vit_pe_core_tiny_patch16_384", **_SIZED),
    "timm-pe-spatial": lambda: timm.create_model("vit_pe_spatial_tiny_patch16_512", **_SIZED),
    "timm-rope": lambda: timm.create_model("vit_small_patch16_rope_224", **_SIZED),
    "timm-rope-mixed": lambda: timm.create_model("vit_small_patch16_rope_mixed_224", **_SIZED),
    "timm-beit": lambda: timm.create_model("beit_base_patch16_224", **_FIXED),
    "timm-beitv2": lambda: timm.create_model("beitv2_base_patch16_224", **_FIXED),
    "timm-beit3": lambda: timm.create_model("beit3_base_patch16_224", **_SIZED),
    "timm-relpos": lambda: timm.create_model("vit_relpos_small_patch16_224", **_FIXED),
    "timm-hybrid": lambda: timm.create_model("vit_tiny_r_s16_p8_224", **_SIZED),
    "timm-naflex": lambda: timm.create_model("naflexvit_base_patch16_gap", **_TIMM),
    "timm-naflex-siglip": lambda: timm.create_model("naflexvit_base_patch16_siglip", **_TIMM),
    "timm-sapiens2": lambda: timm.create_model("vit_base_patch16_sapiens2", **_TIMM, num_kv_heads=(4, 2, 4)),
    "timm-qk-norm": lambda: timm.create_model("vit_tiny_patch16_224", **_SIZED, qk_norm=True),
    "hf-vit": _transformers("ViT"),
    "hf-dinov2": _transformers("Dinov2"),
    "hf-dinov2-reg": _transformers("Dinov2WithRegisters"),
    "hf-dinov3": _transformers("DINOv3ViT", num_register_tokens=4),
    "hf-clip": _transformers("CLIPVision"),
    "hf-siglip": _transformers("SiglipVision"),
    "hf-beit": _transformers("Beit", use_relative_position_bias=True),
    "hf-deit": _transformers("DeiT"),
}
"""Builders of a tiny, untrained model of every family."""

if not timm.is_model("vit_base_patch16_sapiens2"):  # newer than the oldest timm that vitfeats takes
    del FAMILIES["timm-sapiens2"]


def build(family: str, seed: int = 0) -> nn.Module:
    """Return a tiny model whose every parameter is random and large enough to matter (also zero-initialised ones)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = FAMILIES[family]().eval().requires_grad_(False)
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def shrunk(card: ModelCard) -> tuple[nn.Module, ModelCard]:
    """Return the network of a catalogue row, narrow and shallow where timm lets it be, and its card to match."""
    torch.manual_seed(0)
    name = card.source.removeprefix("timm:")
    if card.layers:
        network = timm.create_model(name, pretrained=False, num_classes=0)
        if hasattr(network, "pre_logits"):  # of a VGG: three quarters of its weights, behind every layer that is read
            network.pre_logits = nn.Identity()
        return network.eval().requires_grad_(False), card
    size = {"img_size": card.default_size} if isinstance(card.default_size, tuple) else {}
    try:
        network = timm.create_model(name, pretrained=False, dynamic_img_size=True, **_TIMM)
    except TypeError:
        network = timm.create_model(name, pretrained=False, **_TIMM, **size)
    return network.eval().requires_grad_(False), replace(card, dim=48, depth=3, heads=4)
