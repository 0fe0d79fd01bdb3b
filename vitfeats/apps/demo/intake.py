"""Pictures that strangers upload: what is taken, what is refused with a sentence, and where files may lie."""

import hashlib
import os
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import mkdtemp

import numpy as np
from jaxtyping import UInt8
from PIL import Image, UnidentifiedImageError

from vitfeats.errors import ImageError
from vitfeats.preprocess import check_whole_tiff, load_image, to_pil

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
"""Readers of Pillow that strangers' files are given to; no other one runs."""

WORKING = 1024
"""Longest side in pixels that pictures are brought to: more than any model here sees."""

SHOWN = 640
"""Longer side in pixels of what is drawn over a picture."""

SMALLEST = 16

_TOLD = "JPEG, PNG, WebP, BMP, GIF or TIFF"
_MARKUP = {b"<svg": "an SVG drawing", b"<!doctype html": "a web page", b"<html": "a web page", b"<?xml": "XML"}


@dataclass(frozen=True, eq=False)
class Picture:
    """A picture that was taken in.

    Attributes:
        image: RGB, upright, its longest side at most :data:`WORKING`.
        scale: Pixels of ``image`` for one pixel of the picture as it was given, (across, down).
    """

    image: Image.Image
    scale: tuple[float, float]

    @cached_property
    def key(self) -> str:
        """What tells it from every other picture."""
        return hashlib.sha256(f"{self.image.size}".encode() + self.image.tobytes()).hexdigest()

    @cached_property
    def shown(self) -> Image.Image:
        """The picture as it is drawn over: its longer side is :data:`SHOWN`, also where it is small."""
        scale = SHOWN / max(self.image.size)
        size = (max(1, round(scale * self.image.width)), max(1, round(scale * self.image.height)))
        return self.image.resize(size, Image.Resampling.LANCZOS)

    @cached_property
    def grey(self) -> UInt8[np.ndarray, "height width"]:
        """The grey values of :attr:`shown`."""
        return np.asarray(self.shown.convert("L"))

    def inside(self, x: float, y: float) -> tuple[float, float]:
        """Return a point (x, y) of the picture as it was given in pixels of ``image``, at most at its edge."""
        width, height = self.image.size
        return min(max(x * self.scale[0], 0.0), float(width)), min(max(y * self.scale[1], 0.0), float(height))

    def drawn_at(self, x: float, y: float) -> tuple[float, float]:
        """Return a point (x, y) of ``image`` in pixels of :attr:`shown`."""
        across, down = self.shown.width / self.image.width, self.shown.height / self.image.height
        return round(x * across, 6), round(y * down, 6)  # so that what is nearly half a pixel rounds one way

    def outside(self, x: float, y: float) -> tuple[float, float]:
        """Return a point (x, y) of ``image`` in pixels of the picture as it was given."""
        return x / self.scale[0], y / self.scale[1]


def take_in(path: Path | str, folder: Path, *, pixels: float) -> Picture:
    """Read an uploaded picture, with little memory however large it says it is.

    Args:
        path: The file.
        folder: Where uploads lie; nothing else is read.
        pixels: Most pixels of a picture; a quarter where each has more than 8 bits.

    Raises:
        ImageError: If the file lies elsewhere, is gone, is no picture, or is too large.
    """
    file = Path(path)
    name = _short(file.name)
    gone = f"expected {name} to be here still, but uploads are deleted after a while; choose it again"
    if not _lies_in(file, folder):
        raise ImageError("expected a picture that was uploaded here, got the path of another file")
    if not file.is_file():
        raise ImageError(gone)
    try:
        with Image.open(file, formats=FORMATS) as picture:
            return _taken(picture, name, pixels)
    except UnidentifiedImageError as error:
        raise ImageError(f"expected a picture ({_TOLD}), but {name} is {_what_it_is(file)}") from error
    except FileNotFoundError as error:
        raise ImageError(gone) from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(
            f"expected a picture of at most {_told(pixels)} pixels, but {name} claims far more; shrink it"
        ) from error
    except ImageError:
        raise
    except Exception as error:  # each of Pillow's decoders has its own way to fail
        raise ImageError(f"expected a whole picture, but {name} breaks off or is damaged: {error}") from error


def _lies_in(file: Path, folder: Path) -> bool:
    try:
        file.exists()  # unlike resolve, it minds a name that is too long
        return file.resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError, ValueError):  # a name that no file can have, or a loop of links
        return False


