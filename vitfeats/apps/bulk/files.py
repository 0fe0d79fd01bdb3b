"""Files of a folder, or of object storage, by the same few functions. Object storage goes through fsspec."""

import errno
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vitfeats.descriptor import write_whole
from vitfeats.errors import MissingDependencyError, StoreError

Place = Path | str
"""A path; or, as text, an address that fsspec knows: ``s3://bucket/store``."""

_FIRST = 1 << 16  # bytes of a remote file that are asked for first; the header of most shards is within
_NO_FILE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EINVAL)  # the last: an empty one
_MOST = 1 << 30  # bytes of a header: beyond, the file is not what it should be
_TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I8": torch.int8,
}


class UnreachableError(StoreError):
    """A file or folder that may be whole, but that cannot be reached now."""


def place_of(given: Path | str) -> Place:
    """Return a path, or an address without a slash at its end."""
    text = str(given)
    if text.startswith("file://"):
        return Path(text.removeprefix("file://"))
    return text.rstrip("/") if "://" in text else Path(given)


def is_remote(place: Place) -> bool:
    """Tell whether a place is an address."""
    return isinstance(place, str)


def joined(folder: Place, name: str) -> Place:
    """Return the place of a file in a folder."""
    return f"{folder}/{name}" if isinstance(folder, str) else folder / name


def make_folder(folder: Place) -> None:
    """Make a folder; object storage needs none.

    Raises:
        StoreError: If it cannot be made.
    """
    if isinstance(folder, str):
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(f"expected a folder to write to at '{folder}', but: {error}") from error


def sizes_in(folder: Place) -> dict[str, int]:
    """Return the files of a folder by name, and their sizes in bytes; of a folder that is not there, none.

    Raises:
        StoreError: If it cannot be read.
    """
    try:
        with _reaching("read", folder):
            if isinstance(folder, Path):
                with os.scandir(folder) as entries:
                    sizes = ((entry.name, _size_of(entry)) for entry in entries)
                    return {name: size for name, size in sizes if size is not None}
            files, root = filesystem(folder)
            files.invalidate_cache()
            found = files.ls(root, detail=True)
            return {one["name"].rpartition("/")[2]: one["size"] for one in found if one["type"] == "file"}
    except FileNotFoundError:
        return {}


def exists(place: Place) -> bool:
    """Tell whether there is a file.

    Raises:
        StoreError: If that cannot be told.
    """
    with _reaching("read", place):
        if isinstance(place, Path):
            return place.exists()
        files, path = filesystem(place)
        return files.exists(path)


def read_bytes(place: Place, start: int | None = None, end: int | None = None) -> bytes:
    """Return a file's bytes, or those from start to end.

    Raises:
        FileNotFoundError: If there is none.
        UnreachableError: If it cannot be read.
        StoreError: If its address is none.
    """
    with _reaching("read", place):
        if isinstance(place, Path):
            with place.open("rb") as file:
                file.seek(start or 0)
                return file.read() if end is None else file.read(end - (start or 0))
        files, path = filesystem(place)
        return files.cat_file(path, start, end)


def write_bytes(place: Place, data: bytes) -> None:
    """Write a file that appears whole or not at all, as object storage does by itself.

    Raises:
        StoreError: If it cannot be written; nothing is left behind then.
    """
    if isinstance(place, Path):
        write_whole(place, data)
        return
    files, path = filesystem(place)
    try:
        files.pipe_file(path, data)
    except Exception as error:
        raise StoreError(f"expected to write '{place}', but: {error}") from error


def remove(place: Place) -> None:
    """Remove a file, if there is one.

    Raises:
        StoreError: If it cannot be removed.
    """
    with suppress(FileNotFoundError), _reaching("remove", place):
        if isinstance(place, Path):
            place.unlink()
            return
        files, path = filesystem(place)
        files.rm_file(path)


