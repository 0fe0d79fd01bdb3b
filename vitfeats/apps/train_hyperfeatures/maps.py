"""What a frozen diffusion model gives for images: its layers' maps, computed once and kept on disk."""

import hashlib
import json
import warnings
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from vitfeats.configs import plain_config
from vitfeats.descriptor import write_whole
from vitfeats.extractors.diffusion import DiffusionExtractor
from vitfeats.extractors.hyperfeatures import layer_channels
from vitfeats.nets.denoiser import Denoiser
from vitfeats.preprocess import Prepared
from vitfeats.taps import Tap

_MAPS = "vitfeats.layer-maps/1"
_LOOKED_AT = 64  # numbers of each tensor by which weights are told apart

Layered = list[list[Tensor]]
"""``maps[step][layer]`` of one image, (1, channels, rows, cols) each, at the layer's own resolution."""


class MapCache:
    """Maps of images on disk, a safetensors file an image, whose sum never exceeds a bound.

    When the bound is reached it takes no more, and says so once. It never drops one for another: every image comes back
    once an epoch, so whatever was dropped would be missed before what replaced it is used. A disk that fails costs a
    warning, and a file that is damaged is as good as none.

    Args:
        folder: Made if missing. Files of other models and settings may lie in it; they count.
        gib: Bound, in GiB.
    """

    def __init__(self, folder: Path | str, gib: float) -> None:
        self.folder, self.gib = Path(folder), gib
        self._used, self._takes = 0, True
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._used = sum(file.stat().st_size for file in self.folder.glob("*.safetensors"))
        except OSError as error:
            self._stop(f"the maps cannot be kept in '{self.folder}', the run goes on without: {error}")

    def read(self, key: str, names: Sequence[str]) -> dict[str, Tensor] | None:
        """Return the maps of these names, on the CPU; None if they are not there or not whole."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self._path(key), framework="pt") as file:
                facts = file.metadata() or {}
                maps = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        except (OSError, SafetensorError):
            return None
        whole = set(maps) == set(names) and facts.get("format") == _MAPS and facts.get("checksum") == _checksum(maps)
        return maps if whole else None

    def write(self, key: str, maps: Mapping[str, Tensor]) -> None:
        """Keep maps, if there is room."""
        from safetensors.torch import save

        if not self._takes:
            return
        path = self._path(key)
        tensors = {name: value.cpu().contiguous() for name, value in maps.items()}
        data = save(tensors, metadata={"format": _MAPS, "checksum": _checksum(tensors)})
        try:
            damaged = path.stat().st_size if path.exists() else 0  # it is replaced
            if self._used - damaged + len(data) > self.gib * 2**30:
                self._stop(
                    f"the cache in '{self.folder}' is full ({self.gib:g} GiB); the maps of further images are computed "
                    "anew each time: raise cache_gib if there is room"
                )
                return
            write_whole(path, data)
        except OSError as error:  # a StoreError is one
            self._stop(f"the maps cannot be kept in '{self.folder}', the run goes on without: {error}")
            return
        self._used += len(data) - damaged

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.safetensors"

    def _stop(self, why: str) -> None:
        self._takes = False
        warnings.warn(why, RuntimeWarning, stacklevel=3)


class LayerMaps:
    """What a frozen diffusion model gives for an image: every layer that is aggregated, at every step that is kept.

    The maps are in half precision, whether they come from the cache or from the model, so that the cache changes no
    bit of a run; a map with values beyond the range of float16 (65504) stays in float32. An ensemble's are its mean.

    Args:
        extractor: Reads the model.
        steps: Tags of the steps; in the modes of one pass there is one, and its tag is not used.
        cache: Where maps are kept; None keeps none.

    Attributes:
        taps: ``taps[step][layer]``.
    """

    def __init__(self, extractor: DiffusionExtractor, steps: Sequence[int], cache: MapCache | None = None) -> None:
        inverting = extractor.diffusion.mode == "inversion"
        layers = layer_channels(extractor.model)
        self.taps = [[Tap("residual", name, step if inverting else None) for name in layers] for step in steps]
        self._extractor, self._cache = extractor, cache
        self._facts = json.dumps(facts_of(extractor), sort_keys=True).encode()

    def __call__(self, image: Float[Tensor, "3 height width"]) -> Layered:
        """Return the maps of one image in 0..1, on the extractor's device."""
        names = [str(tap) for row in self.taps for tap in row]
        key = self._key(image)
        maps = None if self._cache is None else self._cache.read(key, names)
        if maps is None:
            maps = {str(tap): _halved(seen) for tap, seen in self._computed(image).items()}
            if self._cache is not None:
                self._cache.write(key, maps)
        return [[maps[str(tap)].to(self._extractor.device) for tap in row] for row in self.taps]

    def _computed(self, image: Tensor) -> dict[Tap, Tensor]:
        extractor = self._extractor
        sums: dict[Tap, Tensor] = {}

        def keep(tap: Tap, seen: Tensor) -> None:
            if extractor.draws > 1:
                sums[tap] = sums[tap] + seen.float() if tap in sums else seen.float()
            else:
                sums[tap] = _halved(seen)  # at once: what is kept until the chain ends is then half as large

        def read(batch: Prepared) -> None:
            extractor.stream(batch, [tap for row in self.taps for tap in row], keep)

        extractor.run([image], read)
        return {tap: total / extractor.draws if extractor.draws > 1 else total for tap, total in sums.items()}

    def _key(self, image: Tensor) -> str:
        digest = hashlib.sha256(self._facts + str(tuple(image.shape)).encode())
        digest.update(image.to("cpu", torch.float32).contiguous().numpy().data)
        return digest.hexdigest()


def facts_of(extractor: DiffusionExtractor) -> dict[str, Any]:
    """Return, as plain values, all that the maps of an image depend on besides the image."""
    return {
        "model": extractor.card.name,
        "weights": _fingerprint(extractor.model),
        "dtype": str(extractor.autocast),
        "preprocess": plain_config(extractor.preprocess),
        "diffusion": plain_config(extractor.diffusion),
    }


def _halved(map: Tensor) -> Tensor:
    """Return a copy: the network may write over its own. Laid out as a file is, for convolutions round by layout."""
    half, whole = (
        map.to(dtype, copy=True, memory_format=torch.contiguous_format) for dtype in (torch.float16, torch.float32)
    )
    return half if bool(half.isfinite().all()) else whole


def _checksum(maps: Mapping[str, Tensor]) -> str:
    found = 0
    for name in sorted(maps):
        found = zlib.crc32(maps[name].numpy().data, zlib.crc32(name.encode(), found))
    return f"{found:08x}"


def _fingerprint(model: Denoiser) -> str:
    """Return a text that differs for models with other weights or another schedule.

    A few numbers of every tensor are looked at: what is trained, if only a little, moves all of them.
    """
    schedule = {name: value for name, value in model.schedule.items() if not name.startswith("_")}
    digest = hashlib.sha256(repr(sorted(schedule.items())).encode())
    for name, tensor in {**model.state_dict(), "kept": model.kept}.items():
        flat = tensor.detach().flatten()
        some = flat[:: max(1, len(flat) // _LOOKED_AT)][:_LOOKED_AT]
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(some.to("cpu", torch.float32).contiguous().numpy().data)
    return digest.hexdigest()[:16]