def _taken(picture: Image.Image, name: str, pixels: float) -> Picture:
    width, height = picture.size
    deep = picture.mode.startswith(("I", "F"))
    most = pixels / 4 if deep else pixels
    if width * height > most:
        bits = " of 16 bits" if deep else ""
        raise ImageError(
            f"expected a picture{bits} of at most {_told(most)} pixels, but {name} has {width}×{height}; shrink it"
        )
    small = picture if deep else _opened_small(picture)
    try:
        image = reduced(to_pil(load_image(small)), WORKING)
    except ImageError as error:
        raise ImageError(f"{error}".replace("the PIL image", name)) from error
    if min(image.size) < SMALLEST:
        raise ImageError(
            f"expected a picture of at least {SMALLEST} pixels a side once its longer side has {WORKING}, but {name} "
            f"has {width}×{height}; cut out a part"
        )
    turned = picture.getexif().get(0x0112, 1) in (5, 6, 7, 8)  # orientation: lying on its side
    given = (height, width) if turned else (width, height)
    return Picture(image, (image.width / given[0], image.height / given[1]))


def _opened_small(picture: Image.Image) -> Image.Image:
    """Return a picture of 8 bits at up to four times the size that is worked with, so that floats of it fit."""
    picture.draft(None, (2 * WORKING, 2 * WORKING))  # a JPEG is decoded at a smaller size
    times = max(picture.size) // (2 * WORKING)
    if times < 2:
        return picture
    check_whole_tiff(picture)
    picture.load()
    small = (picture.convert("RGB") if picture.mode in ("1", "P", "PA") else picture).reduce(times)
    # What tells which way up it is, and how its ink is written; the size has changed, and nothing else.
    small.format, small.info = picture.format, dict(picture.info)
    return small


def reduced(image: Image.Image, longest: int) -> Image.Image:
    """Return an image whose longer side is at most ``longest`` pixels."""
    scale = longest / max(image.size)
    if scale >= 1:
        return image
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Image.Resampling.LANCZOS, reducing_gap=3.0)


def _what_it_is(file: Path) -> str:
    try:
        with file.open("rb") as opened:
            head = opened.read(512).lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    except OSError:
        return "gone"
    if not head:
        return "empty"
    found = [what for mark, what in _MARKUP.items() if mark in head]
    return found[0] if found else "none of these"


def _short(name: str) -> str:
    return f"'{name if len(name) <= 60 else f'{name[:40]}…{name[-16:]}'}'"


def _told(pixels: float) -> str:
    return f"{pixels / 1e6:,.0f} million" if pixels >= 1e6 else f"{pixels:,.0f}"


class Folder:
    """The temporary folder of a demo: all that is uploaded and made, in bounds.

    Args:
        path: An existing folder.
        most_bytes: What it may hold; the oldest files are deleted first.
        seconds: How long files are kept.
    """

    def __init__(self, path: Path, *, most_bytes: float, seconds: float) -> None:
        self.path = path.resolve()
        self.most_bytes = most_bytes
        self.seconds = seconds
        self.kept = self.path / "samples"
        self.kept.mkdir(exist_ok=True)
        self._ended = threading.Event()

    def sweep(self) -> int:
        """Delete what is too old, and the oldest of what is too much; samples stay. Return the bytes that are left."""
        files = []
        for folder, _, names in os.walk(self.path):  # which minds no folder that vanishes meanwhile
            if Path(folder).is_relative_to(self.kept):
                continue
            for file in (Path(folder, name) for name in names):
                with suppress(OSError):  # gone meanwhile
                    found = file.lstat()
                    files.append((max(found.st_mtime, found.st_ctime), found.st_size, file))
        left = sum(size for _, size, _ in files)
        oldest = time.time() - self.seconds
        for when, size, file in sorted(files, key=lambda entry: entry[0]):
            if when >= oldest and left <= self.most_bytes:
                break
            with suppress(OSError):  # tried again at the next sweep
                file.unlink(missing_ok=True)
                left -= size
        return left

    @contextmanager
    def swept(self, every: float = 20.0) -> Iterator[None]:
        """Sweep again and again meanwhile, in a thread of its own."""

        def sweep() -> None:
            while not self._ended.wait(every):
                self.sweep()

        thread = threading.Thread(target=sweep, name="vitfeats-demo-sweep", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._ended.set()
            thread.join(timeout=5)


@contextmanager
def own_folder(*, most_bytes: float, seconds: float) -> Iterator[Folder]:
    """Make a temporary folder, and delete it with all that is in it at the end."""
    path = Path(mkdtemp(prefix="vitfeats-demo-"))
    try:
        folder = Folder(path, most_bytes=most_bytes, seconds=seconds)
        with folder.swept():
            yield folder
    finally:
        shutil.rmtree(path, ignore_errors=True)
