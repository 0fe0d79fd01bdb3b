"""Shards: safetensors files of the descriptors of many images, written whole, each able to prove that it is whole."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from hashlib import blake2b
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from vitfeats.apps.bulk.files import Place, UnreachableError, opened_tensors, write_bytes
from vitfeats.descriptor import Descriptor, Descriptors
from vitfeats.errors import ConfigError, StoreError, VitFeatsError
from vitfeats.grid import Frame, PatchGrid
from vitfeats.taps import Tap

FORMAT = "vitfeats.store/1"

StoreType = Literal["float32", "float16", "bfloat16", "int8"]
STORE_TYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int8": torch.int8,
}

_DIGITS = 32  # of a digest
_PARTS = ("features", "cls", "registers")


@dataclass(frozen=True)
class Header:
    """What a shard says of itself.

    Attributes:
        settings: How its features were made, as the store has it.
        images: Of each image its ``id``, its ``digest`` and, by tap, what a descriptor knows beside numbers.
        broken: Why images could not be read, by id.
    """

    settings: dict[str, Any]
    images: list[dict[str, Any]]
    broken: dict[str, str]

    @property
    def ids(self) -> list[str]:
        """The images that it holds, in order."""
        return [image["id"] for image in self.images]


@dataclass(frozen=True, eq=False)
class Rows:
    """All tokens of one tap of a shard.

    Attributes:
        ids: Of the images, in order.
        vectors: (rows, dim) in float32: the tokens of the first image, row-major over its grid, then of the second.
        grids: Of each image: it has ``grid.tokens`` rows.
        frames: Of each image.
    """

    ids: list[str]
    vectors: Float[Tensor, "rows dim"]
    grids: list[PatchGrid]
    frames: list[Frame]


def write_shard(
    path: Place,
    images: Sequence[tuple[str, Descriptors]],
    *,
    settings: Mapping[str, Any],
    dtype: StoreType = "float16",
    broken: Mapping[str, str] | None = None,
) -> None:
    """Write the descriptors of images into one file, whole or not at all. The same images give the same bytes.

    Args:
        path: Where.
        images: Of each image its id and the descriptors of its taps, a batch of 1 each.
        settings: How they were made: plain values.
        dtype: Of the numbers on disk. "int8" has a scale for each token.
        broken: Why other images could not be read, by id.

    Raises:
        StoreError: If the file cannot be written, or is more than one can hold; nothing is left behind then.
        ConfigError: If there is no such type.
    """
    write_bytes(path, shard_bytes(images, settings=settings, dtype=dtype, broken=broken))


def shard_bytes(
    images: Sequence[tuple[str, Descriptors]],
    *,
    settings: Mapping[str, Any],
    dtype: StoreType = "float16",
    broken: Mapping[str, str] | None = None,
) -> bytes:
    """Return what :func:`write_shard` writes; arguments and errors are its own."""
    from safetensors import SafetensorError
    from safetensors.torch import save

    if dtype not in STORE_TYPES:
        raise ConfigError(f"expected dtype {', '.join(map(repr, STORE_TYPES))}, got {dtype!r}")
    tensors: dict[str, Tensor] = {}
    listed: list[dict[str, Any]] = []
    for number, (name, descriptors) in enumerate(images):
        own: dict[str, Tensor] = {}
        taps: dict[str, Any] = {}
        for tap, d in descriptors.items():
            own |= {f"{tap}/{part}": value for part, value in _packed(d, dtype).items()}
            taps[str(tap)] = {
                "grid": asdict(d.grid),
                "frame": asdict(d.frames[0]),
                "model": d.model,
                "heads": d.heads,
            }
        listed.append({"id": name, "digest": _digest_of(own), "taps": taps})
        tensors |= {f"{number}/{part}": value for part, value in own.items()}
    facts = {"settings": dict(sorted(settings.items())), "images": listed, "broken": dict(broken or {})}
    text = json.dumps(facts)
    # In one entry, for safetensors writes several in an order that differs from run to run.
    try:
        return save(tensors, metadata={FORMAT: _digest_text(text) + text})
    except SafetensorError as error:
        raise StoreError(
            f"expected a shard that safetensors can hold, but: {error}; take a smaller per_shard"
        ) from error


def read_header(path: Place) -> Header:
    """Return what a shard says of itself; its numbers are not read.

    Raises:
        StoreError: If it is missing, cut off, changed, or not a shard.
    """
    with opened_tensors(path) as file:
        return _header(path, file)


def read_image(path: Place, position: int, header: Header | None = None) -> Descriptors:
    """Return the descriptors of one image of a shard, in float32; only its own bytes are read.

    Args:
        path: The shard.
        position: Of the image in it.
        header: Of the shard, where it is known already.

    Raises:
        StoreError: If the shard cannot be read.
    """
    with opened_tensors(path) as file:
        return _image(path, file, (header or _header(path, file)).images[position], position)


def read_images(path: Place, header: Header | None = None) -> Iterator[tuple[str, Descriptors]]:
    """Yield the id and the descriptors of each image of a shard, in order; the file is opened once.

    Raises:
        StoreError: If the shard cannot be read.
    """
    with opened_tensors(path, whole=True) as file:
        header = header or _header(path, file)
        for position, image in enumerate(header.images):
            yield image["id"], _image(path, file, image, position)


def read_rows(path: Place, tap: str, header: Header | None = None) -> Rows:
    """Return all tokens of one tap of a shard; of other taps nothing is read.

    Args:
        path: The shard.
        tap: As the store has it: ``key@11``.
        header: Of the shard, where it is known already.

    Raises:
        StoreError: If the shard cannot be read, or has no such tap.
    """
    with opened_tensors(path, whole=True) as file:
        header = header or _header(path, file)
        known = [image["taps"][tap] for image in header.images]
        found = []
        for position in range(len(known)):
            values = file.get_tensor(f"{position}/{tap}/features")
            scale = file.get_tensor(f"{position}/{tap}/features_scale") if values.dtype == torch.int8 else None
            found.append(values.float() if scale is None else values.float() * scale)
    grids = [PatchGrid(**{key: _paired(value) for key, value in one["grid"].items()}) for one in known]
    frames = [Frame(**{key: _paired(value) for key, value in one["frame"].items()}) for one in known]
    return Rows(header.ids, torch.cat(found) if found else torch.zeros(0, 0), grids, frames)


def check_shard(path: Place) -> str | None:
    """Return why a shard is not as it was written, or None: every number is read and compared with its digest.

    Raises:
        StoreError: If the object storage that it lies in cannot be read now, which tells nothing of the shard.
    """
    try:
        with opened_tensors(path, whole=True) as file:
            header = _header(path, file)
            for position, image in enumerate(header.images):
                names = _names_of(file, position)
                if _digest_of({name: file.get_tensor(f"{position}/{name}") for name in names}) != image["digest"]:
                    return f"the features of '{image['id']}' are not those that were written"
    except UnreachableError:
        raise
    except StoreError as error:
        return str(error)
    return None


def _packed(d: Descriptor, dtype: StoreType) -> dict[str, Tensor]:
    """Return the tensors of a descriptor of one image as they are stored, without the batch."""
    found: dict[str, Tensor] = {}
    for part in _PARTS:
        value: Tensor | None = getattr(d, part)
        if value is None:
            continue
        numbers = value.detach().float().cpu()[0]
        if dtype == "int8":
            # A scale a token: one for all would give most of the range to the few largest.
            scale = numbers.abs().amax(-1, keepdim=True).clamp_min(1e-12) / 127
            found[part], found[f"{part}_scale"] = (numbers / scale).round().to(torch.int8), scale
        else:
            limits = torch.finfo(STORE_TYPES[dtype])  # an infinity would be made of what is merely large
            found[part] = numbers.clamp(limits.min, limits.max).to(STORE_TYPES[dtype]).contiguous()
    return found


def _image(path: Place, file: Any, image: Mapping[str, Any], position: int) -> Descriptors:
    tensors = {name: file.get_tensor(f"{position}/{name}") for name in _names_of(file, position)}
    return _descriptors(path, image, tensors)


def _descriptors(path: Place, image: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Descriptors:
    try:
        items = []
        for text, known in image["taps"].items():
            values = {}
            for part in _PARTS:
                stored = tensors.get(f"{text}/{part}")
                scale = tensors.get(f"{text}/{part}_scale")
                if stored is not None:
                    values[part] = (stored.float() if scale is None else stored.float() * scale)[None]
            grid = PatchGrid(**{key: _paired(value) for key, value in known["grid"].items()})
            frame = Frame(**{key: _paired(value) for key, value in known["frame"].items()})
            features, cls, registers = (values.get(part) for part in _PARTS)
            d = Descriptor(features, grid, (frame,), Tap.parse(text), known["model"], cls, registers, known["heads"])  # type: ignore[arg-type] - a missing one is caught below
            items.append((text, d))
        return Descriptors(items)
    except (AttributeError, KeyError, TypeError, ValueError, VitFeatsError) as error:
        raise StoreError(f"expected whole descriptors of '{image.get('id')}' in '{path}', got: {error}") from error


def _header(path: Place, file: Any) -> Header:
    facts = file.metadata() or {}
    if FORMAT not in facts:
        raise StoreError(f"expected '{path}' to be a shard ({FORMAT}), got a file of another kind")
    digest, text = facts[FORMAT][:_DIGITS], facts[FORMAT][_DIGITS:]
    if digest != _digest_text(text):
        raise StoreError(f"expected the header of '{path}' as it was written, but it was changed or damaged")
    return Header(**json.loads(text))


def _names_of(file: Any, position: int) -> list[str]:
    start = f"{position}/"
    return sorted(name.removeprefix(start) for name in file.keys() if name.startswith(start))  # noqa: SIM118


def _digest_of(tensors: Mapping[str, Tensor]) -> str:
    found = blake2b(digest_size=_DIGITS // 2)
    for name in sorted(tensors):
        value = tensors[name].contiguous()
        found.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        found.update(value.view(torch.uint8).numpy().data if value.numel() else b"")
    return found.hexdigest()


def _digest_text(text: str) -> str:
    return blake2b(text.encode(), digest_size=_DIGITS // 2).hexdigest()


def _paired(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
