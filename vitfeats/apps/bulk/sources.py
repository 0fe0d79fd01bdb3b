"""Images by number, from folders, lists, tar files and Parquet tables; on disk or in object storage."""

import errno
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from vitfeats.apps.bulk.files import Place, filesystem, joined, place_of, read_bytes
from vitfeats.errors import ImageError, MissingDependencyError, StoreError
from vitfeats.pictures import opened_picture
from vitfeats.preprocess import load_image

_OWN = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.EACCES, errno.EPERM)


class Source(ABC):
    """Images in an order that is always the same, by number. It can be pickled, so a part of it can go elsewhere.

    Attributes:
        ids: What each image is called, no two the same.
    """

    def __init__(self, ids: Sequence[str]) -> None:
        self.ids = list(ids)

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.ids)

    def image(self, number: int) -> Float[Tensor, "3 height width"]:
        """Read an image, float32 in 0..1.

        Raises:
            ImageError: If it is no image, or not there.
            StoreError: If what it lies in cannot be read.
        """
        opened = self.opened(number)
        if isinstance(opened, Image.Image) and opened.format == "EPS":  # as of a path
            raise ImageError("expected a picture, but it is a PostScript program, which may never end; pass it as PNG")
        try:
            return load_image(opened)
        except ImageError as error:
            self._check_reachable(error)
            # Named by its id: where the source lies does not get into a store.
            raise ImageError(str(error).replace(str(opened), self.ids[number])) from error

    @abstractmethod
    def opened(self, number: int) -> Path | Image.Image:
        """Return an image as :func:`~vitfeats.preprocess.load_image` takes it; raises as :meth:`image` does."""

    @abstractmethod
    def part(self, start: int, stop: int) -> "Source":
        """Return the images from one number to another, as a source of its own."""

    def _check_reachable(self, error: ImageError) -> None:
        """Raise StoreError where a disk failed, which no image is broken for.

        What is not there, or must not be read, is the image's own; decoders' errors have no number.
        """
        cause = error.__cause__
        if isinstance(cause, OSError) and cause.errno not in (None, *_OWN):
            raise StoreError(f"expected a disk that can be read, but: {cause}") from error

    def __repr__(self) -> str:
        """Say how many images it has."""
        return f"{type(self).__name__}({len(self)} images)"


class Files(Source):
    """Image files, the id of each its path: inside a folder, or as it is.

    Args:
        ids: Their paths; absolute ones, and addresses, are taken as they are.
        folder: Where the others begin, a path or an address.
    """

    def __init__(self, ids: Sequence[str], folder: Place) -> None:
        super().__init__(ids)
        self.folder = folder.absolute() if isinstance(folder, Path) else folder  # read in another process, maybe

    def opened(self, number: int) -> Path | Image.Image:
        """Return the path of a file, or the picture at an address."""
        name = self.ids[number]
        place = place_of(name) if "://" in name else joined(self.folder, name)
        return place if isinstance(place, Path) else _remote_picture(place)

    def part(self, start: int, stop: int) -> "Files":
        """Return some of the files."""
        return Files(self.ids[start:stop], self.folder)

    def _check_reachable(self, error: ImageError) -> None:
        super()._check_reachable(error)
        if isinstance(self.folder, Path) and not self.folder.is_dir():
            raise StoreError(f"expected the folder '{self.folder}' where it was, but it is gone") from error


class Tars(Source):
    """Images inside of tar files that are not compressed, WebDataset's shards among them; read where they lie.

    Args:
        ids: Of the images.
        files: The tar files.
        places: (images, 3): which tar file, where in it the image begins, and its bytes.
    """

    def __init__(self, ids: Sequence[str], files: Sequence[Place], places: np.ndarray) -> None:
        super().__init__(ids)
        self.files, self.places = _absolute(files), places

    def opened(self, number: int) -> Image.Image:
        """Return the picture of a member."""
        file, start, size = (int(value) for value in self.places[number])
        try:
            return opened_picture(read_bytes(self.files[file], start, start + size))
        except FileNotFoundError as error:  # no image is broken for that
            raise StoreError(f"expected the tar file '{self.files[file]}' where it was, but it is gone") from error

    def part(self, start: int, stop: int) -> "Tars":
        """Return some of the members."""
        return Tars(self.ids[start:stop], *_used(self.files, self.places[start:stop]))


class Held(Source):
    """Images whose files are held in memory, as they are stored: those of a compressed tar file.

    Args:
        ids: Of the images.
        pictures: What gives each.
    """

    def __init__(self, ids: Sequence[str], pictures: Sequence[Callable[[], Any]]) -> None:
        super().__init__(ids)
        self._pictures = list(pictures)

    def opened(self, number: int) -> Image.Image:
        """Return a picture."""
        return self._pictures[number]()

    def part(self, start: int, stop: int) -> "Held":
        """Return some of them."""
        return Held(self.ids[start:stop], self._pictures[start:stop])


