"""Diffusion models with an aggregation network for their maps: published ones, the bundled one, and your own."""

import json
from pathlib import Path
from typing import Any

import torch

from vitfeats.card import ModelCard
from vitfeats.errors import ConfigError, WeightsUnavailableError
from vitfeats.extractors.diffusion import find_layers, hyperfeature_layers
from vitfeats.extractors.hyperfeatures import HyperfeatureModel, card_for, layer_channels
from vitfeats.models import diffusion
from vitfeats.models.bundled import ASSETS
from vitfeats.models.weights import require_weights, unavailable
from vitfeats.nets.aggregation import AggregationNetwork
from vitfeats.nets.denoiser import Denoiser

PREFIX = "hyperfeatures:"

_REPOSITORY = "g-luo/diffusion-hyperfeatures"
_PAPER = "Luo et al., Diffusion Hyperfeatures, NeurIPS 2023"
PUBLISHED = {
    "sd15": ("sd15", "aggregation_network.pt"),
    "sd15_one_step": ("sd15", "aggregation_network_one-step.pt"),
    "sd21_base": ("sd21_base", "aggregation_network_sdv2-1.pt"),
}
"""By name behind ``hyperfeatures:``, the diffusion model and the file of its aggregation network."""

BUNDLED = {"ddpm_mini": "ddpm_mini_aggregation.safetensors"}


def _card(name: str, model: str) -> ModelCard:
    card = next(card for card in diffusion.CARDS if card.name == model)
    dim = 384 if name in PUBLISHED else 128
    return card_for(card, dim, name=f"{PREFIX}{name}", paper=_PAPER if name in PUBLISHED else card.paper)


CARDS = (
    *(_card(name, model) for name, (model, _) in PUBLISHED.items()),
    *(_card(name, name) for name in BUNDLED),
)


def load(card: ModelCard, checkpoint: str | None = None) -> HyperfeatureModel:
    """Load a diffusion model of the catalogue and its aggregation network, or that of ``checkpoint``."""
    name = card.name.removeprefix(PREFIX)
    if name in BUNDLED:
        model, file = name, checkpoint or str(ASSETS / BUNDLED[name])
    else:
        model, published = PUBLISHED[name]
        file = checkpoint or _downloaded(card.name, published)
    base = next(base for base in diffusion.CARDS if base.name == model)
    return combined(diffusion.load(base), file)


def combined(denoiser: Denoiser, file: str) -> HyperfeatureModel:
    """Return a diffusion model with the aggregation network of a file.

    Raises:
        WeightsUnavailableError: If the file cannot be read.
        ConfigError: If it was made for other channels; the message names the layer.
    """
    names = hyperfeature_layers(find_layers(denoiser.unet))
    dims = list(layer_channels(denoiser).values())
    network = AggregationNetwork.from_checkpoint(read_aggregation(file), dims=dims, layers=names, origin=f"'{file}'")
    return HyperfeatureModel(denoiser, network)


def read_aggregation(file: str) -> dict[str, Any]:
    """Read an aggregation network: a torch file in the published layout, or safetensors that :func:`pack` wrote.

    Raises:
        WeightsUnavailableError: If there is no such file, it is damaged, or it asks for code to be run.
    """
    path = Path(file)
    if not path.is_file():
        raise WeightsUnavailableError(f"expected an aggregation network at '{file}', but there is no such file")
    try:
        if path.suffix == ".safetensors":
            from safetensors import safe_open

            with safe_open(file, framework="pt") as opened:
                config = json.loads((opened.metadata() or {}).get("config", "{}"))
                weights = {name: opened.get_tensor(name).float() for name in opened.keys()}  # noqa: SIM118
            return {"config": config, "aggregation_network": weights}
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damage can surface as anything
        first = next(iter(str(error).splitlines()), "")
        raise WeightsUnavailableError(
            f"expected an aggregation network at '{file}', but it is damaged, or holds more than tensors and plain "
            f"values: {first}"
        ) from error
    if not isinstance(found, dict):
        raise ConfigError(f"expected an aggregation network at '{file}', got {type(found).__name__}")
    return found


def pack(network: AggregationNetwork, file: Path | str) -> None:
    """Write an aggregation network as safetensors of 16-bit floats, its settings in the header."""
    from safetensors.torch import save_file

    made = network.checkpoint()
    weights = {name: value.half().contiguous() for name, value in made["aggregation_network"].items()}
    save_file(weights, str(file), metadata={"config": json.dumps(made["config"])})


def _downloaded(asked: str, file: str) -> str:
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    cached = try_to_load_from_cache(_REPOSITORY, file)
    if isinstance(cached, str):
        return cached
    require_weights(asked, _REPOSITORY)
    try:
        return hf_hub_download(_REPOSITORY, file)
    except Exception as error:  # whatever a download can end in
        raise unavailable(asked, _REPOSITORY, f"{type(error).__name__}: {error}") from error
