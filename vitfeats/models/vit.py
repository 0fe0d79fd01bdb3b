"""Vision transformers by name: rows of data, and the loader of a row."""

from typing import Any

from torch import nn

from vitfeats.card import CLIP_MEAN, CLIP_STD, HALF, ModelCard
from vitfeats.models.libraries import timm_network

_DINO = "Caron et al., Emerging Properties in Self-Supervised Vision Transformers, ICCV 2021"
_DINOV2 = "Oquab et al., DINOv2, TMLR 2024"
_REG = "Darcet et al., Vision Transformers Need Registers, ICLR 2024"
_DINOV3 = "Siméoni et al., DINOv3, 2025"
_MAE = "He et al., Masked Autoencoders Are Scalable Vision Learners, CVPR 2022"
_DEIT = "Touvron et al., Training Data-Efficient Image Transformers, ICML 2021"
_AUGREG = "Steiner et al., How to Train Your ViT?, TMLR 2022"
_CLIP = "Radford et al., Learning Transferable Visual Models From Natural Language Supervision, ICML 2021"
_EVA02 = "Fang et al., EVA-02: A Visual Representation for Neon Genesis, Image and Vision Computing 2024"
_BEIT = "Bao et al., BEiT: BERT Pre-Training of Image Transformers, ICLR 2022"
_BEIT2 = "Peng et al., BEiT v2: Masked Image Modeling with Vector-Quantized Visual Tokenizers, 2022"
_PE = "Bolya et al., Perception Encoder, 2025"
_SIGLIP2 = "Tschannen et al., SigLIP 2, 2025"
_AIM2 = "Fini et al., Multimodal Autoregressive Pre-training of Large Vision Encoders, CVPR 2025"
_NAFLEX = "Dehghani et al., Patch n' Pack: NaViT, NeurIPS 2023; trained by timm"
_SIGLIP = "Zhai et al., Sigmoid Loss for Language Image Pre-Training, ICCV 2023"

_TIMM = {"position_rule": "timm"}

# (dim, depth, heads)
_TINY, _SMALL, _BASE, _LARGE = (192, 12, 3), (384, 12, 6), (768, 12, 12), (1024, 24, 16)


def _row(name: str, family: str, arch: str, patch: int, width: tuple[int, int, int], **facts: Any) -> ModelCard:
    dim, depth, heads = width
    return ModelCard(name, family, f"timm:{arch}", patch, depth, dim, heads, **facts)


def _dino(name: str, arch: str, patch: int, width: tuple[int, int, int]) -> ModelCard:
    return _row(name, "DINO", arch, patch, width, position_rule="dino", licence="Apache-2.0", paper=_DINO)


def _dinov2(size: str, arch: str, width: tuple[int, int, int], registers: bool) -> ModelCard:
    return _row(
        f"dinov2_vit{size}14" + ("_reg" if registers else ""),
        "DINOv2 with registers" if registers else "DINOv2",
        f"vit_{arch}_patch14_{'reg4_' if registers else ''}dinov2.lvd142m",
        14,
        width,
        prefix_tokens=5 if registers else 1,
        default_size=518,
        position_rule="dinov2_reg" if registers else "dinov2",
        licence="Apache-2.0",
        paper=_REG if registers else _DINOV2,
    )


def _dinov3(size: str, arch: str, width: tuple[int, int, int], qkv_bias: bool = False) -> ModelCard:
    # Trained with biases whose values the release zeroes for keys; `_qkvb` keeps those of queries and values.
    return _row(
        f"dinov3_vit{size}16" + ("_qkvb" if qkv_bias else ""),
        "DINOv3",
        f"vit_{arch}_patch16_dinov3{'_qkvb' if qkv_bias else ''}.lvd1689m",
        16,
        width,
        prefix_tokens=5,
        default_size=256,
        licence="DINOv3 License",
        paper=_DINOV3,
    )


def _distilled(size: str, arch: str, width: tuple[int, int, int]) -> ModelCard:
    return _row(
        f"deit_vit{size}16_distilled",
        "DeiT distilled",
        f"deit_{arch}_distilled_patch16_224.fb_in1k",
        16,
        width,
        prefix_tokens=2,  # CLS and the distillation token, which stands among the registers
        licence="Apache-2.0",
        paper=_DEIT,
        **_TIMM,
    )


