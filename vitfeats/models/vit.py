"""Vision transformers of timm and transformers: rows, and the loaders for rows and for names with a prefix."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import timm
from torch import nn

from vitfeats.card import CLIP_MEAN, CLIP_STD, HALF, IMAGENET_MEAN, IMAGENET_STD, ModelCard
from vitfeats.errors import ConfigError, UnknownModelError, VitFeatsError, WeightsUnavailableError, nearest_names
from vitfeats.models.weights import load_state, read_checkpoint, require_weights, unavailable

_DINO = "Caron et al., Emerging Properties in Self-Supervised Vision Transformers, ICCV 2021"
_DINOV2 = "Oquab et al., DINOv2, TMLR 2024"
_REG = "Darcet et al., Vision Transformers Need Registers, ICLR 2024"
_DINOV3 = "Siméoni et al., DINOv3, 2025"
_MAE = "He et al., Masked Autoencoders Are Scalable Vision Learners, CVPR 2022"
_DEIT = "Touvron et al., Training Data-Efficient Image Transformers, ICML 2021"
_AUGREG = "Steiner et al., How to Train Your ViT?, TMLR 2022"
_CLIP = "Radford et al., Learning Transferable Visual Models From Natural Language Supervision, ICML 2021"
_SIGLIP = "Zhai et al., Sigmoid Loss for Language Image Pre-Training, ICCV 2023"

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


def _dinov3(size: str, arch: str, width: tuple[int, int, int]) -> ModelCard:
    return _row(
        f"dinov3_vit{size}16",
        "DINOv3",
        f"vit_{arch}_patch16_dinov3.lvd1689m",
        16,
        width,
        prefix_tokens=5,
        default_size=256,
        licence="DINOv3 License",
        paper=_DINOV3,
    )


def _half(name: str, family: str, arch: str, patch: int, width: tuple[int, int, int], **facts: Any) -> ModelCard:
    return _row(name, family, arch, patch, width, mean=HALF, std=HALF, position_rule="timm", **facts)


def _clip(name: str, arch: str, patch: int, width: tuple[int, int, int]) -> ModelCard:
    return _row(
        name, "CLIP", arch, patch, width, mean=CLIP_MEAN, std=CLIP_STD, position_rule="timm", licence="MIT", paper=_CLIP
    )


_TIMM = {"position_rule": "timm"}

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
    _half(
        "siglip_vitb16",
        "SigLIP",
        "vit_base_patch16_siglip_224.webli",
        16,
        _BASE,
        prefix_tokens=0,
        has_cls=False,
        licence="Apache-2.0",
        paper=_SIGLIP,
    ),
)
"""Published models by name. Adding one is adding a row."""

# What transformers knows a vision model by: (class, mean, std, whether it has CLS, position rule).
_TRANSFORMERS: dict[str, tuple[str, Any, Any, bool, str | None]] = {
    "vit": ("ViTModel", HALF, HALF, True, "transformers"),
    "dinov2": ("Dinov2Model", IMAGENET_MEAN, IMAGENET_STD, True, "dinov2"),
    "dinov2_with_registers": ("Dinov2WithRegistersModel", IMAGENET_MEAN, IMAGENET_STD, True, "dinov2_reg"),
    "dinov3_vit": ("DINOv3ViTModel", IMAGENET_MEAN, IMAGENET_STD, True, None),
    "clip_vision_model": ("CLIPVisionModel", CLIP_MEAN, CLIP_STD, True, "transformers"),
    "siglip_vision_model": ("SiglipVisionModel", HALF, HALF, False, "transformers"),
}
_TOWER_OF = {"clip": "clip_vision_model", "siglip": "siglip_vision_model"}


def load(card: ModelCard, checkpoint: str | None = None) -> nn.Module:
    """Build the network of a row with its published weights, or those of ``checkpoint``."""
    return _timm_network(card.name, card.source.partition(":")[2], checkpoint)


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
    network = _timm_network(f"timm:{name}", name, checkpoint)
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
        extra = {"add_pooling_layer": False} if kind == "vit" else {}
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
    if "architecture" not in _read_json(config):
        return load_transformers(path, checkpoint)
    try:
        network = timm.create_model(f"local-dir:{path}", pretrained=False, num_classes=0, **_any_size(path))
    except Exception as error:
        raise _unreadable(path, error) from error
    _load_any(network, checkpoint or _weight_file(Path(path)))
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
    network = getattr(network, "_orig_mod", network)
    if hasattr(network, "pretrained_cfg") and hasattr(network, "patch_embed") and hasattr(network, "blocks"):
        try:
            found = _timm_facts(network)
        except (AttributeError, IndexError, TypeError) as error:  # a timm model of another build
            raise _not_known(network) from error
    elif hasattr(network, "config") and network.config.model_type in _TRANSFORMERS:  # type: ignore[union-attr]
        found = _transformers_facts(network.config)
    else:
        raise _not_known(network)
    return ModelCard(name=name, **{**found, **(facts or {})})


def _not_known(network: nn.Module) -> ConfigError:
    return ConfigError(
        f"expected a vision transformer of timm or transformers, got {type(network).__name__}; "
        "describe your own module with card=ModelCard(…)"
    )


def _timm_network(asked: str, name: str, checkpoint: str | None) -> nn.Module:
    options: dict[str, Any] = {"num_classes": 0, **_any_size(name)}
    if checkpoint is None:
        repository = _repository(name)
        if repository is None:
            raise WeightsUnavailableError(
                f"expected published weights for '{asked}', but timm has none; pass checkpoint="
            )
        require_weights(asked, repository)
        try:
            return timm.create_model(name, pretrained=True, **options)
        except TypeError as error:
            raise _no_transformer(asked, error) from error
        except Exception as error:  # whatever a download can end in
            raise unavailable(asked, repository, _broken(error)) from error
    try:
        network = timm.create_model(name, pretrained=False, **options)
    except TypeError as error:
        raise _no_transformer(asked, error) from error
    _load_any(network, checkpoint)
    return network


def _repository(name: str) -> str | None:
    try:
        return timm.get_pretrained_cfg_value(name, "hf_hub_id")
    except RuntimeError as error:  # a tag that timm does not know
        tags = timm.list_pretrained(f"{name.partition('.')[0]}.*")
        raise UnknownModelError(f"expected a model of timm, got 'timm:{name}'. {nearest_names(name, tags)}") from error


def _no_transformer(asked: str, error: TypeError) -> ConfigError:
    return ConfigError(f"expected a vision transformer that takes images of any size, got '{asked}': {error}")


def _unreadable(folder: str, error: Exception) -> WeightsUnavailableError:
    return WeightsUnavailableError(
        f"expected a vision transformer in the folder '{folder}', but it cannot be loaded: {_broken(error)}"
    )


def _broken(error: Exception) -> str:
    first = next(iter(str(error).splitlines()), "")
    return f"{type(error).__name__}: {first}"


def _read_json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise WeightsUnavailableError(f"expected JSON in '{file}', but: {error}") from error
    if not isinstance(found, dict):
        raise WeightsUnavailableError(f"expected a JSON object in '{file}', got {type(found).__name__}")
    return found


def _any_size(name: str) -> dict[str, Any]:
    # DINOv3 takes any size as it is, and does not know the option.
    return {} if "dinov3" in _architecture(name) else {"dynamic_img_size": True}


def _architecture(name: str) -> str:
    config = Path(name) / "config.json"
    return str(_read_json(config)["architecture"]) if config.is_file() else name.partition(".")[0]


def _weight_file(folder: Path) -> str:
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).is_file():
            return str(folder / name)
    raise WeightsUnavailableError(
        f"expected model.safetensors or pytorch_model.bin in '{folder}', got neither; pass checkpoint='FILE'"
    )


def _load_any(network: nn.Module, checkpoint: str) -> None:
    """Load a timm checkpoint, or one in the layout of the model's own release, which timm knows how to translate."""
    state = read_checkpoint(checkpoint)
    own = network.state_dict()
    if not set(own) <= set(state):
        translate = getattr(sys.modules[type(network).__module__], "checkpoint_filter_fn", None)
        if translate is not None:
            state = translate(dict(state), network)
    load_state(network, state, checkpoint)