class Tables(Source):
    """Images in Parquet tables: their bytes, Hugging Face's form {bytes, path} of them, or paths and addresses.

    Args:
        ids: Of the images.
        files: The tables.
        column: Where the images are.
        places: (images, 3): which table, which row group in it, which row of that.
    """

    def __init__(self, ids: Sequence[str], files: Sequence[Place], column: str, places: np.ndarray) -> None:
        super().__init__(ids)
        self.files, self.column, self.places = _absolute(files), column, places

    def opened(self, number: int) -> Path | Image.Image:
        """Return the picture of a row, or its path; a relative one is taken from the table's folder."""
        file, group, row = (int(value) for value in self.places[number])
        value = _groups.get(self.files[file], group, self.column)[row].as_py()
        if isinstance(value, dict):
            value = value.get("path") if value.get("bytes") is None else value["bytes"]
        if isinstance(value, bytes):
            return opened_picture(value)
        if not isinstance(value, str):
            got = "none" if value is None else f"a value of type {type(value).__name__}"
            raise ImageError(f"expected an image in row {row} of row group {group} of '{self.files[file]}', got {got}")
        place = place_of(value)
        if isinstance(place, Path):
            place = _beside(self.files[file], place)
        return place if isinstance(place, Path) else _remote_picture(place)

    def part(self, start: int, stop: int) -> "Tables":
        """Return some of the rows."""
        files, places = _used(self.files, self.places[start:stop])
        return Tables(self.ids[start:stop], files, self.column, places)


def parquet_file(file: Place) -> Any:
    """Open a Parquet table.

    Raises:
        MissingDependencyError: If pyarrow is not installed.
        StoreError: If it cannot be read as one.
    """
    try:
        import pyarrow.parquet as pq
    except ImportError as error:
        raise MissingDependencyError(
            'expected pyarrow to read Parquet, but it is not installed; try: pip install "vitfeats[bulk]"'
        ) from error
    try:
        if isinstance(file, Path):
            return pq.ParquetFile(file)
        files, path = filesystem(file)
        return pq.ParquetFile(files.open(path, "rb"))
    except (StoreError, MissingDependencyError):
        raise
    except Exception as error:  # pyarrow's, and those of each kind of storage
        raise StoreError(f"expected a Parquet table at '{file}', but: {error}") from error


class _Groups:
    """Row groups that were read last. Rows are asked for in order, a little ahead; by each device at another place.

    Attributes:
        most: How many are kept.
    """

    def __init__(self) -> None:
        self.most = 2
        self._lock, self._kept = Lock(), OrderedDict[Any, Future[Any]]()

    def get(self, *key: Any) -> Any:
        """Return a column of a row group; one thread reads it, others that want it wait for that one."""
        with self._lock:
            found = self._kept.get(key)
            mine = found is None
            if found is None:
                found = self._kept[key] = Future()
            self._kept.move_to_end(key)
            while len(self._kept) > self.most:
                self._kept.popitem(last=False)
        if mine:
            try:
                found.set_result(_group_of(*key))
            except BaseException as error:
                found.set_exception(error)
                with self._lock:
                    self._kept.pop(key, None)
        return found.result()

    def clear(self) -> None:
        """Forget all."""
        with self._lock:
            self._kept.clear()


_groups = _Groups()


def forget_groups() -> None:
    """Forget row groups that were read: a table may have been written anew since."""
    _groups.clear()


def keep_groups(most: int) -> None:
    """Keep so many row groups of tables in memory: two for each device that reads."""
    _groups.most = most


def _group_of(file: Place, group: int, column: str) -> Any:
    """Return one column of one row group."""
    table = parquet_file(file)
    try:
        return table.read_row_group(group, columns=[column]).column(column)
    except Exception as error:
        raise StoreError(f"expected row group {group} of '{file}', but it cannot be read: {error}") from error


def _beside(file: Place, name: Path) -> Place:
    """Return the place of a path that a table names."""
    if name.is_absolute():
        return name
    return file.parent / name if isinstance(file, Path) else f"{file.rpartition('/')[0]}/{name.as_posix()}"


def _used(files: Sequence[Place], places: np.ndarray) -> tuple[list[Place], np.ndarray]:
    """Return the files that places are in, and the places by their numbers among those."""
    numbers, renumbered = np.unique(places[:, 0], return_inverse=True)
    return [files[number] for number in numbers], np.column_stack([renumbered, places[:, 1:]])


def _absolute(files: Sequence[Place]) -> list[Place]:
    return [file.absolute() if isinstance(file, Path) else file for file in files]


def _remote_picture(place: str) -> Image.Image:
    return opened_picture(_required(place))


def _required(place: Place, start: int | None = None, end: int | None = None) -> bytes:
    """Return the bytes of an image; that there is none is the image's fault, all else is not."""
    try:
        return read_bytes(place, start, end)
    except FileNotFoundError as error:
        raise ImageError(f"expected an image at '{place}', but there is no such file") from error
