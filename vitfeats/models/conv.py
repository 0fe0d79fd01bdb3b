"""Convolutional networks by name: rows of data, and the loader of a row."""

import torch
from torch import nn

from vitfeats.card import ModelCard
from vitfeats.errors import WeightsUnavailableError
from vitfeats.models.libraries import timm_network
from vitfeats.models.weights import load_state, read_checkpoint
from vitfeats.nets.vgg import NormalisedVgg

_VGG = "Simonyan and Zisserman, Very Deep Convolutional Networks for Large-Scale Image Recognition, ICLR 2015"
_ADAIN = "Huang and Belongie, Arbitrary Style Transfer in Real-time with Adaptive Instance Normalization, ICCV 2017"
_RESNET = "He et al., Deep Residual Learning for Image Recognition, CVPR 2016"
_DINOV3 = "Siméoni et al., DINOv3, 2025"


def _row(name: str, family: str, arch: str, patch: int, dim: int, layers: tuple[str, ...], tap: str) -> ModelCard:
    dinov3 = family.startswith("DINOv3")
    return ModelCard(
        name,
        family,
        f"timm:{arch}",
        patch,
        len(layers),
        dim,
        None,
        prefix_tokens=0,
        has_cls=False,
        interpolation="bicubic" if dinov3 else "bilinear",
        licence="DINOv3 License" if dinov3 else "BSD-3-Clause",
        layers=layers,
        default_tap=f"out@{tap}",
        paper={"VGG": _VGG, "ResNet": _RESNET}.get(family, _DINOV3),
    )


def relus(*counts: int) -> tuple[str, ...]:
    """Return the names of a VGG's layers, by the number of convolutions in each block."""
    return tuple(f"relu{block}_{number + 1}" for block, count in enumerate(counts, 1) for number in range(count))


_STAGES = ("act1", "layer1", "layer2", "layer3", "layer4")
_NEXT = ("stages.0", "stages.1", "stages.2", "stages.3")

CARDS = (
    _row("vgg16", "VGG", "vgg16.tv_in1k", 16, 512, relus(2, 2, 3, 3, 3), "relu4_1"),
    _row("vgg19", "VGG", "vgg19.tv_in1k", 16, 512, relus(2, 2, 4, 4, 4), "relu4_1"),
    ModelCard(
        "vgg_normalised",
        "VGG",
        "file:vgg_normalised.pth",
        16,
        16,
        512,
        None,
        prefix_tokens=0,
        has_cls=False,
        mean=(0.0, 0.0, 0.0),
        std=(1.0, 1.0, 1.0),
        interpolation="bilinear",
        licence="MIT",
        layers=relus(2, 2, 4, 4, 4),
        default_tap="out@relu4_1",
        paper=_ADAIN,
    ),
    _row("resnet18", "ResNet", "resnet18.tv_in1k", 32, 256, _STAGES, "layer3"),
    _row("resnet50", "ResNet", "resnet50.tv_in1k", 32, 1024, _STAGES, "layer3"),
    _row("resnet101", "ResNet", "resnet101.tv_in1k", 32, 1024, _STAGES, "layer3"),
    _row("dinov3_convnextt", "DINOv3 ConvNeXt", "convnext_tiny.dinov3_lvd1689m", 32, 384, _NEXT, "stages.2"),
    _row("dinov3_convnexts", "DINOv3 ConvNeXt", "convnext_small.dinov3_lvd1689m", 32, 384, _NEXT, "stages.2"),
    _row("dinov3_convnextb", "DINOv3 ConvNeXt", "convnext_base.dinov3_lvd1689m", 32, 512, _NEXT, "stages.2"),
)
"""Published convolutional networks by name. Adding one is adding a row."""


def load(card: ModelCard, checkpoint: str | None = None) -> nn.Module:
    """Build the network of a row with its published weights, or those of ``checkpoint``.

    Raises:
        WeightsUnavailableError: If the weights cannot be had; those of a source ``file:`` come as ``checkpoint`` only.
        ConfigError: If the checkpoint does not fit.
    """
    kind, _, source = card.source.partition(":")
    return (
        _normalised_vgg(card.name, source, checkpoint)
        if kind == "file"
        else timm_network(card.name, source, checkpoint)
    )


def _normalised_vgg(asked: str, file: str, checkpoint: str | None) -> nn.Module:
    if checkpoint is None:
        raise WeightsUnavailableError(
            f"expected the file '{file}' of AdaIN, SANet or AdaAttN for '{asked}', which no hub has; pass "
            f"checkpoint='{file}' if you have it, or use the bundled model 'vgg_mini', which needs no download"
        )
    with torch.device("meta"):  # 20 million weights that would be drawn only to be replaced
        network = NormalisedVgg()
    network.to_empty(device="cpu")
    load_state(network, network.named_as_here(read_checkpoint(checkpoint)), checkpoint)
    return network.eval()
