"""Small pictures, whole and broken, to be made into stores; what stores hold; a storage that counts and fails."""

import io
import tarfile
import uuid
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import numpy as np
import torch
from fsspec.implementations.memory import MemoryFileSystem
from PIL import Image

import vitfeats as vf
from vitfeats.apps.bulk import Summary, extract

TAPS = ["key@1", "token@2"]
SIZES = {"a/one.png": (40, 30), "a/two.png": (30, 40), "b/c/three.png": (64, 64), "five.png": (40, 30)}
SIZES |= {"four.png": (90, 33), "six.png": (7, 7), "z.png": (40, 30)}
NAMES = sorted(SIZES)


def pixels_of(size: tuple[int, int], seed: int) -> np.ndarray:
    """Return (height, width, 3) of uint8, noise, of a size (width, height)."""
    return np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)


def encoded(pixels: np.ndarray, kind: str = "PNG") -> bytes:
    """Return the bytes of a picture file."""
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, kind)
    return stream.getvalue()


def paint(path: Path, size: tuple[int, int], seed: int) -> None:
    """Write a picture of noise, of a size (width, height)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels_of(size, seed)).save(path)


def paint_all(root: Path) -> Path:
    """Write seven pictures of five sizes, in folders in a folder, and a file that is none."""
    for seed, (name, size) in enumerate(SIZES.items()):
        paint(root / name, size, seed)
    (root / "notes.md").write_text("no picture")
    return root


def broken_pictures() -> dict[str, bytes]:
    """Return files of eight kinds that no descriptor can be made of at size 112, by name."""
    whole = encoded(pixels_of((64, 64), 2))
    damaged, header = bytearray(whole), bytearray(whole)
    damaged[len(whole) // 2] ^= 255
    header[16:24] = (60_000).to_bytes(4, "big") * 2  # more pixels than Pillow opens
    header[29:33] = zlib.crc32(header[12:29]).to_bytes(4, "big")
    photograph = encoded(pixels_of((64, 64), 2), "JPEG")
    return {
        "a/cut.jpg": photograph[: len(photograph) // 2],
        "a/cut.png": whole[: len(whole) // 2],
        "a/long.png": encoded(np.zeros((1400, 1, 3), np.uint8)),  # too many tokens once its shorter side is 112
        "a/text.jpg": b"no picture",
        "damaged.png": bytes(damaged),
        "empty.png": b"",
        "huge.png": bytes(header),
        "program.png": encoded(pixels_of((8, 8), 2), "EPS"),
    }


def spoil(folder: Path) -> list[str]:
    """Add files of several kinds that are no whole pictures; return their names."""
    for name, data in broken_pictures().items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return sorted(broken_pictures())


def tarred(folder: Path, path: Path, mode: str = "w", start: str = ".") -> Path:
    """Pack a folder into a tar file."""
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload] - the mode is known at run time only
        archive.add(folder, arcname=start)
    return path


def run(mini: Any, source: Any, out: Any, **settings: Any) -> Summary:
    """Extract into small shards."""
    return extract(
        source, out, **{"model": mini, "taps": TAPS, "per_shard": 3, "batch_size": 3, "workers": 2, **settings}
    )


def shards(out: Path) -> dict[str, bytes]:
    """Return the bytes of all shards."""
    return {path.name: path.read_bytes() for path in sorted(out.glob("part-*"))}


def everything(out: Path) -> dict[str, bytes]:
    """Return the bytes of all files of a store."""
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


def assert_same(found: vf.Descriptors, expected: vf.Descriptors) -> None:
    """Compare all numbers and facts."""
    assert list(found) == list(expected)
    for d, other in zip(found.values(), expected.values(), strict=True):
        assert (d.grid, d.frames, d.model, d.heads) == (other.grid, other.frames, other.model, other.heads)
        assert torch.equal(d.features, other.features)
        for part in ("cls", "registers"):
            one, two = getattr(d, part), getattr(other, part)
            assert (one is None) == (two is None)
            assert one is None or torch.equal(one, two)


class WatchedStorage(MemoryFileSystem):
    """What lies at ``memory://`` addresses, at ``watched://`` too: it counts what is read, and fails when told to.

    Attributes:
        fetched: (path, bytes) of each file that was read, or the part of it.
        written: Path of each file that was written.
        error: Raised once ``reads`` or ``writes`` are used up.
        reads: How many more may be read before it fails; None is any number.
        writes: How many more may be written.
    """

    protocol = "watched"
    fetched: ClassVar[list[tuple[str, int]]] = []
    written: ClassVar[list[str]] = []
    error: ClassVar[BaseException] = OSError()
    reads: ClassVar[int | None] = None
    writes: ClassVar[int | None] = None

    @classmethod
    def _strip_protocol(cls, path: Any) -> Any:
        if isinstance(path, str):
            path = path.removeprefix("watched://")
        return super()._strip_protocol(path)

    @classmethod
    def _use(cls, what: str) -> None:
        left = getattr(cls, what)
        if left is not None:
            if left <= 0:
                raise cls.error
            setattr(cls, what, left - 1)

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **given: Any) -> bytes:
        self._use("reads")
        data = super().cat_file(path, start, end, **given)
        self.fetched.append((path, len(data)))
        return data

    def open(self, path: str, *given: Any, **named: Any) -> Any:
        self._use("reads")
        return super().open(path, *given, **named)

    def pipe_file(self, path: str, value: bytes, *given: Any, **named: Any) -> None:
        self._use("writes")
        super().pipe_file(path, value, *given, **named)
        self.written.append(path)


fsspec.register_implementation("watched", WatchedStorage, clobber=True)


@contextmanager
def failing(error: BaseException, *, reads: int | None = None, writes: int | None = None) -> Iterator[None]:
    """Let ``watched://`` fail after so many files were read or written."""
    WatchedStorage.error, WatchedStorage.reads, WatchedStorage.writes = error, reads, writes
    try:
        yield
    finally:
        WatchedStorage.reads = WatchedStorage.writes = None


@contextmanager
def in_memory() -> Iterator[str]:
    """Give a folder of object storage that lies in memory, without ``memory://``; it is gone in the end."""
    name = uuid.uuid4().hex
    try:
        yield name
    finally:
        MemoryFileSystem.store = {k: v for k, v in MemoryFileSystem.store.items() if not k.startswith(f"/{name}")}


def uploaded(folder: Path, address: str) -> str:
    """Copy the files of a folder, and of those in it, to an address."""
    files, root = fsspec.core.url_to_fs(address)
    for name, data in everything(folder).items():
        files.pipe_file(f"{root}/{name}", data)
    return address


def stored_at(address: str) -> dict[str, bytes]:
    """Return the bytes of all files below an address, by their paths in it."""
    files, root = fsspec.core.url_to_fs(address)
    return {path.removeprefix(f"{root}/"): files.cat_file(path) for path in sorted(files.find(root))}
