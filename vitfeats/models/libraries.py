"""Loading from timm and transformers: names with a prefix, folders, and the card of a network that they built."""

import os
import sys
from pathlib import Path
from typing import Any

import timm
from torch import nn

from vitfeats.card import CLIP_MEAN, CLIP_STD, HALF, IMAGENET_MEAN, IMAGENET_STD, ModelCard
from vitfeats.errors import ConfigError, UnknownModelError, VitFeatsError, WeightsUnavailableError, nearest_names
from vitfeats.extractors.conv import readable_layers, usual_layer
from vitfeats.extractors.vit import find_anatomy, is_timm_transformer
from vitfeats.grid import Size
from vitfeats.hooks import unwrapped
from vitfeats.models.weights import load_state, read_checkpoint, read_json, require_weights, unavailable

# What transformers knows a vision model by: (class, mean, std, whether it has CLS, position rule).
_TRANSFORMERS: dict[str, tuple[str, Any, Any, bool, str | None]] = {
    "vit": ("ViTModel", HALF, HALF, True, "transformers"),
    "dinov2": ("Dinov2Model", IMAGENET_MEAN, IMAGENET_STD, True, "dinov2"),
    "dinov2_with_registers": ("Dinov2WithRegistersModel", IMAGENET_MEAN, IMAGENET_STD, True, "dinov2_reg"),
    "dinov3_vit": ("DINOv3ViTModel", IMAGENET_MEAN, IMAGENET_STD, True, None),
    "clip_vision_model": ("CLIPVisionModel", CLIP_MEAN, CLIP_STD, True, "transformers"),
    "siglip_vision_model": ("SiglipVisionModel", HALF, HALF, False, "transformers"),
    "beit": ("BeitModel", HALF, HALF, True, "transformers"),
    "deit": ("DeiTModel", IMAGENET_MEAN, IMAGENET_STD, True, "transformers"),
}
_DISTILLED = {"deit"}  # with one more prefix token than they say
_TOWER_OF = {"clip": "clip_vision_model", "siglip": "siglip_vision_model"}


def load_timm(name: str, checkpoint: str | None = None) -> tuple[nn.Module, ModelCard]:
    """Load ``timm:NAME``; its card is made from what timm knows.

    Raises:
        UnknownModelError: If timm has no such model.
        WeightsUnavailableError: If its weights cannot be had.
    """
    architecture = name.partition(".")[0]
    if not timm.is_model(architecture):
        raise UnknownModelError(
            f"expected a model of timm, got 'timm:{name}'. {nearest_names(architecture, timm.list_models())}"
        )
    network = timm_network(f"timm:{name}", name, checkpoint)
    return network, card_of(network, f"timm:{name}")


def load_transformers(source: str, checkpoint: str | None = None) -> tuple[nn.Module, ModelCard]:
    """Load ``ORG/NAME`` from the hub, or a folder written by ``save_pretrained``; its card comes from its config.

    Raises:
        WeightsUnavailableError: If it cannot be had.
        ConfigError: If it is not a vision transformer that vitfeats knows.
    """
    import transformers

    folder = os.path.isdir(source)
    if not folder:
        require_weights(f"hf:{source}", source)
    try:
        config = transformers.AutoConfig.from_pretrained(source, trust_remote_code=False)
        kind = _TOWER_OF.get(config.model_type, config.model_type)
        if kind not in _TRANSFORMERS:
            raise ConfigError(
                f"expected a vision transformer of {', '.join(sorted(_TRANSFORMERS))}, "
                f"got '{config.model_type}' at '{source}'"
            )
        cls = getattr(transformers, _TRANSFORMERS[kind][0])
        extra = {"add_pooling_layer": False} if kind in ("vit", "beit", "deit") else {}
        network = cls.from_pretrained(source, trust_remote_code=False, **extra)
    except VitFeatsError:
        raise
    except Exception as error:  # a broken config, broken weights, a broken connection: each library has its own
        raise _unreadable(source, error) if folder else unavailable(f"hf:{source}", source, _broken(error)) from error
    if checkpoint is not None:
        load_state(network, read_checkpoint(checkpoint), checkpoint)
    name = source if folder else f"hf:{source}"
    return network, card_of(network, name, _processor_facts(Path(source)) if folder else _cached_facts(source))


