"""The Descriptor: the one record that every extractor returns and every helper takes."""

import json
import operator
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, SupportsIndex
from uuid import uuid4

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from vitfeats.errors import ShapeError, StoreError, VitFeatsError
from vitfeats.grid import Frame, PatchGrid
from vitfeats.resize import sample_map
from vitfeats.taps import Tap

Points = Tensor | np.ndarray | Sequence[Sequence[float]]
"""(n, 2) points, (x, y) in source pixels: a tensor, an array, or plain pairs."""

_FORMAT = "vitfeats.descriptor/1"


@dataclass(frozen=True, eq=False)
class Descriptor:
    """One facet of one layer for a batch of images on one grid, with all that a helper needs to use it.

    Attributes:
        features: (batch, tokens, dim) of the patch tokens, row-major over the grid; float32 unless converted.
        grid: The token grid, the same for the whole batch.
        frames: One :class:`~vitfeats.Frame` an image: its source and network size.
        tap: What was read, with the layer counted from the start.
        model: The model's name.
        cls: (batch, dim), the same facet of the CLS token, or None.
        registers: (batch, r, dim), the same facet of the register tokens, or None.
        heads: Number of attention heads that share ``dim``, or None. Channels are head-major, channel = head · d + i,
            as in Splice; ``features.unflatten(-1, (heads, -1)).transpose(-1, -2).flatten(-2)`` gives the d-major order
            of dino-vit-features (cosine similarities are the same).

    Raises:
        ShapeError: If the arrays, the grid and the frames do not fit each other.
    """

    features: Float[Tensor, "batch tokens dim"]
    grid: PatchGrid
    frames: tuple[Frame, ...]
    tap: Tap
    model: str
    cls: Float[Tensor, "batch dim"] | None = None
    registers: Float[Tensor, "batch r dim"] | None = None
    heads: int | None = None

    def __post_init__(self) -> None:
        """Check that arrays, grid and frames fit each other."""
        if self.features.ndim != 3 or self.features.shape[1] != self.grid.tokens:
            raise ShapeError(
                f"expected features (batch, {self.grid.tokens}, dim) for a grid of {self.grid.rows}×{self.grid.cols}, "
                f"got {tuple(self.features.shape)}"
            )
        batch, _, dim = self.features.shape
        if len(self.frames) != batch:
            raise ShapeError(f"expected one frame an image ({batch}), got {len(self.frames)}")
        if self.cls is not None and tuple(self.cls.shape) != (batch, dim):
            raise ShapeError(f"expected cls ({batch}, {dim}), got {tuple(self.cls.shape)}")
        if self.registers is not None and (
            self.registers.ndim != 3 or (self.registers.shape[0], self.registers.shape[2]) != (batch, dim)
        ):
            raise ShapeError(f"expected registers ({batch}, r, {dim}), got {tuple(self.registers.shape)}")
        for frame in self.frames:
            if frame.network_size != self.grid.network_size:
                raise ShapeError(
                    f"expected frames with the grid's network size {self.grid.network_size}, got {frame.network_size}"
                )

    @property
    def dim(self) -> int:
        """Channels of a token."""
        return self.features.shape[-1]

    @property
    def device(self) -> torch.device:
        """Where the features are."""
        return self.features.device

    @property
    def dtype(self) -> torch.dtype:
        """Type of the features."""
        return self.features.dtype

    @property
    def map(self) -> Float[Tensor, "batch dim rows cols"]:
        """The features as a map (batch, dim, rows, cols); a view, nothing is copied."""
        return self.features.transpose(1, 2).unflatten(2, (self.grid.rows, self.grid.cols))

    def __len__(self) -> int:
        """Return the number of images."""
        return self.features.shape[0]

    def __getitem__(self, index: SupportsIndex | slice) -> "Descriptor":
        """Return the images at ``index`` as a Descriptor; one image stays a batch of 1."""
        if not isinstance(index, slice):
            number = operator.index(index)
            if not -len(self) <= number < len(self):
                raise IndexError(f"expected an image index from {-len(self)} to {len(self) - 1}, got {number}")
            index = slice(number % len(self), number % len(self) + 1)
        # torch has no slices that run backwards; forward ones stay views.
        rows = list(range(len(self))[index]) if (index.step or 1) < 0 else index
        return replace(
            self,
            features=self.features[rows],
            frames=self.frames[index],
            cls=None if self.cls is None else self.cls[rows],
            registers=None if self.registers is None else self.registers[rows],
        )

    def __iter__(self) -> Iterator["Descriptor"]:
        """Iterate over the images, each a Descriptor with a batch of 1."""
        return (self[index] for index in range(len(self)))

    def __repr__(self) -> str:
        """Say what it is in one line."""
        batch, _, dim = self.features.shape
        extra = "".join(f", {name}" for name in ("cls", "registers") if getattr(self, name) is not None)
        return (
            f"Descriptor({self.tap} of {self.model}: batch {batch}, {self.grid.rows}×{self.grid.cols} tokens of {dim}"
            f"{extra}, {str(self.dtype).removeprefix('torch.')} on {self.device})"
        )

    def at(self, points: Points) -> Float[Tensor, "batch n dim"]:
        """Return the features at (x, y) source pixels, bilinear between token centres.

        Args:
            points: (n, 2), the same points for every image of the batch. Beyond the outermost centres the border
                value holds.

        Raises:
            ShapeError: If the points are not (n, 2), or lie outside an image.
        """
        where = as_points(points, self.features)
        # At least float32: positions in half precision would be off by a good part of a token.
        maps = self.map.to(torch.promote_types(self.dtype, torch.float32))
        values = []
        for index, frame in enumerate(self.frames):
            check_inside(where, frame)
            values.append(sample_map(maps[index : index + 1], self.grid, frame.to_network(where)))
        return torch.cat(values).transpose(1, 2).to(self.dtype)

    def to(self, *args: Any, **kwargs: Any) -> "Descriptor":
        """Return it on another device or in another floating type; takes what ``Tensor.to`` takes."""
        return self._mapped(lambda tensor: tensor.to(*args, **kwargs))

    def detach(self) -> "Descriptor":
        """Return it without its graph."""
        return self._mapped(torch.Tensor.detach)

    def numpy(self) -> np.ndarray:
        """Return the features as a float32 array (batch, tokens, dim) in main memory."""
        return self.features.detach().to("cpu", torch.float32).numpy()

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write it to a safetensors file, whole or not at all; return the path.

        Raises:
            StoreError: If the file cannot be written.
        """
        from safetensors.torch import save

        target = Path(path)
        arrays = {"features": self.features, "cls": self.cls, "registers": self.registers}
        tensors = {
            name: value.detach().cpu().contiguous().clone() for name, value in arrays.items() if value is not None
        }
        facts = {
            "format": _FORMAT,
            "grid": json.dumps(asdict(self.grid)),
            "frames": json.dumps([asdict(frame) for frame in self.frames]),
            "tap": str(self.tap),
            "model": self.model,
            "heads": json.dumps(self.heads),
        }
        write_whole(target, save(tensors, metadata=facts))
        return target

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Descriptor":
        """Read what :meth:`save` wrote.

        Raises:
            StoreError: If the file is missing, broken, or not a descriptor.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(os.fspath(path), framework="pt") as file:
                facts = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        except (OSError, SafetensorError) as error:
            raise StoreError(f"expected a descriptor at '{os.fspath(path)}', but it cannot be read: {error}") from error
        if facts.get("format") != _FORMAT:
            raise StoreError(
                f"expected '{os.fspath(path)}' to be written by Descriptor.save ({_FORMAT}), "
                f"got format {facts.get('format')!r}"
            )
        try:
            grid = {key: _tupled(value) for key, value in json.loads(facts["grid"]).items()}
            frames = tuple(Frame(**{k: _tupled(v) for k, v in frame.items()}) for frame in json.loads(facts["frames"]))
            return cls(
                tensors["features"],
                PatchGrid(**grid),
                frames,
                Tap.parse(facts["tap"]),
                facts["model"],
                tensors.get("cls"),
                tensors.get("registers"),
                json.loads(facts["heads"]),
            )
        except (AttributeError, KeyError, TypeError, ValueError, VitFeatsError) as error:
            raise StoreError(f"expected a whole descriptor in '{os.fspath(path)}', got: {error}") from error

    def _mapped(self, change: Any) -> "Descriptor":
        arrays = {name: getattr(self, name) for name in ("features", "cls", "registers")}
        return replace(self, **{name: None if value is None else change(value) for name, value in arrays.items()})