def filesystem(address: str) -> tuple[Any, str]:
    """Return what fsspec has for an address, and the path in it.

    Raises:
        MissingDependencyError: If the package for its kind is not installed.
        StoreError: If there is no such kind, or it cannot be reached.
    """
    import fsspec

    try:
        return fsspec.core.url_to_fs(address)
    except ImportError as error:
        kind = address.partition("://")[0]
        package = {"s3": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs"}.get(kind, kind)
        raise MissingDependencyError(
            f"expected what fsspec needs for {kind}://, but it is not installed ({error}); try: pip install {package}"
        ) from error
    except Exception as error:
        raise StoreError(f"expected an address that fsspec knows, got '{address}': {error}") from error


@contextmanager
def _reaching(what: str, place: Place) -> Iterator[None]:
    """Make one error of those that each kind of storage has of its own; that something is not there stays as it is."""
    try:
        yield
    except (FileNotFoundError, StoreError, MissingDependencyError):
        raise
    except Exception as error:
        raise UnreachableError(f"expected to {what} '{place}', but: {error}") from error


@contextmanager
def opened_tensors(place: Place, *, whole: bool = False) -> Iterator[Any]:
    """Open a safetensors file: ``metadata()``, ``keys()`` and ``get_tensor(name)``, which reads what it returns.

    Args:
        place: The file.
        whole: All of it will be asked for: a remote file is then fetched at once, not tensor by tensor.

    Raises:
        UnreachableError: If it cannot be read now, whatever is in it.
        StoreError: If it cannot be read as one, now or while it is open.
    """
    from safetensors import SafetensorError, safe_open

    try:
        if isinstance(place, Path):
            with safe_open(str(place), framework="pt") as file:
                yield file
        else:
            data = read_bytes(place) if whole else None
            yield _Tensors(lambda start, end: read_bytes(place, start, end) if data is None else data[start:end])
    except (OSError, SafetensorError, ValueError, LookupError) as error:
        if isinstance(error, StoreError):
            raise
        if isinstance(error, OSError) and error.errno not in (None, *_NO_FILE):
            raise UnreachableError(f"expected to read '{place}', but: {error}") from error
        raise StoreError(f"expected a whole shard at '{place}', but it cannot be read: {error}") from error


def _size_of(entry: "os.DirEntry[str]") -> int | None:
    """Return the size of a file; None of what is none, or is gone by now, as a file that was being written."""
    try:
        return entry.stat().st_size if entry.is_file() else None
    except FileNotFoundError:
        return None


class _Tensors:
    """A safetensors file that is read piece by piece, by what fetches bytes from one place to another."""

    def __init__(self, fetch: Callable[[int, int], bytes]) -> None:
        self._fetch = fetch
        first = fetch(0, _FIRST)
        length = int.from_bytes(first[:8], "little")
        if len(first) < 8 or length > _MOST:
            raise ValueError("its header is not one")
        text = first[8 : 8 + length] if len(first) >= 8 + length else fetch(8, 8 + length)
        if len(text) < length:
            raise ValueError("its header is cut off")
        self._header: dict[str, Any] = json.loads(text)
        if not isinstance(self._header, dict) or not isinstance(self._header.get("__metadata__", {}), dict):
            raise ValueError("its header is of another kind")
        self._start = 8 + length

    def metadata(self) -> dict[str, str]:
        return self._header.get("__metadata__", {})

    def keys(self) -> list[str]:
        return [name for name in self._header if name != "__metadata__"]

    def get_tensor(self, name: str) -> Tensor:
        facts = self._header[name]
        (start, end), shape, dtype = facts["data_offsets"], facts["shape"], _TYPES[facts["dtype"]]
        if end - start != prod(shape) * dtype.itemsize:
            raise ValueError(f"'{name}' has {end - start} bytes for the shape {shape}")
        data = self._fetch(self._start + start, self._start + end) if end > start else b""
        if len(data) < end - start:
            raise ValueError(f"'{name}' is cut off")
        return (
            torch.frombuffer(bytearray(data), dtype=dtype).reshape(shape) if data else torch.zeros(shape, dtype=dtype)
        )