def load_folder(path: str, checkpoint: str | None = None) -> tuple[nn.Module, ModelCard]:
    """Load a local folder: what transformers' ``save_pretrained`` or timm's ``save_for_hf`` wrote.

    Raises:
        WeightsUnavailableError: If the folder has no ``config.json``, or what is in it cannot be read.
        ConfigError: If it is not a vision transformer that vitfeats knows, or the checkpoint does not fit.
    """
    config = Path(path) / "config.json"
    if not config.is_file():
        raise WeightsUnavailableError(
            f"expected a folder with config.json and weights, but '{path}' has no config.json"
        )
    if "architecture" not in read_json(config):
        return load_transformers(path, checkpoint)
    try:
        network = _created(f"local-dir:{path}", pretrained=False)
    except Exception as error:
        raise _unreadable(path, error) from error
    load_any(network, checkpoint or _weight_file(Path(path)))
    return network, card_of(network, path)


def card_of(network: nn.Module, name: str, facts: dict[str, Any] | None = None) -> ModelCard:
    """Make a card from what a timm or transformers network says of itself.

    Args:
        network: The network.
        name: What the card is to be called.
        facts: Fields that are known better, for example from a ``preprocessor_config.json``.

    Raises:
        ConfigError: If the network says too little; the message says to pass ``card=``.
    """
    network = unwrapped(network)
    if hasattr(network, "pretrained_cfg"):
        facts_of = _timm_facts if is_timm_transformer(network) else _stage_facts
        try:
            found = facts_of(network)
        except (AttributeError, IndexError, TypeError) as error:  # a timm model of another build
            raise _not_known(network) from error
    elif hasattr(network, "config") and network.config.model_type in _TRANSFORMERS:  # type: ignore[union-attr]
        found = _transformers_facts(network.config)
    else:
        raise _not_known(network)
    return ModelCard(name=name, **{**found, **(facts or {})})


def _not_known(network: nn.Module) -> ConfigError:
    return ConfigError(
        f"expected a vision transformer of timm or transformers, or a model of timm with stages, got "
        f"{type(network).__name__}; describe your own module with card=ModelCard(…)"
    )


def timm_network(asked: str, name: str, checkpoint: str | None) -> nn.Module:
    """Build a network of timm without its classifier, with its published weights or those of ``checkpoint``.

    Args:
        asked: What the user asked for, for messages.
        name: ``ARCHITECTURE.TAG`` of timm.
        checkpoint: A weight file, or None.

    Raises:
        UnknownModelError: If timm has no such tag.
        WeightsUnavailableError: If its weights cannot be had.
        ConfigError: If the checkpoint does not fit.
    """
    if checkpoint is None:
        repository = _repository(name)
        if repository is None:
            raise WeightsUnavailableError(
                f"expected published weights for '{asked}', but timm has none; pass checkpoint="
            )
        require_weights(asked, repository)
        try:
            return _created(name, pretrained=True)
        except Exception as error:  # whatever a download can end in
            raise unavailable(asked, repository, _broken(error)) from error
    network = _created(name, pretrained=False)
    load_any(network, checkpoint)
    return network


def _created(name: str, pretrained: bool) -> nn.Module:
    options: dict[str, Any] = {"pretrained": pretrained, "num_classes": 0}
    try:
        return timm.create_model(name, dynamic_img_size=True, **options)
    except TypeError as error:
        if "dynamic_img_size" not in str(error):
            raise
        # Takes any size as it is (DINOv3, NaFlexViT, convolutions), or one size only (BEiT).
        return timm.create_model(name, **options)


def _repository(name: str) -> str | None:
    try:
        return timm.get_pretrained_cfg_value(name, "hf_hub_id")
    except RuntimeError as error:  # a tag that timm does not know
        tags = timm.list_pretrained(f"{name.partition('.')[0]}.*")
        raise UnknownModelError(f"expected a model of timm, got 'timm:{name}'. {nearest_names(name, tags)}") from error


def _unreadable(folder: str, error: Exception) -> WeightsUnavailableError:
    return WeightsUnavailableError(
        f"expected a vision transformer in the folder '{folder}', but it cannot be loaded: {_broken(error)}"
    )


def _broken(error: Exception) -> str:
    first = next(iter(str(error).splitlines()), "")
    return f"{type(error).__name__}: {first}"


def _weight_file(folder: Path) -> str:
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).is_file():
            return str(folder / name)
    raise WeightsUnavailableError(
        f"expected model.safetensors or pytorch_model.bin in '{folder}', got neither; pass checkpoint='FILE'"
    )