def _timm_facts(network: Any) -> dict[str, Any]:
    config = network.pretrained_cfg
    attention = network.blocks[0].attn
    has_cls = getattr(network, "cls_token", None) is not None
    fixed = not getattr(network, "dynamic_img_size", False)
    size = network.patch_embed.img_size if fixed else min(config.get("input_size", (3, 224, 224))[1:])
    tag = str(config.get("tag") or "")
    released = {"dino": "dino", "lvd142m": "dinov2" if network.num_prefix_tokens == 1 else "dinov2_reg"}
    return {
        "family": type(network).__name__,
        "source": f"timm:{config.get('architecture') or type(network).__name__}",
        "patch": network.patch_embed.patch_size[0],
        "depth": len(network.blocks),
        "dim": network.embed_dim,
        "heads": attention.num_heads,
        "prefix_tokens": network.num_prefix_tokens,
        "has_cls": has_cls,
        "default_size": tuple(size) if fixed else size,
        "mean": tuple(config.get("mean", IMAGENET_MEAN)),
        "std": tuple(config.get("std", IMAGENET_STD)),
        "position_rule": None if getattr(network, "pos_embed", None) is None else released.get(tag, "timm"),
        "licence": str(config.get("license") or "unknown"),
    }


def _transformers_facts(config: Any) -> dict[str, Any]:
    cls, mean, std, has_cls, rule = _TRANSFORMERS[config.model_type]
    return {
        "family": cls,
        "source": f"hf:{config._name_or_path or cls}",
        "patch": config.patch_size,
        "depth": config.num_hidden_layers,
        "dim": config.hidden_size,
        "heads": config.num_attention_heads,
        "prefix_tokens": int(has_cls) + int(getattr(config, "num_register_tokens", 0)),
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
    said = _read_json(file)
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
