"""Finding the images of a source: what is in folders, lists, tar files and tables, and what each is called."""

import tarfile
from collections.abc import Iterator, Sequence
from fnmatch import fnmatch
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from vitfeats.apps.bulk.files import Place, filesystem, is_remote, joined, place_of, read_bytes
from vitfeats.apps.bulk.sources import Files, Held, Source, Tables, Tars, forget_groups, parquet_file
from vitfeats.errors import ConfigError, StoreError
from vitfeats.pictures import SUFFIXES, is_plain_tar, picture_items

_TARS = (".tar",)
_PACKED_TARS = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
_TABLES = (".parquet", ".pq")
_LISTS = (".txt", ".lst")
_IMAGE_COLUMNS = ("image", "jpg", "jpeg", "png", "webp", "bytes", "path", "file", "file_name", "url")
_ID_COLUMNS = ("id", "key", "__key__")


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
    forget_groups()
    ids: list[str] = []
    places: list[np.ndarray] = []
    for number, (file, name) in enumerate(zip(files, names, strict=True)):
        table = parquet_file(file)
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
