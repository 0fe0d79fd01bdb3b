"""Networks of style transfer from files: the published layouts of AdaAttN, SANet and AdaIN, and our own."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vitfeats.descriptor import write_whole
from vitfeats.errors import ConfigError, WeightsUnavailableError, nearest_names
from vitfeats.models.weights import read_checkpoint
from vitfeats.nets.stylizing import NETWORKS, StyleNetwork

CHANNELS = (64, 128, 256, 512, 512)
"""Of relu1_1 to relu5_1 in VGG-19, whose maps the published networks take."""

ENCODER = "vgg_normalised"
"""Name of the model whose maps the published networks take."""

_HEADER = "stylizer"
_ADAATTN = ("adaattn_3", "transformer", "decoder")  # files, and parts of the network
TRAINED = "stylizer.safetensors"
"""What a training calls its network, in its folder."""

# Layers of the published decoders that are convolutions; those between are paddings, activations and doublings.
_CONVOLUTIONS = (1, 5, 8, 11, 14, 18, 21, 25, 28)
_FIRST_PART = 4  # layers of AdaAttN's decoder_layer_1; those behind are numbered from 0 again


@dataclass(frozen=True)
class Settings:
    """What a network of style transfer is built from.

    Attributes:
        method: A name of :data:`~vitfeats.nets.stylizing.NETWORKS`.
        channels: Of the maps relu1_1 to relu5_1 that it takes.
        widths: Of its decoder.
        inner: Channels that keys are compared in; None is as published.
        encoder: Name of the model whose maps it was trained with.
    """

    method: str
    channels: tuple[int, ...] = CHANNELS
    widths: tuple[int, ...] = CHANNELS[:3]
    inner: int | None = None
    encoder: str = ENCODER


def settings_of(file: Path | str) -> Settings:
    """Return what the network of a file or folder is built from, without reading its weights.

    Args:
        file: As for :func:`load_network`.

    Raises:
        WeightsUnavailableError: If there is no such file, a part of it is missing, or its header is damaged.
    """
    path = _file_of(file)
    if path.suffix == ".safetensors" and path.is_file():
        return _packed_settings(path)
    return Settings(_published(path)[0])


def load_network(file: Path | str, channels: Sequence[int] | None = None) -> StyleNetwork:
    """Load a network of style transfer, in evaluation mode; its weights can be trained further.

    Args:
        file: One of: a folder with AdaAttN's ``latest_net_adaattn_3.pth``, ``latest_net_transformer.pth`` and
            ``latest_net_decoder.pth``; a folder with one ``transformer_iter_….pth`` and one ``decoder_iter_….pth`` of
            SANet, or the first of them; AdaIN's ``decoder.pth``, or its folder; or a ``.safetensors`` that :func:`pack`
            wrote, or the folder of a training.
        channels: Of the maps relu1_1 to relu5_1 that it will be given. None is what a ``.safetensors`` says, and
            :data:`CHANNELS` for the published layouts.

    Raises:
        WeightsUnavailableError: If there is no such file, a part of it is missing, it is damaged, or it asks for code
            to be run.
        ConfigError: If it is made for other channels, or its weights are not those of the method; the message has the
            file and the names.
    """
    path = _file_of(file)
    if path.suffix == ".safetensors" and path.is_file():
        settings = _packed_settings(path)
        if channels is not None and tuple(channels) != settings.channels:
            raise ConfigError(
                f"expected a network for maps with {tuple(channels)} channels, but '{path}' is for "
                f"{settings.channels}, those of '{settings.encoder}'; load that encoder"
            )
        network = _empty(settings, path)
        names = {name: name for name in network.state_dict()}
        return _filled(network, _fitting(network, path, names))
    method, files = _published(path)
    wanted = tuple(channels or CHANNELS)
    network = _empty(Settings(method, wanted, wanted[:3]), path)
    own = network.state_dict()
    found: dict[str, Tensor] = {}
    for part, part_file in files.items():
        names = {_published_name(name, part, method): name for name in own if name.startswith(f"{part}.")}
        found |= _fitting(network, part_file, names)
    return _filled(network, found)


def pack(network: StyleNetwork, file: Path | str, *, encoder: str) -> None:
    """Write a network as safetensors of 16-bit floats, what it is built from in the header.

    Args:
        network: Any of :data:`~vitfeats.nets.stylizing.NETWORKS`.
        file: Is replaced if it is there.
        encoder: Name of the model whose maps it was trained with.

    Raises:
        ConfigError: If a weight is not finite as a 16-bit float.
        StoreError: If the file cannot be written.
    """
    from safetensors.torch import save

    weights = {
        name: value.detach().to("cpu", torch.float16).contiguous() for name, value in network.state_dict().items()
    }
    broken = [name for name, value in weights.items() if not value.isfinite().all()]
    if broken:
        raise ConfigError(f"expected weights that 16-bit floats can hold, got infinite ones or NaN in {_few(broken)}")
    settings = Settings(network.method, network.channels, network.widths, network.inner, encoder)
    write_whole(Path(file), save(weights, metadata={_HEADER: json.dumps(asdict(settings))}))


# What a file or folder holds ------------------------------------------------------------------------------------------


def _published(path: Path) -> tuple[str, dict[str, Path]]:
    """Return the method of a published layout, and the file of each part of its network."""
    if path.is_dir():
        if any(path.glob("latest_net_*.pth")):
            return "adaattn", _there({part: path / f"latest_net_{part}.pth" for part in _ADAATTN})
        if (path / "decoder.pth").is_file():
            return "adain", {"decoder": path / "decoder.pth"}
        transformers = sorted(path.glob("transformer_iter_*.pth"))
        if len(transformers) > 1:
            names = ", ".join(file.name for file in transformers)
            raise ConfigError(f"expected one transformer_iter_….pth in '{path}', got {names}; pass the file of one")
        if not transformers:
            raise WeightsUnavailableError(
                f"expected latest_net_adaattn_3.pth, latest_net_transformer.pth and latest_net_decoder.pth of AdaAttN, "
                f"transformer_iter_….pth and decoder_iter_….pth of SANet, decoder.pth of AdaIN, or {TRAINED}, in the "
                f"folder '{path}', got none of them"
            )
        path = transformers[0]
    if path.name.startswith("transformer_iter_"):
        decoder = path.with_name(path.name.replace("transformer", "decoder", 1))
        return "sanet", _there({"transformer": path, "decoder": decoder})
    return "adain", _there({"decoder": path})


def _file_of(file: Path | str) -> Path:
    """Return the file of a folder that a training wrote; else the file or folder as it is."""
    path = Path(file)
    return path / TRAINED if (path / TRAINED).is_file() else path


def _there(files: dict[str, Path]) -> dict[str, Path]:
    missing = [str(file) for file in files.values() if not file.is_file()]
    if missing:
        raise WeightsUnavailableError(
            f"expected the weights of a network of style transfer at '{missing[0]}', but there is no such file"
        )
    return files


def _packed_settings(path: Path) -> Settings:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as opened:
            said = json.loads((opened.metadata() or {}).get(_HEADER, "null"))
    except (OSError, SafetensorError, ValueError) as error:
        raise WeightsUnavailableError(
            f"expected a network of style transfer at '{path}', but it is damaged: {error}"
        ) from error
    if not _is_settings(said):
        raise WeightsUnavailableError(
            f"expected a network of style transfer that vitfeats.models.stylizers.pack wrote, but the header of "
            f"'{path}' says {said!r}"
        )
    return Settings(**{**said, "channels": tuple(said["channels"]), "widths": tuple(said["widths"])})


def _is_settings(said: Any) -> bool:
    def counts(value: Any, count: int) -> bool:
        return isinstance(value, list) and len(value) == count and all(type(n) is int and 0 < n < 2**16 for n in value)

    return (
        isinstance(said, Mapping)
        and set(said) == set(Settings.__dataclass_fields__)
        and isinstance(said["method"], str)
        and isinstance(said["encoder"], str)
        and counts(said["channels"], 5)
        and counts(said["widths"], 3)
        and (said["inner"] is None or counts([said["inner"]], 1))
    )


# Weights into a network -----------------------------------------------------------------------------------------------


def _empty(settings: Settings, path: Path) -> StyleNetwork:
    """Build a network without memory for its weights."""
    if settings.method not in NETWORKS:
        raise ConfigError(
            f"expected a method of style transfer, but '{path}' is of {settings.method!r}. "
            f"{nearest_names(settings.method, NETWORKS)}"
        )
    with torch.device("meta"):
        return NETWORKS[settings.method](settings.channels, settings.widths, settings.inner)


def _published_name(name: str, part: str, method: str) -> str:
    """Return the name that a published file has for one of our weights."""
    inside = name.removeprefix(f"{part}.")
    if part != "decoder":
        return inside
    _, number, kind = inside.split(".")  # convs.0.weight
    layer = _CONVOLUTIONS[int(number)]
    if method != "adaattn":
        return f"{layer}.{kind}"
    return f"decoder_layer_1.{layer}.{kind}" if layer < _FIRST_PART else f"decoder_layer_2.{layer - _FIRST_PART}.{kind}"


def _fitting(network: StyleNetwork, file: Path, names: Mapping[str, str]) -> dict[str, Tensor]:
    """Return a file's weights by our names, given ours of each of its own, if they are all there, and no others."""
    state, own = read_checkpoint(file), network.state_dict()
    bent = [
        f"{name}: {tuple(state[name].shape)} instead of {tuple(own[ours].shape)}"
        for name, ours in names.items()
        if name in state and state[name].shape != own[ours].shape
    ]
    wrong = {
        "missing": [name for name in names if name not in state],
        "unexpected": [name for name in state if name not in names],
        "of another shape": bent,
    }
    complaints = [f"{len(found)} {what} ({_few(found)})" for what, found in wrong.items() if found]
    if complaints:
        raise ConfigError(
            f"expected weights of '{network.method}' for maps with {network.channels} channels, but '{file}' has names "
            f"{'; '.join(complaints)}; is it of the same method and encoder?"
        )
    return {ours: state[name] for name, ours in names.items()}


def _filled(network: StyleNetwork, weights: Mapping[str, Tensor]) -> StyleNetwork:
    network.load_state_dict(weights, assign=True)
    return network.eval()


def _few(names: Sequence[str]) -> str:
    return f"{', '.join(names[:4])}{', …' if len(names) > 4 else ''}"