def load_any(network: nn.Module, checkpoint: str, *, resized: bool = False) -> None:
    """Load a timm checkpoint, or one in the layout of the model's own release, which timm knows how to translate.

    Args:
        network: Gets the weights.
        checkpoint: File.
        resized: Whether positions that are stored for another size are interpolated; they are refused otherwise.
    """
    state = read_checkpoint(checkpoint)
    own = network.state_dict()
    stored = state.get("pos_embed")
    bent = resized and stored is not None and stored.shape != own.get("pos_embed", stored).shape
    if bent or not set(own) <= set(state):
        module = sys.modules[type(network).__module__]
        if hasattr(module, "checkpoint_filter_fn"):
            state = module.checkpoint_filter_fn(dict(state), network)
        elif hasattr(module, "_filter_fn"):  # of VGG: from torchvision's names
            state = module._filter_fn(dict(state))
    load_state(network, state, checkpoint)


def _timm_facts(network: Any) -> dict[str, Any]:
    find_anatomy(network)  # says what is wrong with transformers whose tokens cannot be read
    embed = network.patch_embed if hasattr(network, "patch_embed") else network.embeds
    parts = network if hasattr(network, "patch_embed") else network.embeds
    fixed = getattr(embed, "img_size", None) is not None and not getattr(network, "dynamic_img_size", False)
    size = tuple(embed.img_size) if fixed else min(_input_size(network))
    tag = str(network.pretrained_cfg.get("tag") or "")
    released = {"dino": "dino", "lvd142m": "dinov2" if network.num_prefix_tokens == 1 else "dinov2_reg"}
    stored = getattr(network, "pos_embed", None)  # NaFlexViT keeps it elsewhere, and resamples it in its own way
    return {
        **_published(network),
        "patch": embed.feat_ratio(),  # of a hybrid, with the strides of the convolutions in front
        "depth": len(network.blocks),
        "dim": network.embed_dim,
        "heads": network.blocks[0].attn.num_heads,
        "prefix_tokens": network.num_prefix_tokens,
        "has_cls": getattr(parts, "cls_token", None) is not None,
        "default_size": size,
        "position_rule": None if stored is None else released.get(tag, "timm"),
    }


def _stage_facts(network: Any) -> dict[str, Any]:
    fixed = getattr(getattr(network, "patch_embed", None), "strict_img_size", False)
    size = _input_size(network)
    layers = readable_layers(network, size)
    if not layers:
        raise _not_known(network)
    usual = usual_layer(layers)
    return {
        **_published(network),
        "patch": max(found.stride for found in layers.values()),
        "depth": len(layers),
        "dim": layers[usual].channels,
        "heads": None,
        "prefix_tokens": 0,
        "has_cls": False,
        "default_size": size if fixed else min(size),
        "layers": tuple(layers),
        "default_tap": f"out@{usual}",
    }


def _published(network: Any) -> dict[str, Any]:
    config = network.pretrained_cfg
    return {
        "family": type(network).__name__,
        "source": f"timm:{config.get('architecture') or type(network).__name__}",
        "mean": tuple(config.get("mean", IMAGENET_MEAN)),
        "std": tuple(config.get("std", IMAGENET_STD)),
        "licence": str(config.get("license") or "unknown"),
    }


def _input_size(network: Any) -> Size:
    height, width = network.pretrained_cfg.get("input_size", (3, 224, 224))[1:]
    return height, width


def _transformers_facts(config: Any) -> dict[str, Any]:
    cls, mean, std, has_cls, rule = _TRANSFORMERS[config.model_type]
    return {
        "family": cls,
        "source": f"hf:{config._name_or_path or cls}",
        "patch": config.patch_size,
        "depth": config.num_hidden_layers,
        "dim": config.hidden_size,
        "heads": config.num_attention_heads,
        "prefix_tokens": int(has_cls)
        + int(getattr(config, "num_register_tokens", 0))
        + int(config.model_type in _DISTILLED),
        "has_cls": has_cls,
        "default_size": config.image_size,
        "mean": mean,
        "std": std,
        "position_rule": rule,
    }


def _processor_facts(folder: Path) -> dict[str, Any]:
    file = folder / "preprocessor_config.json"
    if not file.is_file():
        return {}
    said = read_json(file)
    names = {"mean": "image_mean", "std": "image_std"}
    try:
        return {field: tuple(float(v) for v in said[name]) for field, name in names.items() if name in said}
    except (TypeError, ValueError) as error:
        raise WeightsUnavailableError(
            f"expected three numbers for each of image_mean and image_std in '{file}'"
        ) from error


def _cached_facts(repository: str) -> dict[str, Any]:
    from huggingface_hub import hf_hub_download

    try:
        return _processor_facts(Path(hf_hub_download(repository, "preprocessor_config.json")).parent)
    except OSError:
        return {}
