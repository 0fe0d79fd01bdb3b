"""Many pictures to learn from: a folder or a tar file, in the order of their names, in memory where they fit."""

import io
import lzma
import os
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image, UnidentifiedImageError

from vitfeats.errors import ConfigError, ImageError, StoreError
from vitfeats.preprocess import load_image, to_pil

T = TypeVar("T")

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")


def read_pictures(
    source: Path | str,
    *,
    side: int,
    only: Iterable[str] = (),
    without: Iterable[str] = (),
    broken: dict[str, str] | None = None,
) -> dict[str, np.ndarray]:
    """Read every picture of a folder (and the folders in it) or of a tar file, small enough to be kept in memory.

    Args:
        source: The folder, or the tar file.
        side: Shorter side in pixels that they are reduced to; smaller ones are enlarged.
        only: Names of those wanted, as paths inside the source without their suffix; empty is all.
        without: Names of those left out.
        broken: Where files that cannot be read are noted, and why, and left out; None raises at the first.

    Returns:
        By name, in the order of the names: (height, width, 3) of type uint8.

    Raises:
        StoreError: If the source cannot be read.
        ImageError: If a picture cannot be read, and ``broken`` is None; the message names it.
        ConfigError: If none is left.
    """
    files = PictureFiles(source, side=side, only=only, without=without)
    found: dict[str, np.ndarray] = {}
    for name in files:
        try:
            found[name] = files[name]
        except ImageError as error:
            if broken is None:
                raise
            broken[files.file_of(name)] = str(error)
    if not found:
        raise _none(source, bool(broken))
    return found


def open_pictures(
    source: Path | str,
    *,
    side: int,
    only: Iterable[str] = (),
    without: Iterable[str] = (),
    broken: dict[str, str] | None = None,
    most: float | None = None,
) -> Mapping[str, np.ndarray]:
    """Read pictures into memory as :func:`read_pictures` does; where they do not fit, each when it is asked for.

    Args:
        source: As for :func:`read_pictures`; so are the others.
        side: Shorter side in pixels.
        only: Names of those wanted.
        without: Names of those left out.
        broken: Where files that cannot be read are noted. Of pictures that do not fit, only what their first bytes
            tell is looked at.
        most: Bytes that they may take; None is half of what is free.

    Raises:
        StoreError, ImageError, ConfigError: As :func:`read_pictures` does.
    """
    files = PictureFiles(source, side=side, only=only, without=without)
    if files.size() <= (_free() / 2 if most is None else most):
        return read_pictures(source, side=side, only=only, without=without, broken=broken)
    for name in list(files):
        try:
            files.peek(name)
        except ImageError as error:
            if broken is None:
                raise
            broken[files.file_of(name)] = str(error)
            files.leave_out(name)
    if not files:
        raise _none(source, bool(broken))
    return files


