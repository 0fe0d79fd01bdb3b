"""A store: a folder of shards with the descriptors of many images, read one image at a time."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path
from typing import Any

from vitfeats.apps.bulk.files import (
    Place,
    UnreachableError,
    joined,
    make_folder,
    place_of,
    read_bytes,
    remove,
    sizes_in,
    write_bytes,
)
from vitfeats.apps.bulk.reduction import PCA_FILE, Reduction, read_reduction
from vitfeats.apps.bulk.shards import FORMAT, Header, Rows, check_shard, read_header, read_image, read_images, read_rows
from vitfeats.descriptor import Descriptor, Descriptors
from vitfeats.errors import ConfigError, StoreError, nearest_names

try:
    import fcntl
except ImportError:  # Windows: stores can be read there
    fcntl = None

ABOUT, IDS, LOCK = "store.json", "ids.jsonl", ".lock"
POOLED = "pooled"
"""The folder of a store that has one vector an image and tap, as Parquet; and the setting that asks for it."""

_MISSING = "it is missing"
_AT_ONCE, _MANY = 8, 64  # headers that are read at once, and that are asked for at a time
_KEPT = 8  # headers that are kept: what is asked for image by image is often beside each other


@dataclass(frozen=True)
class Damage:
    """A shard that is not as it should be.

    Attributes:
        shard: Its number.
        why: What is wrong.
        images: How many images it is to have.
    """

    shard: int
    why: str
    images: int


class Store:
    """Descriptors of many images on disk, by the images' ids: indexed like a mapping, it reads one image at a time.

    Which images a shard has follows from the list of ids alone: shard n has those from n · per_shard on. So nothing has
    to be kept in step with the shards: what is missing is seen from the files, and a run goes on from there.

    Args:
        path: The folder, or an address that fsspec knows: ``s3://bucket/store``. Of what lies at an address only
            the parts that are asked for are fetched.

    Attributes:
        path: The folder or the address.
        settings: How the features were made.
        per_shard: Images in a shard.
        ids: Of all images.
        reduction: The principal components that the features were reduced to, or None.

    Raises:
        StoreError: If there is no store, or it cannot be read.
    """

    def __init__(self, path: Path | str) -> None:
        self.path: Any = place_of(path)
        about = _read_json(joined(self.path, ABOUT))
        if about.get("format") != FORMAT:
            raise StoreError(f"expected a store ({FORMAT}) at '{self.path}', got format {about.get('format')!r}")
        if not {"settings", "per_shard", "ids"} <= set(about):
            raise StoreError(f"expected '{joined(self.path, ABOUT)}' as it was written, but something is missing in it")
        self.settings: dict[str, Any] = about["settings"]
        self.per_shard: int = about["per_shard"]
        self.ids = _read_ids(joined(self.path, IDS))
        if digest_of(self.ids) != about["ids"]:
            raise StoreError(f"expected the list of images of '{self.path}' as it was written, but it was changed")
        self.reduction = read_reduction(self.path, self.settings.get("pca"))
        self._header = lru_cache(_KEPT)(self._read_header)

    @property
    def taps(self) -> list[str]:
        """What was read of each image."""
        return list(self.settings["taps"])

    @property
    def shards(self) -> int:
        """Number of shards of the whole store, those that are missing among them."""
        return -(-len(self.ids) // self.per_shard)

    def __len__(self) -> int:
        """Return the number of images it is made of: those that are broken or missing among them."""
        return len(self.ids)

    def __iter__(self) -> Iterator[str]:
        """Iterate over the ids, in order."""
        return iter(self.ids)

    def __contains__(self, name: object) -> bool:
        """Tell whether there is an image of that id."""
        return isinstance(name, str) and self._place(name) is not None

    def __getitem__(self, name: str) -> Descriptors:
        """Return the descriptors of an image, by tap.

        Raises:
            KeyError: If there is no such image.
            StoreError: If it was broken, or its shard is missing or damaged.
        """
        place = self._place(name)
        if place is None:
            raise KeyError(f"expected an image of the store, got {name!r}. {nearest_names(name, self.ids[:20])}")
        number = place // self.per_shard
        header: Header = self._header(number)
        if name in header.broken:
            raise StoreError(f"expected an image that could be read, but '{name}' could not: {header.broken[name]}")
        return read_image(self.shard_path(number), header.ids.index(name), header)

    def __repr__(self) -> str:
        """Say what it is in one line."""
        missing = len(self.missing())
        lacks = f", {missing} of {self.shards} shards missing" if missing else ""
        return f"Store({len(self)} images, {', '.join(self.taps)} of {self.settings['model']}{lacks})"

    def shard_path(self, number: int) -> Any:
        """Return the file of a shard: a path, or an address as text."""
        return joined(self.path, shard_name(number))

    def ids_of(self, number: int) -> list[str]:
        """Return the ids of the images of a shard."""
        return self.ids[number * self.per_shard : (number + 1) * self.per_shard]

    def missing(self) -> list[int]:
        """Return the numbers of the shards that are not there."""
        there = sizes_in(self.path)
        return [number for number in range(self.shards) if shard_name(number) not in there]

    def check_whole(self) -> None:
        """Refuse a store that lacks something.

        Raises:
            StoreError: If shards are missing.
        """
        missing = len(self.missing())
        if missing:
            raise StoreError(
                f"expected a whole store, but in '{self.path}' {missing} of {self.shards} shards are missing; run the "
                "extraction again with the same settings, which makes them"
            )

    def each(self) -> Iterator[tuple[str, Descriptors]]:
        """Iterate over all images that could be read, in order, a shard after the other.

        Raises:
            StoreError: If a shard is missing or damaged.
        """
        for number in range(self.shards):
            yield from read_images(self.shard_path(number), self._read_header(number))

    def rows(self, number: int, tap: str) -> Rows:
        """Return all tokens of one tap of a shard.

        Raises:
            ConfigError: If the store has no such tap.
            StoreError: If the shard is missing or damaged.
        """
        if tap not in self.taps:
            raise ConfigError(f"expected a tap of the store ({', '.join(self.taps)}), got {tap!r}")
        return read_rows(self.shard_path(number), tap, self._read_header(number))

    def broken(self, shards: Sequence[int] | None = None) -> dict[str, str]:
        """Return why images could not be read, by id; of the shards that are there, or of those of some numbers.

        Raises:
            StoreError: If a header cannot be read.
        """
        if shards is None:
            missing = set(self.missing())
            shards = [number for number in range(self.shards) if number not in missing]
        found: dict[str, str] = {}
        with ThreadPoolExecutor(_AT_ONCE) as pool:  # of storage far away each takes its time
            for start in range(0, len(shards), _MANY):
                for header in pool.map(self._read_header, shards[start : start + _MANY]):
                    found |= header.broken
        return found

    def check(self) -> Iterator[Damage]:
        """Read every shard, and yield those that are missing, cut off or changed, or not of this store.

        Raises:
            StoreError: If the disk or the storage that they lie on cannot be read now, which tells nothing of them.
        """
        missing = set(self.missing())
        tables = sizes_in(joined(self.path, POOLED)) if self.settings.get(POOLED) else None
        for number in range(self.shards):
            names = self.ids_of(number)
            why = _MISSING if number in missing else self._why(number)
            if why is None and tables is not None and pooled_name(number) not in tables and self._header(number).ids:
                why = "its table of pooled vectors is missing"
            if why is not None:
                yield Damage(number, why, len(names))

    def remove_damaged(self) -> list[Damage]:
        """Remove shards that are damaged, so that a run on the same folder makes them again; return what was found.

        Raises:
            StoreError: As :meth:`check` does; nothing was removed then. Or if one cannot be removed, or a run is at
                work in the folder.
        """
        with locked(self.path):
            found = list(self.check())
            for damage in found:
                if damage.why != _MISSING:
                    remove(self.shard_path(damage.shard))
        self._header.cache_clear()
        return found

    def remove_shards_of(self, ids: Iterable[str]) -> None:
        """Remove the shards that have these images, so that a run makes them again.

        Raises:
            KeyError: If there is no such image.
            StoreError: If one cannot be removed.
        """
        places = [self._place(name) for name in ids]
        if None in places:
            raise KeyError("expected images of the store, got others")
        for number in sorted({place // self.per_shard for place in places if place is not None}):
            remove(self.shard_path(number))
        self._header.cache_clear()

    def __reduce__(self) -> tuple[Any, ...]:
        """Open it anew where it is unpickled."""
        return Store, (self.path,)

    def reduce(self, d: Descriptor) -> Descriptor:
        """Return a descriptor as this store would have it: reduced to its principal components, if it has such.

        Raises:
            ConfigError: If the store has no such tap.
            ShapeError: If the descriptor has other channels than the store was made from.
        """
        return d if self.reduction is None else self.reduction(d)

    def _read_header(self, number: int) -> Header:
        path = self.shard_path(number)
        header = read_header(path)
        if header.settings != self.settings:
            raise StoreError(f"expected a shard of this store, but '{path}' was made with other settings")
        if sorted([*header.ids, *header.broken]) != sorted(self.ids_of(number)):
            raise StoreError(f"expected a shard of this store, but '{path}' has other images than the store's list")
        return header

    def _why(self, number: int) -> str | None:
        try:
            self._read_header(number)
        except UnreachableError:
            raise
        except StoreError as error:
            return str(error)
        return check_shard(self.shard_path(number))

    def _place(self, name: str) -> int | None:
        if not hasattr(self, "_places"):
            self._places = {known: number for number, known in enumerate(self.ids)}
        return self._places.get(name)


def create_store(
    path: Path | str,
    ids: Sequence[str],
    settings: Mapping[str, Any],
    per_shard: int,
    *,
    reduction: Reduction | None = None,
) -> Store:
    """Make a store without shards, or open the one that is there if it is of the same images and settings.

    Args:
        path: The folder, made if missing.
        ids: Of the images, no two of them the same.
        settings: How features are made: plain values, ``model`` and ``taps`` among them.
        per_shard: Images in a shard, at least 1.
        reduction: What the features are reduced by; the settings have its ``facts`` as ``pca``.

    Raises:
        ConfigError: If ids are not different, or there is a store of other images or settings.
        StoreError: If it cannot be written.
    """
    if per_shard < 1:
        raise ConfigError(f"expected per_shard of at least 1, got {per_shard}")
    if len(set(ids)) < len(ids):
        raise ConfigError("expected images of different ids, got some twice")
    folder = place_of(path)
    about = {"format": FORMAT, "settings": dict(settings), "per_shard": per_shard, "ids": digest_of(ids)}
    make_folder(folder)
    there = sizes_in(folder)
    if ABOUT in there:
        _check_same(folder, _read_json(joined(folder, ABOUT)), json.loads(json.dumps(about)), ids)
        return Store(folder)
    if any(name.startswith("part-") for name in there):
        raise StoreError(f"expected an empty folder for a new store, but '{folder}' has shards and no {ABOUT}")
    if reduction is not None:
        write_bytes(joined(folder, PCA_FILE), reduction.to_bytes())
    write_bytes(joined(folder, IDS), "".join(f"{json.dumps(name)}\n" for name in ids).encode())
    write_bytes(joined(folder, ABOUT), (json.dumps(about, indent=1) + "\n").encode())  # last: with it there is a store
    return Store(folder)


@contextmanager
def locked(folder: Path | str) -> Iterator[None]:
    """Keep other runs out of a folder, made if missing; a crash leaves no lock behind, for it belongs to the process.

    Object storage has no locks, and nothing is locked there: two runs at once make the same shards twice.

    Raises:
        StoreError: If another run is at work there.
    """
    folder = place_of(folder)
    if isinstance(folder, str):
        yield
        return
    if fcntl is None:
        raise StoreError("expected a system with file locks, Linux or macOS, to write a store; use an address instead")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / LOCK).open("a")
    except OSError as error:
        raise StoreError(f"expected to write into '{folder}', but: {error}") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise StoreError(
                f"expected to be alone in '{folder}', but another run is at work there; wait for it, or use another "
                "folder"
            ) from error
        except OSError as error:
            raise StoreError(f"expected a file system that can lock '{folder / LOCK}', but: {error}") from error
        for left in folder.glob("**/.*.tmp"):  # of a run that was killed while it wrote
            with suppress(FileNotFoundError, IsADirectoryError, PermissionError):  # what is none of ours stays
                left.unlink()
        yield


def shard_name(number: int) -> str:
    """Return what the file of a shard is called."""
    return f"part-{number:07}.safetensors"


def pooled_name(number: int) -> str:
    """Return what the table of a shard's pooled vectors is called."""
    return f"part-{number:07}.parquet"