def _eva02(size: str, arch: str, width: tuple[int, int, int], data: str = "mim_in22k") -> ModelCard:
    return _row(
        f"eva02_vit{size}14",
        "EVA-02",
        f"eva02_{arch}_patch14_224.{data}",
        14,
        width,
        mean=CLIP_MEAN,
        std=CLIP_STD,
        licence="MIT",
        paper=_EVA02,
        **_TIMM,
    )


def _beit(name: str, family: str, arch: str, width: tuple[int, int, int], **facts: Any) -> ModelCard:
    # Relative position biases hold for one grid: these take images of one size.
    return _row(name, family, arch, 16, width, default_size=(224, 224), licence="Apache-2.0", **facts)


def _pe(kind: str, size: str, arch: str, patch: int, pixels: int, width: tuple[int, int, int]) -> ModelCard:
    return _half(
        f"pe_{kind}_vit{size}{patch}",
        f"PE {kind}",
        f"vit_pe_{kind}_{arch}_patch{patch}_{pixels}.fb",
        patch,
        width,
        default_size=pixels,
        licence="Apache-2.0",
        paper=_PE,
    )


def _siglip(name: str, arch: str, width: tuple[int, int, int], patch: int = 16, **facts: Any) -> ModelCard:
    second = arch.endswith("v2_webli")
    return _half(
        name,
        "SigLIP 2" if second else "SigLIP",
        arch,
        patch,
        width,
        prefix_tokens=0,
        has_cls=False,
        licence="Apache-2.0",
        paper=_SIGLIP2 if second else _SIGLIP,
        **facts,
    )


def _aimv2(pixels: int) -> ModelCard:
    return _row(
        f"aimv2_vitl14_{pixels}",
        "AIMv2",
        f"aimv2_large_patch14_{pixels}.apple_pt",
        14,
        (1024, 24, 8),
        prefix_tokens=0,
        has_cls=False,
        default_size=pixels,
        mean=CLIP_MEAN,
        std=CLIP_STD,
        licence="Apple AMLR",
        paper=_AIM2,
        **_TIMM,
    )


def _naflex(name: str, arch: str, prefix: int, paper: str) -> ModelCard:
    return _row(
        name,
        "NaFlexViT",
        arch,
        16,
        _BASE,
        prefix_tokens=prefix,
        has_cls=False,
        default_size=384,
        mean=HALF,
        std=HALF,
        licence="Apache-2.0",
        paper=paper,
    )


def _half(name: str, family: str, arch: str, patch: int, width: tuple[int, int, int], **facts: Any) -> ModelCard:
    return _row(name, family, arch, patch, width, mean=HALF, std=HALF, **_TIMM, **facts)


def _clip(name: str, arch: str, patch: int, width: tuple[int, int, int]) -> ModelCard:
    return _row(
        name, "CLIP", arch, patch, width, mean=CLIP_MEAN, std=CLIP_STD, position_rule="timm", licence="MIT", paper=_CLIP
    )


