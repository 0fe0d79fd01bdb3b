"""Networks to be trained from the beginning, or from weights that are there."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save
from torch import nn

from vitfeats.card import IMAGENET_MEAN, IMAGENET_STD
from vitfeats.descriptor import write_whole
from vitfeats.errors import ConfigError, UnknownModelError, WeightsUnavailableError, nearest_names
from vitfeats.models.bundled import ASSETS
from vitfeats.models.libraries import load_any
from vitfeats.models.weights import load_state, read_checkpoint
from vitfeats.nets.vgg import SmallVgg

VGG = "vgg_mini"
"""Name of the small convolutional network."""

_KEPT = ("architecture", "first_conv", "classifier", "pool_size", "fixed_input_size", "interpolation")


def new_network(name: str, size: int, *, drop_path: float = 0.0, start: str = "") -> nn.Module:
    """Build a vision transformer of timm without a classifier, for images with ImageNet's mean and deviation.

    Args:
        name: Of timm's architecture; or "vgg_mini", a :class:`~vitfeats.nets.vgg.SmallVgg` with norms.
        size: Side of the images in pixels that its positions are stored for.
        drop_path: Largest probability that a block is skipped in training.
        start: Weights to begin with: a file, or the name of a bundled model; empty leaves them random. Positions are
            interpolated where they were stored for another size.

    Raises:
        UnknownModelError: If timm has no such model.
        ConfigError: If it is no vision transformer, or the weights do not fit.
        WeightsUnavailableError: If the file cannot be read.
    """
    if name == VGG:
        return _vgg(start)
    if not timm.is_model(name):
        raise UnknownModelError(f"expected a model of timm, got '{name}'. {nearest_names(name, timm.list_models())}")
    options: dict[str, Any] = {"pretrained": False, "num_classes": 0, "img_size": size, "drop_path_rate": drop_path}
    network = _created(name, options)
    if not hasattr(network, "patch_embed") or not hasattr(network, "blocks"):
        raise ConfigError(f"expected a vision transformer of timm to train, got '{name}'; try 'vit_tiny_patch16_224'")
    # What is known of timm's own weights of this name does not hold for these.
    cfg = {name: value for name, value in dict(network.pretrained_cfg).items() if name in _KEPT}
    network.pretrained_cfg = {**cfg, "mean": IMAGENET_MEAN, "std": IMAGENET_STD, "input_size": (3, size, size)}
    if start:
        load_any(network, _file(start), resized=True)
    return network


def takes_any_size(network: nn.Module) -> bool:
    """Tell whether a network takes images of other sizes than the one it was built for."""
    embed = getattr(network, "patch_embed", None)
    fixed = getattr(embed, "img_size", None) is not None and getattr(embed, "strict_img_size", False)
    return not fixed


def _vgg(start: str) -> SmallVgg:
    network = SmallVgg(norm=True)
    if start:
        file = _file(start)
        load_state(network, read_checkpoint(file), file)
    return network


def _file(start: str) -> str:
    bundled = ASSETS / f"{start}.safetensors"
    file = bundled if bundled.is_file() else Path(start)
    if not file.is_file():
        raise WeightsUnavailableError(
            f"expected a file of weights or the name of a bundled model to start from, got '{start}'"
        )
    return str(file)


def _created(name: str, options: Mapping[str, Any]) -> Any:
    """Build a network that takes images of all sizes, or of one where it has no such option; None if of none."""
    for more in ({"dynamic_img_size": True}, {}):
        try:
            return timm.create_model(name, **more, **options)
        except TypeError:  # an option that it does not have: a convolutional network has no size
            continue
    return None


@torch.no_grad()
def save_network(network: nn.Module, folder: Path | str) -> None:
    """Write a network of :func:`new_network` as a folder.

    Of a vision transformer it is one that :func:`vitfeats.load_extractor` and timm read; of "vgg_mini" it holds
    ``model.safetensors``, without norms.
    """
    if isinstance(network, SmallVgg):
        state = {name: value.contiguous() for name, value in network.folded().state_dict().items()}
        Path(folder).mkdir(parents=True, exist_ok=True)
        write_whole(Path(folder) / "model.safetensors", save(state))
        return
    from timm.models import save_for_hf

    args: dict[str, Any] = {"img_size": network.pretrained_cfg["input_size"][-1]}  # type: ignore[index]
    if hasattr(network, "dynamic_img_size"):
        args["dynamic_img_size"] = True
    save_for_hf(network, str(folder), model_args=args, safe_serialization=True)