def digest_of(ids: Sequence[str]) -> str:
    """Return a digest of a list of ids."""
    found = blake2b(digest_size=16)
    for name in ids:
        found.update(f"{json.dumps(name)}\n".encode())
    return found.hexdigest()


def _check_same(folder: Place, there: Mapping[str, Any], wanted: Mapping[str, Any], ids: Sequence[str]) -> None:
    if there.get("format") != FORMAT:
        raise StoreError(f"expected a store ({FORMAT}) at '{folder}', got format {there.get('format')!r}")
    told = []
    if there.get("per_shard") != wanted["per_shard"]:
        told.append(f"per_shard: {there.get('per_shard')!r} there, {wanted['per_shard']!r} here")
    if there.get("ids") != wanted["ids"]:
        told.append(f"ids: {_difference(_read_ids(joined(folder, IDS)), ids)}")
    old, new = there.get("settings", {}), wanted["settings"]
    told += [
        f"{name}: {old.get(name)!r} there, {new.get(name)!r} here"
        for name in {**old, **new}
        if old.get(name) != new.get(name)
    ]
    if told:
        raise ConfigError(
            f"expected images and settings of the store in '{folder}', but these differ: {'; '.join(told)}. "
            "Use another folder"
        )


def _difference(there: Sequence[str], here: Sequence[str]) -> str:
    """Tell how two lists of ids differ."""
    gone, new = sorted(set(there) - set(here)), sorted(set(here) - set(there))
    shown = [f"{len(names)} {what} ('{names[0]}')" for what, names in (("are gone", gone), ("are new", new)) if names]
    return f"{len(there)} there, {len(here)} here; {', '.join(shown) or 'their order differs'}"


def _read_json(path: Place) -> dict[str, Any]:
    folder, _, name = str(path).rpartition("/")
    try:
        found = json.loads(read_bytes(path))
    except FileNotFoundError as error:
        raise StoreError(f"expected a store at '{folder}', but there is none") from error
    except (OSError, ValueError) as error:
        raise StoreError(f"expected a store at '{folder}', but '{name}' cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise StoreError(f"expected a store at '{folder}', but '{name}' is of another kind")
    return found


def _read_ids(path: Place) -> list[str]:
    try:
        return [json.loads(line) for line in read_bytes(path).splitlines()]
    except (OSError, ValueError) as error:
        raise StoreError(f"expected the list of images of a store at '{path}', but: {error}") from error