CARDS = (
    _dino("dino_vits16", "vit_small_patch16_224.dino", 16, _SMALL),
    _dino("dino_vits8", "vit_small_patch8_224.dino", 8, _SMALL),
    _dino("dino_vitb16", "vit_base_patch16_224.dino", 16, _BASE),
    _dino("dino_vitb8", "vit_base_patch8_224.dino", 8, _BASE),
    _dinov2("s", "small", _SMALL, registers=False),
    _dinov2("b", "base", _BASE, registers=False),
    _dinov2("l", "large", _LARGE, registers=False),
    _dinov2("s", "small", _SMALL, registers=True),
    _dinov2("b", "base", _BASE, registers=True),
    _dinov2("l", "large", _LARGE, registers=True),
    _dinov3("s", "small", _SMALL),
    _dinov3("b", "base", _BASE),
    _dinov3("l", "large", _LARGE),
    _dinov3("s", "small", _SMALL, qkv_bias=True),
    _dinov3("b", "base", _BASE, qkv_bias=True),
    _dinov3("l", "large", _LARGE, qkv_bias=True),
    _row("mae_vitb16", "MAE", "vit_base_patch16_224.mae", 16, _BASE, licence="CC BY-NC 4.0", paper=_MAE, **_TIMM),
    _row("mae_vitl16", "MAE", "vit_large_patch16_224.mae", 16, _LARGE, licence="CC BY-NC 4.0", paper=_MAE, **_TIMM),
    _row("deit_vitt16", "DeiT", "deit_tiny_patch16_224.fb_in1k", 16, _TINY, licence="Apache-2.0", paper=_DEIT, **_TIMM),
    _row(
        "deit_vits16", "DeiT", "deit_small_patch16_224.fb_in1k", 16, _SMALL, licence="Apache-2.0", paper=_DEIT, **_TIMM
    ),
    _row("deit_vitb16", "DeiT", "deit_base_patch16_224.fb_in1k", 16, _BASE, licence="Apache-2.0", paper=_DEIT, **_TIMM),
    _half(
        "augreg_vits16", "AugReg", "vit_small_patch16_224.augreg_in21k", 16, _SMALL, licence="Apache-2.0", paper=_AUGREG
    ),
    _half(
        "augreg_vitb16", "AugReg", "vit_base_patch16_224.augreg_in21k", 16, _BASE, licence="Apache-2.0", paper=_AUGREG
    ),
    _clip("clip_vitb32", "vit_base_patch32_clip_quickgelu_224.openai", 32, _BASE),
    _clip("clip_vitb16", "vit_base_patch16_clip_quickgelu_224.openai", 16, _BASE),
    _clip("clip_vitl14", "vit_large_patch14_clip_quickgelu_224.openai", 14, _LARGE),
    _siglip("siglip_vitb16", "vit_base_patch16_siglip_224.webli", _BASE),
    _siglip("siglip2_vitb16", "vit_base_patch16_siglip_224.v2_webli", _BASE),
    _siglip("siglip2_vitb16_512", "vit_base_patch16_siglip_512.v2_webli", _BASE, default_size=512),
    _siglip("siglip2_vitl16_256", "vit_large_patch16_siglip_256.v2_webli", _LARGE, default_size=256),
    _siglip("siglip2_so400m14", "vit_so400m_patch14_siglip_224.v2_webli", (1152, 27, 16), 14),
    _distilled("t", "tiny", _TINY),
    _distilled("s", "small", _SMALL),
    _distilled("b", "base", _BASE),
    _eva02("t", "tiny", _TINY),
    _eva02("s", "small", _SMALL),
    _eva02("b", "base", _BASE),
    _eva02("l", "large", _LARGE, data="mim_m38m"),
    _beit("beit_vitb16", "BEiT", "beit_base_patch16_224.in22k_ft_in22k", _BASE, mean=HALF, std=HALF, paper=_BEIT),
    _beit("beit_vitl16", "BEiT", "beit_large_patch16_224.in22k_ft_in22k", _LARGE, mean=HALF, std=HALF, paper=_BEIT),
    _beit("beitv2_vitb16", "BEiT v2", "beitv2_base_patch16_224.in1k_ft_in22k", _BASE, paper=_BEIT2),
    _beit("beitv2_vitl16", "BEiT v2", "beitv2_large_patch16_224.in1k_ft_in22k", _LARGE, paper=_BEIT2),
    _pe("core", "t", "tiny", 16, 384, _TINY),
    _pe("core", "s", "small", 16, 384, _SMALL),
    _pe("core", "b", "base", 16, 224, _BASE),
    _pe("core", "l", "large", 14, 336, _LARGE),
    _pe("spatial", "t", "tiny", 16, 512, _TINY),
    _pe("spatial", "s", "small", 16, 512, _SMALL),
    _pe("spatial", "b", "base", 16, 512, _BASE),
    _pe("spatial", "l", "large", 14, 448, _LARGE),
    _aimv2(224),
    _aimv2(336),
    _naflex("naflex_vitb16", "naflexvit_base_patch16_gap.e300_s576_in1k", 4, _NAFLEX),
    _naflex("naflex_siglip2_vitb16", "naflexvit_base_patch16_siglip.v2_webli", 0, _SIGLIP2),
)
"""Published models by name. Adding one is adding a row."""


def load(card: ModelCard, checkpoint: str | None = None) -> nn.Module:
    """Build the network of a row with its published weights, or those of ``checkpoint``."""
    return timm_network(card.name, card.source.partition(":")[2], checkpoint)