class Descriptors(Mapping[Tap, Descriptor]):
    """Several taps of one forward pass; found by Tap, by its text, or by the text as it was asked.

    ``ds["key@9"]``, ``ds[Tap("key", 9)]`` and, where it was asked so, ``ds["key@-3"]`` are the same Descriptor.
    Iteration gives the Taps in the order in which they were asked.
    """

    def __init__(self, items: Sequence[tuple[str, Descriptor]]) -> None:
        """Keep ``(text as asked, descriptor)`` pairs."""
        self._by_tap = {descriptor.tap: descriptor for _, descriptor in items}
        self._asked = {text: descriptor.tap for text, descriptor in items}

    def __getitem__(self, tap: Tap | str) -> Descriptor:
        """Return the descriptor of a tap."""
        key = self._asked.get(str(tap)) or Tap.parse(tap)
        if key not in self._by_tap:
            raise KeyError(f"expected one of {', '.join(map(str, self._by_tap))}, got '{tap}'")
        return self._by_tap[key]

    def get(self, tap: Any, default: Any = None) -> Any:
        """Return the descriptor of a tap, or ``default`` where it was not read or is no tap."""
        found = tap in self
        return self[tap] if found else default

    def __contains__(self, tap: object) -> bool:
        """Tell whether a tap was read."""
        if not isinstance(tap, Tap | str):
            return False
        try:
            self[tap]
        except (KeyError, VitFeatsError):
            return False
        return True

    def __iter__(self) -> Iterator[Tap]:
        """Iterate over the taps in the order in which they were asked."""
        return iter(self._by_tap)

    def __len__(self) -> int:
        """Return the number of different taps."""
        return len(self._by_tap)

    def __repr__(self) -> str:
        """List the descriptors."""
        return "Descriptors(\n" + "".join(f"  {descriptor!r}\n" for descriptor in self._by_tap.values()) + ")"


