"""Many pictures to learn from: a folder or a tar file, read once, in the order of their names."""

import io
import tarfile
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vitfeats.errors import ConfigError, ImageError, StoreError
from vitfeats.preprocess import load_image, to_pil

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
    wanted, unwanted = set(only), set(without)
    found: dict[str, np.ndarray] = {}
    for name, item in _items(Path(source)):
        bare = name.rpartition(".")[0]
        if bare in unwanted or (wanted and bare not in wanted):
            continue
        try:
            picture = to_pil(load_image(item()))
        except ImageError as error:
            if broken is None:
                raise ImageError(f"'{name}' of '{source}': {error}") from error
            broken[name] = str(error)
            continue
        scale = side / min(picture.size)
        size = tuple(max(side, round(length * scale)) for length in picture.size)
        found[bare] = np.asarray(picture.resize(size, Image.Resampling.BICUBIC))  # type: ignore[arg-type] - a pair
    if not found:
        raise ConfigError(
            f"expected pictures ({', '.join(SUFFIXES)}) in '{source}', got none"
            + (" of the names that were asked for" if wanted or unwanted else "")
        )
    return dict(sorted(found.items()))


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


def _items(source: Path) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Yield names, and what gives the picture to read."""
    if source.is_dir():
        for path in sorted(source.rglob("*")):
            if path.suffix.lower() in SUFFIXES and path.is_file():
                yield path.relative_to(source).as_posix(), partial(Path, path)
        return
    try:
        with tarfile.open(source) as archive:
            for member in archive:
                content = archive.extractfile(member) if member.name.lower().endswith(SUFFIXES) else None
                if content is not None:
                    yield member.name.removeprefix("./"), partial(_opened, member.name, content.read())
    except (OSError, tarfile.TarError) as error:
        raise StoreError(f"expected a folder or a tar file of pictures at '{source}', but: {error}") from error


def _opened(name: str, data: bytes) -> Image.Image:
    try:
        return Image.open(io.BytesIO(data))
    except OSError as error:
        raise ImageError(f"expected a picture at '{name}', but: {error}") from error
