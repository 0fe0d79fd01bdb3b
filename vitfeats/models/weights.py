"""Getting at weights: the cache, one short look at the network, and files that are read without running them."""

import json
import os
import pickle
import socket
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from torch import Tensor, nn

from vitfeats.errors import ConfigError, UnknownModelError, WeightsUnavailableError

PROBE_SECONDS = 2.0
_FILES = (
    "model_index.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "open_clip_model.safetensors",
)


def require_weights(model: str, repository: str) -> None:
    """Return if a hub repository's weights are cached or its hub answers; else raise, within about two seconds.

    The hub (or the proxy on the way to it) is asked once for a connection. A download that then turns out slow is
    never cut off.

    Args:
        model: The name the user asked for, for the message.
        repository: ``ORG/NAME`` on the hub.

    Raises:
        WeightsUnavailableError: If the weights are neither cached nor reachable.
    """
    from huggingface_hub import constants, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        if any(isinstance(try_to_load_from_cache(repository, name), str) for name in _FILES):
            return
    except HFValidationError as error:
        raise UnknownModelError(f"expected a model as ORG/NAME, got {repository!r}: {error}") from error
    if constants.HF_HUB_OFFLINE:
        why = "the hub is switched off (HF_HUB_OFFLINE)"
    else:
        host, port = _door(constants.ENDPOINT)
        if _answers(host, port):
            return
        why = f"{host} does not answer"
    raise unavailable(model, repository, why)


def unavailable(model: str, repository: str, why: str) -> WeightsUnavailableError:
    """Return the error that says where weights were sought and what to do without them."""
    from huggingface_hub import constants

    return WeightsUnavailableError(
        f"expected the weights of '{model}' ({repository}), looked for in the cache {constants.HF_HUB_CACHE}, but "
        f"{why}; pass checkpoint='FILE' if you have them elsewhere, or use the bundled model 'mini', which needs no "
        "download"
    )


def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read a state dict from a safetensors file, or from a torch file without running any code in it.

    Training checkpoints are unpacked: of ``teacher``, ``model``, ``state_dict`` the first that is there, and the
    prefixes ``module.``, ``backbone.`` and ``_orig_mod.`` taken off (as the DINO repository's full checkpoints need).

    Raises:
        WeightsUnavailableError: If there is no such file, it is damaged, or it asks for code to be run.
    """
    file = Path(path)
    if not file.is_file():
        raise WeightsUnavailableError(f"expected a weight file at '{file}', but there is none; pass checkpoint='FILE'")
    if file.suffix == ".safetensors":
        return _read_safetensors(file)
    try:
        loaded = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise WeightsUnavailableError(
            f"refused to read '{file}': it is damaged, or holds more than tensors and would run code when loaded; if "
            "you trust where it is from, convert it to safetensors"
        ) from error
    except Exception as error:  # damage can surface as anything: KeyError, struct.error, AssertionError, …
        raise WeightsUnavailableError(
            f"expected a torch weight file at '{file}', but it is damaged: {error}"
        ) from error
    return _state_dict(loaded, file)


def load_state(model: nn.Module, state: Mapping[str, Tensor], origin: str) -> None:
    """Load a state dict into a model; weights of a classification head may be missing on either side.

    Raises:
        ConfigError: If keys or shapes do not fit; the message says which.
    """
    own = model.state_dict()
    # Old files do not count the batches of their batch norms; torch does without, too.
    optional = ("num_batches_tracked",)
    missing = [key for key in own if key not in state and not _is_head(key) and not key.endswith(optional)]
    foreign = [key for key in state if key not in own and not _is_head(key)]
    bent = [
        f"{key}: {tuple(state[key].shape)} instead of {tuple(own[key].shape)}"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]
    complaints = [
        f"{len(found)} {what} ({', '.join(found[:4])}{', …' if len(found) > 4 else ''})"
        for what, found in (("missing", missing), ("unexpected", foreign), ("of another shape", bent))
        if found
    ]
    if complaints:
        raise ConfigError(
            f"expected a checkpoint that fits {type(model).__name__}, but '{origin}' has keys {'; '.join(complaints)}; "
            "is it of the same model?"
        )
    model.load_state_dict({key: state[key] for key in own if key in state}, strict=False)


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object from a file of a model's folder.

    Raises:
        WeightsUnavailableError: If there is none.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise WeightsUnavailableError(f"expected JSON in '{file}', but: {error}") from error
    if not isinstance(found, dict):
        raise WeightsUnavailableError(f"expected a JSON object in '{file}', got {type(found).__name__}")
    return found


def _is_head(key: str) -> bool:
    return key.split(".")[0] in ("head", "head_dist", "classifier", "fc", "pre_logits", "mask_token", "pooler")


def _read_safetensors(file: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return _state_dict(load_file(file), file)
    except (OSError, SafetensorError) as error:
        raise WeightsUnavailableError(f"expected a safetensors file at '{file}', but it is damaged: {error}") from error


def _state_dict(loaded: Any, file: Path) -> dict[str, Tensor]:
    for name in ("teacher", "model", "state_dict"):
        if isinstance(loaded, Mapping) and isinstance(loaded.get(name), Mapping):
            loaded = loaded[name]
    tensors = {key: value for key, value in loaded.items() if isinstance(value, Tensor)} if _is_dict(loaded) else {}
    if not tensors:
        raise WeightsUnavailableError(f"expected a state dict in '{file}', got {type(loaded).__name__} without tensors")
    return {_bare(key): value.float() if value.is_floating_point() else value for key, value in tensors.items()}


def _is_dict(loaded: Any) -> bool:
    return isinstance(loaded, Mapping)


def _bare(key: str) -> str:
    for prefix in ("module.", "_orig_mod.", "backbone."):
        key = key.removeprefix(prefix)
    return key


def _door(endpoint: str) -> tuple[str, int]:
    """Return (host, port) of the first thing on the way to the hub: the proxy if there is one."""
    from urllib.request import getproxies, proxy_bypass

    target = urlsplit(endpoint)
    proxy = None if proxy_bypass(target.hostname or "") else getproxies().get(target.scheme)
    first = urlsplit(proxy if proxy and "://" in proxy else f"http://{proxy}") if proxy else target
    return first.hostname or "huggingface.co", first.port or (443 if first.scheme == "https" else 80)


def _answers(host: str, port: int) -> bool:
    answered = threading.Event()

    def knock() -> None:
        try:
            socket.create_connection((host, port), timeout=PROBE_SECONDS).close()
            answered.set()
        except OSError:
            pass

    # In a thread of its own, because looking up a name has no time-out.
    thread = threading.Thread(target=knock, daemon=True)
    thread.start()
    thread.join(PROBE_SECONDS)
    return answered.is_set()