def as_points(points: Points, like: Tensor, dtype: torch.dtype = torch.float32) -> Float[Tensor, "n 2"]:
    """Return points as a tensor (n, 2) beside ``like``.

    Raises:
        ShapeError: If they are not (n, 2) finite numbers.
    """
    try:
        where = torch.as_tensor(points, dtype=dtype, device=like.device)
    except (TypeError, ValueError) as error:
        raise ShapeError(f"expected points (n, 2), (x, y) in pixels, got {points!r}") from error
    if where.ndim != 2 or where.shape[1] != 2:
        raise ShapeError(f"expected points (n, 2), (x, y) in pixels, got shape {tuple(where.shape)}; one: [(x, y)]")
    if not bool(where.isfinite().all()):
        raise ShapeError("expected finite points, got NaN or infinity; leave absent points out")
    return where


def check_inside(points: Float[Tensor, "n 2"], frame: Frame) -> None:
    """Raise ``ShapeError`` if a source point lies outside the image."""
    height, width = frame.source_size
    outside = (points < 0).any(1) | (points > points.new_tensor([width, height])).any(1)
    if bool(outside.any()):
        first = [round(value, 1) for value in points[outside][0].tolist()]
        raise ShapeError(
            f"expected points (x, y) inside the image of {width}×{height} pixels, got {first}; "
            "are x and y the wrong way round?"
        )


def write_whole(path: Path, data: bytes) -> None:
    """Write a file so that it appears whole or not at all.

    Raises:
        StoreError: If it cannot be written; nothing is left behind then.
    """
    temporary = path.parent / f".{uuid4().hex}.tmp"  # without the name, which may be as long as names can be
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise StoreError(f"expected to write '{path}', but: {error}") from error
    finally:
        with suppress(OSError):  # gone after the replacement, and never there if its folder is none
            temporary.unlink()


def _tupled(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