class PictureFiles(Mapping[str, np.ndarray]):
    """Pictures of a folder or a tar file by name, each read when it is asked for: (height, width, 3) of type uint8.

    Args:
        source: The folder, or the tar file.
        side: Shorter side in pixels that they are brought to.
        only: Names of those wanted, as paths inside the source without their suffix; empty is all.
        without: Names of those left out.

    Raises:
        StoreError: If the source cannot be read.
        ConfigError: If there is none.
    """

    def __init__(self, source: Path | str, *, side: int, only: Iterable[str] = (), without: Iterable[str] = ()) -> None:
        wanted, unwanted = set(only), set(without)
        self._source, self._side = Path(source), side
        found: dict[str, tuple[str, Callable[[], Any]]] = {}
        for file, opener in picture_items(self._source):
            name = file.rpartition(".")[0]
            if name not in unwanted and (not wanted or name in wanted):
                found[name] = file, opener
        if not found:
            raise _none(source, bool(wanted or unwanted))
        self._found = dict(sorted(found.items()))

    def __getitem__(self, name: str) -> np.ndarray:
        """Read a picture.

        Raises:
            ImageError: If it cannot be read; the message names its file.
        """
        picture = self._opened(name, lambda item: to_pil(load_image(item)))
        scale = self._side / min(picture.size)
        size = tuple(max(self._side, round(length * scale)) for length in picture.size)
        return np.asarray(picture.resize(size, Image.Resampling.BICUBIC))  # type: ignore[arg-type] - a pair

    def __iter__(self) -> Iterator[str]:
        """Return the names, in order."""
        return iter(self._found)

    def __len__(self) -> int:
        """Return the number of pictures."""
        return len(self._found)

    def file_of(self, name: str) -> str:
        """Return the path of a picture inside the source."""
        return self._found[name][0]

    def peek(self, name: str) -> tuple[int, int]:
        """Return (width, height) of a picture as it is stored; its pixels are not read.

        Raises:
            ImageError: If it is no picture; the message names its file.
        """

        def measured(item: Any) -> tuple[int, int]:
            if isinstance(item, Image.Image):
                return item.size
            return opened_picture(Path(item).read_bytes()).size

        return self._opened(name, measured)

    def leave_out(self, name: str) -> None:
        """Forget a picture."""
        del self._found[name]

    def size(self, looked_at: int = 64) -> float:
        """Return about how many bytes all of them take in memory, after the shapes of some of them."""
        some = list(self._found)[:: max(1, len(self._found) // looked_at)]
        bytes_of = []
        for name in some:
            try:
                width, height = self.peek(name)
            except ImageError:
                continue
            bytes_of.append(3 * self._side**2 * max(width, height) / min(width, height))
        return sum(bytes_of) / max(1, len(bytes_of)) * len(self._found)

    def _opened(self, name: str, read: Callable[[Any], T]) -> T:
        file, opener = self._found[name]
        try:
            return read(opener())
        except ImageError as error:
            raise ImageError(f"'{file}' of '{self._source}': {error}") from error


def _none(source: Path | str, chosen: bool) -> ConfigError:
    return ConfigError(
        f"expected pictures ({', '.join(SUFFIXES)}) in '{source}', got none"
        + (" of the names that were asked for" if chosen else "")
    )


def _free() -> float:
    """Return the bytes of memory that are free, or can be made free at once."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        return 1024.0 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):  # not Linux
        return 0.5 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 2.0**32


def picture_files(folder: Path, *, deep: bool = True) -> list[Path]:
    """Return the picture files of a folder (``deep``: and of the folders in it), in the order of their paths.

    Raises:
        ConfigError: If there is none.
    """
    inside = folder.rglob("*") if deep else folder.iterdir()
    found = sorted(path for path in inside if path.suffix.lower() in SUFFIXES and not path.is_dir())
    if not found:
        raise _none(folder, chosen=False)
    return found


def read_names(path: Path | str) -> list[str]:
    """Return the names in a text file, one a line.

    Raises:
        StoreError: If the file cannot be read.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise StoreError(f"expected a list of names, one a line, at '{path}', but: {error}") from error
    return [line.strip() for line in lines if line.strip()]


def picture_items(source: Path) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Yield names, and what gives the picture to read."""
    if source.is_dir():
        for path in sorted(source.rglob("*")):
            if path.suffix.lower() in SUFFIXES and path.is_file():
                yield path.relative_to(source).as_posix(), partial(Path, path)
        return
    try:
        # Of a tar file that is not compressed, places are enough; the pictures of others are kept as they are stored.
        plain = is_plain_tar(source)
        with tarfile.open(source) as archive:
            for member in archive:
                if not member.isfile() or not member.name.lower().endswith(SUFFIXES):
                    continue
                name = member.name.removeprefix("./")
                if plain:
                    yield name, partial(_opened_at, source, member.offset_data, member.size)
                else:
                    content = archive.extractfile(member)
                    assert content is not None
                    yield name, partial(opened_picture, content.read())
    except (OSError, EOFError, tarfile.TarError, zlib.error, lzma.LZMAError) as error:
        raise StoreError(f"expected a folder or a tar file of pictures at '{source}', but: {error}") from error


def opened_picture(data: bytes) -> Image.Image:
    """Return a picture by the bytes of its file.

    Raises:
        ImageError: If it is none.
    """
    try:
        return Image.open(io.BytesIO(data))
    except UnidentifiedImageError as error:
        raise ImageError("expected a picture, but its format is none that is known") from error
    except Exception as error:  # each of Pillow's readers has its own way to fail
        raise ImageError(f"expected a picture, but: {error}") from error


def _opened_at(source: Path, offset: int, size: int) -> Image.Image:
    with source.open("rb") as file:
        file.seek(offset)
        return opened_picture(file.read(size))


def is_plain_tar(source: Path) -> bool:
    """Tell whether a file is a tar file that is not compressed."""
    try:
        with tarfile.open(source, "r:"):
            return True
    except (OSError, tarfile.ReadError):
        return False
