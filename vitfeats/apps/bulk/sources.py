"""Where many images come from: folders, lists of paths, tar files, Parquet tables; on disk or in object storage."""

import errno
import tarfile
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from fnmatch import fnmatch
from itertools import pairwise
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from vitfeats.apps.bulk.files import Place, filesystem, is_remote, joined, place_of, read_bytes
from vitfeats.errors import ConfigError, ImageError, MissingDependencyError, StoreError
from vitfeats.pictures import SUFFIXES, is_plain_tar, opened_picture, picture_items
from vitfeats.preprocess import load_image

_TARS = (".tar",)
_PACKED_TARS = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
_TABLES = (".parquet", ".pq")
_LISTS = (".txt", ".lst")
_IMAGE_COLUMNS = ("image", "jpg", "jpeg", "png", "webp", "bytes", "path", "file", "file_name", "url")
_OWN = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.EACCES, errno.EPERM)
_ID_COLUMNS = ("id", "key", "__key__")


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


def open_source(
    source: Source | Path | str, *, image_column: str | None = None, id_column: str | None = None
) -> Source:
    """Return the images of a source.

    Those of folders, lists and single tar files are in the order of their ids: the path inside the folder or tar file,
    or the line of the list, where relative paths begin at the list's own folder. With several tar files an id begins
    with the tar file's name. Rows of tables are in their own order; their id is that of the column ``id``, ``key`` or
    ``__key__`` where there is one, else table and row.

    Args:
        source: A folder of images (and the folders in it), of tar files or of Parquet tables; a tar file; a Parquet
            table; a text file (.txt, .lst) of paths or addresses, one a line; or a pattern with ``*`` for several
            files of a folder. Each a path, or an address that fsspec knows: ``s3://bucket/photographs``.
        image_column: Of tables: where the images are. None is the first that has a usual name.
        id_column: Of tables: what each image is called.

    Raises:
        StoreError: If it cannot be read.
        ConfigError: If there is no image, or two have one id.
        MissingDependencyError: If it needs a package that is not installed.
    """
    if isinstance(source, Source):
        return source
    place = place_of(source)
    name = str(place).lower()
    if name.endswith(_LISTS):
        found: Source = _listed(place)
    elif "*" in name and not (isinstance(place, Path) and place.exists()):
        found = _several(place, *_matching(place), image_column, id_column)
    elif name.endswith(_TABLES) and not (isinstance(place, Path) and place.is_dir()):
        found = _tables([place], [Path(str(place)).name], image_column, id_column)
    elif is_remote(place) and name.endswith(_PACKED_TARS):
        raise ConfigError(f"expected a tar file of which parts can be read, got the compressed '{place}'; unpack it")
    elif is_remote(place):
        found = _tars([place], [""]) if name.endswith(_TARS) else _remote_folder(place, image_column, id_column)
    else:
        found = _local(Path(place), image_column, id_column)
    if len(set(found.ids)) < len(found):
        ordered = sorted(found.ids)
        twice = next(name for name, other in pairwise(ordered) if name == other)
        hint = "; name another column with id_column=" if isinstance(found, Tables) else ""
        raise ConfigError(
            f"expected images of different names in '{source}', got some twice, '{twice}' among them{hint}"
        )
    if not len(found):
        raise ConfigError(f"expected images in '{source}', got none")
    return found


def _local(path: Path, image_column: str | None, id_column: str | None) -> Source:
    """Return the images of a folder or a tar file."""
    if path.is_dir():
        try:
            found = [name for name, _ in picture_items(path)]
            if found:
                return Files(sorted(found), path)
            inside = sorted(one for one in path.rglob("*") if one.is_file())
        except OSError as error:
            raise StoreError(f"expected a folder of images at '{path}', but: {error}") from error
        names = [one.relative_to(path).as_posix() for one in inside]
        return _several(path, [*inside], names, image_column, id_column)
    if path.name.lower().endswith(_PACKED_TARS) or not is_plain_tar(path):
        named = sorted(picture_items(path), key=lambda item: item[0])
        return Held([name for name, _ in named], [opener for _, opener in named])
    return _tars([path], [""])


def _remote_folder(folder: Place, image_column: str | None, id_column: str | None) -> Source:
    files, root = filesystem(str(folder))
    try:
        paths = sorted(files.find(root))
    except Exception as error:  # each kind of storage has its own
        raise StoreError(f"expected a folder of images at '{folder}', but: {error}") from error
    names = [path[len(root) :].lstrip("/") for path in paths]
    pictures = [name for name in names if name.lower().endswith(SUFFIXES)]
    if pictures:
        return Files(pictures, folder)
    return _several(folder, [joined(folder, name) for name in names], names, image_column, id_column)


def _several(
    place: Place, files: Sequence[Place], names: Sequence[str], image_column: str | None, id_column: str | None
) -> Source:
    """Return the images of several tar files or tables, or several images."""
    tars = [(file, name) for file, name in zip(files, names, strict=True) if name.lower().endswith(_TARS)]
    if tars:
        return _tars([file for file, _ in tars], [f"{name}/" for _, name in tars])
    tables = [(file, name) for file, name in zip(files, names, strict=True) if name.lower().endswith(_TABLES)]
    if tables:
        return _tables([file for file, _ in tables], [name for _, name in tables], image_column, id_column)
    folder = place_of(str(place).rpartition("/")[0] or ".") if "*" in str(place) else place
    return Files([name for name in names if name.lower().endswith(SUFFIXES)], folder)


def _matching(pattern: Place) -> tuple[list[Place], list[str]]:
    """Return files that match a pattern in the last part of a path, in order, and their names."""
    text = str(pattern)
    folder, _, last = text.rpartition("/")
    if "*" in folder:
        raise ConfigError(f"expected * in the last part of the path only, got '{text}'; give the folder instead")
    if is_remote(pattern):
        files, root = filesystem(folder)
        try:
            names = sorted(path.rpartition("/")[2] for path in files.ls(root, detail=False))
        except Exception as error:
            raise StoreError(f"expected a folder at '{folder}', but: {error}") from error
        found = [name for name in names if fnmatch(name, last)]
        return [f"{folder}/{name}" for name in found], found
    here = Path(folder or ("/" if text.startswith("/") else "."))
    try:
        found = sorted(one.name for one in here.iterdir() if fnmatch(one.name, last))
    except OSError as error:
        raise StoreError(f"expected a folder at '{here}', but: {error}") from error
    return [here / name for name in found], found


def _listed(place: Place) -> Files:
    """Return the images that a text file lists."""
    try:
        text = read_bytes(place).decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise StoreError(f"expected a list of images, one a line, at '{place}', but: {error}") from error
    folder = place.parent if isinstance(place, Path) else place.rpartition("/")[0]
    return Files(sorted(line for line in map(str.strip, text.split("\n")) if line), folder)


def _tars(files: Sequence[Place], prefixes: Sequence[str]) -> Tars:
    """Find the images in tar files."""
    ids: list[str] = []
    places: list[np.ndarray] = [np.zeros((0, 3), np.int64)]
    for number, (file, prefix) in enumerate(zip(files, prefixes, strict=True)):
        members = sorted(_members(file))
        ids += [f"{prefix}{name}" for name, _, _ in members]
        places.append(np.array([(number, start, size) for _, start, size in members], np.int64).reshape(-1, 3))
    return Tars(ids, files, np.concatenate(places))


def _members(file: Place) -> Iterator[tuple[str, int, int]]:
    """Yield name, start and size of each image in a tar file."""
    try:
        if isinstance(file, Path):
            archive = tarfile.open(file, "r:")  # noqa: SIM115 - closed below
        else:
            files, path = filesystem(file)
            archive = tarfile.open(fileobj=files.open(path, "rb"), mode="r:")  # noqa: SIM115
        with archive:
            for member in archive:
                if member.isfile() and member.name.lower().endswith(SUFFIXES):
                    yield member.name.removeprefix("./"), member.offset_data, member.size
                archive.members = []  # type: ignore[attr-defined] - it would keep every header
    except (OSError, EOFError, tarfile.TarError) as error:
        if isinstance(error, StoreError):
            raise
        raise StoreError(f"expected a folder or a tar file of pictures at '{file}', but: {error}") from error


def _tables(files: Sequence[Place], names: Sequence[str], image_column: str | None, id_column: str | None) -> Tables:
    """Find the images in Parquet tables, which are called by the names; only their ids are read."""
    _groups.clear()  # a table may have been written anew since it was read
    ids: list[str] = []
    places: list[np.ndarray] = []
    for number, (file, name) in enumerate(zip(files, names, strict=True)):
        table = _parquet(file)
        there = table.schema_arrow.names
        image_column = _column(image_column, _IMAGE_COLUMNS, there, file, "image_column")  # the same of all tables
        named = _column(id_column, _ID_COLUMNS, there, file, None if id_column is None else "id_column")
        for group in range(table.num_row_groups):
            rows = table.metadata.row_group(group).num_rows
            places.append(np.stack([np.full(rows, number), np.full(rows, group), np.arange(rows)], 1))
        if named is None:
            ids += [f"{name}:{row}" for row in range(table.metadata.num_rows)]
        else:
            ids += _ids_of(table, named, file)
    assert image_column is not None
    return Tables(ids, files, image_column, np.concatenate([np.zeros((0, 3), np.int64), *places]))


def _ids_of(table: Any, column: str, file: Place) -> list[str]:
    try:
        return [str(value) for value in table.read(columns=[column]).column(column).to_pylist()]
    except Exception as error:  # pyarrow's, and those of each kind of storage
        raise StoreError(f"expected ids in '{column}' of '{file}', but they cannot be read: {error}") from error


def _column(
    asked: str | None, usual: Sequence[str], there: Sequence[str], file: Place, option: str | None
) -> str | None:
    """Return the column that was asked for, or the first that has a usual name; without an option it may lack."""
    found = next((name for name in ([asked] if asked is not None else usual) if name in there), None)
    if found is None and option is not None:
        wanted = repr(asked) if asked is not None else "images"
        raise ConfigError(
            f"expected a column of {wanted} in '{file}', got the columns {', '.join(there)}; name it with {option}="
        )
    return found


def _parquet(file: Place) -> Any:
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


def keep_groups(most: int) -> None:
    """Keep so many row groups of tables in memory: two for each device that reads."""
    _groups.most = most


def _group_of(file: Place, group: int, column: str) -> Any:
    """Return one column of one row group."""
    table = _parquet(file)
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
