"""What readers of annotated pairs share: files with clear errors, the sizes of images, and the checks of a record."""

import csv
import hashlib
import io
import json
import math
import os
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from reprlib import repr as shortened
from typing import Any

import torch
from jaxtyping import Float
from PIL import ExifTags, Image
from torch import Tensor

from vitfeats.apps.evaluation.datasets import Box, Pair
from vitfeats.errors import ConfigError, ImageError, ShapeError, StoreError
from vitfeats.grid import Size

XY = tuple[float, float]
"""(x, y) in pixels of an image."""

_LYING = (5, 6, 7, 8)  # EXIF orientations that swap height and width


class PairReader(Sequence[Pair]):
    """A sequence of annotated pairs, each read when it is asked for. Of the images, only sizes are read.

    Attributes:
        name: What it is, for tables: the dataset and its split.
    """

    name: str

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of pairs."""

    @abstractmethod
    def _read(self, index: int) -> Pair:
        """Return pair ``index``, counted from 0, which is below the number of pairs."""

    def __getitem__(self, index: int) -> Pair:  # type: ignore[override] - no slices: they would read every pair
        """Return pair ``index``; negative ones count from the end.

        Raises:
            StoreError: If a file of the pair cannot be read, is not what it should be, or an image is not there.
            ShapeError: If the points or boxes of the pair do not do.
            ImageError: If the size of an image cannot be read.
        """
        if not -len(self) <= index < len(self):
            raise IndexError(f"expected an index below {len(self)}, got {index}")
        return self._read(index % len(self))

    def __iter__(self) -> Iterator[Pair]:
        """Iterate over the pairs."""
        return (self[index] for index in range(len(self)))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name}, {len(self)} pairs)"


def read_text(path: Path, what: str) -> str:
    """Return a text file in UTF-8, with or without a mark at its start.

    Args:
        path: The file.
        what: What it should be, for the message.

    Raises:
        StoreError: If it cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:  # ValueError: no text, or a zero byte in the name
        raise StoreError(f"expected {what} at '{path}', but: {error}") from error


def read_json(path: Path, what: str) -> Any:
    """Return what a JSON file holds.

    Args:
        path: The file.
        what: What it should be, for the message.

    Raises:
        StoreError: If it cannot be read.
    """
    text = read_text(path, what)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # RecursionError: lists nested a thousand deep
        raise StoreError(f"expected {what} at '{path}', but: {error}") from error


def read_lines(path: Path, what: str, columns: int) -> list[tuple[str, list[str]]]:
    """Return the lines of a text file, each with what to call it in messages and its columns.

    Args:
        path: The file; blank lines are left out.
        what: What it should be, for the message.
        columns: Columns of each line, with blanks between; the last one may have blanks in it.

    Raises:
        StoreError: If it cannot be read, is empty, or a line has too few columns.
    """
    lines = []
    for number, line in enumerate(read_text(path, what).split("\n"), 1):
        found = line.strip().split(maxsplit=columns - 1)
        if not found:
            continue
        which = f"line {number} of '{path}'"
        if len(found) != columns:
            raise StoreError(f"expected {what} of {columns} columns in {which}, got {shortened(line)}")
        lines.append((which, found))
    if not lines:
        raise StoreError(f"expected {what} in '{path}', got an empty file")
    return lines


def read_table(path: Path, what: str, columns: Sequence[str]) -> list[tuple[str, dict[str, str]]]:
    """Return the rows of a CSV file, each with what to call it in messages and its fields by the names in the header.

    Args:
        path: The file; blank rows are left out.
        what: What it should be, for the message.
        columns: Names that the header must have, in any order, among others.

    Raises:
        StoreError: If it cannot be read, has no rows, lacks a column, or a row is longer or shorter than the header.
    """
    lines = csv.reader(io.StringIO(read_text(path, what), newline=""))
    rows: list[tuple[str, dict[str, str]]] = []
    header: list[str] = []
    try:
        for line in lines:
            fields = [field.strip() for field in line]
            if not any(fields):
                continue
            if not header:
                header = fields
                continue
            which = f"line {lines.line_num} of '{path}'"
            if len(fields) != len(header):
                raise StoreError(f"expected {len(header)} fields, as in the header, in {which}, got {len(fields)}")
            rows.append((which, dict(zip(header, fields, strict=True))))
    except csv.Error as error:
        raise StoreError(f"expected {what} in CSV at '{path}', but line {lines.line_num}: {error}") from error
    missing = [column for column in columns if column not in header]
    twice = [column for column in header if header.count(column) > 1]
    if missing or twice:
        got = f"{shortened(missing[0])} is missing" if missing else f"{shortened(twice[0])} is there twice"
        raise StoreError(f"expected a header with {', '.join(columns)} in '{path}', but {got}")
    if not rows:
        raise StoreError(f"expected {what} in '{path}', got none below the header")
    return rows


def existing(what: str, paths: Sequence[Path], which: str, hint: str) -> Path:
    """Return the first of some paths at which there is a file.

    Args:
        what: What it should be: "an image".
        paths: Where it may be.
        which: The record that names it, for the message.
        hint: What to try where there is none.

    Raises:
        StoreError: If there is no file at any of them.
    """
    for path in paths:
        if os.path.isfile(path):  # unlike Path.is_file, False for names that no file can have
            return path
    places = " or ".join(repr(str(path)) for path in paths)  # repr: a name may be no printable text
    raise StoreError(f"expected {what} at {places}, for {which}, but there is none; {hint}")


def size_of(path: Path | str) -> Size:
    """Return the (height, width) of an image file as it is loaded, that is after its EXIF rotation.

    Only the header is read: a rotation that a PNG notes behind its pixels is not seen. Sizes are remembered as long as
    the file does not change.

    Raises:
        ImageError: If it cannot be read; the message names it.
    """
    try:
        found = os.stat(path)
        return _size_of(os.fspath(path), found.st_mtime_ns, found.st_size)
    except Exception as error:  # each of Pillow's readers has its own way to fail
        raise ImageError(f"expected an image at {str(path)!r}, but its size cannot be read: {error}") from error


@lru_cache(maxsize=4096)
def _size_of(path: str, changed: int, length: int) -> Size:
    with Image.open(path) as picture:
        width, height = picture.size
        # The base class's, since that of a PNG decodes the pixels first. Of a TIFF, Pillow gives the turned size.
        orientation = Image.Image.getexif(picture).get(ExifTags.Base.Orientation)
        return (width, height) if orientation in _LYING and picture.format != "TIFF" else (height, width)


def split_of(split: str, known: Mapping[str, str]) -> str:
    """Return the dataset's own name of a split.

    Args:
        split: As the user says it.
        known: The dataset's names, by those that a user may say.

    Raises:
        ConfigError: If there is no such split; the message lists them.
    """
    if split not in known:
        raise ConfigError(f"expected split to be {' or '.join(map(repr, known))}, got {split!r}")
    return known[split]


def require(record: Any, keys: Sequence[str], which: str) -> dict[str, Any]:
    """Return a record of JSON if it is an object that has these keys.

    Raises:
        StoreError: If not.
    """
    if not isinstance(record, dict):
        raise StoreError(f"expected an object with {', '.join(keys)} as {which}, got {type(record).__name__}")
    missing = [key for key in keys if key not in record]
    if missing:
        raise StoreError(f"expected {', '.join(keys)} in {which}, but {', '.join(missing)} is missing")
    return record


def as_text(value: Any, what: str, which: str) -> str:
    """Return a value of JSON that should be text.

    Raises:
        StoreError: If it is none.
    """
    if not isinstance(value, str):
        raise StoreError(f"expected {what} to be text in {which}, got {shortened(value)}")
    return value


def as_numbers(values: Any, count: int, what: str, which: str) -> tuple[float, ...]:
    """Return finite numbers, from a list of JSON or from texts.

    Args:
        values: A list of numbers or of numbers in text.
        count: How many there should be.
        what: What they are, for the message.
        which: The record, for the message.

    Raises:
        ShapeError: If they are not ``count`` finite numbers.
    """
    found: tuple[float, ...] = ()
    if isinstance(values, list | tuple) and not any(isinstance(value, bool) for value in values):
        try:
            found = tuple(float(value) for value in values)
        except (TypeError, ValueError, OverflowError):  # OverflowError: an integer of hundreds of digits
            found = ()
    if len(found) != count or not all(map(math.isfinite, found)):
        raise ShapeError(f"{which}: expected {what} as {count} finite numbers, got {shortened(values)}")
    return found


def as_box(values: Any, what: str, which: str) -> Box:
    """Return four numbers as a box (x0, y0, x1, y1); whether they are in order is asked by :func:`make_pair`.

    Raises:
        ShapeError: If they are not four finite numbers.
    """
    left, top, right, bottom = as_numbers(values, 4, what, which)
    return left, top, right, bottom


def as_sized_box(values: Any, what: str, which: str) -> Box:
    """Return (x, y, width, height) as a box (x0, y0, x1, y1).

    Raises:
        ShapeError: If they are not four finite numbers.
    """
    left, top, width, height = as_numbers(values, 4, what, which)
    return left, top, left + width, top + height


def as_point_list(values: Any, what: str, which: str) -> list[XY]:
    """Return a list of [x, y] as points.

    Raises:
        ShapeError: If it is not a list of two finite numbers each.
    """
    if not isinstance(values, list):
        raise ShapeError(f"{which}: expected {what} as a list of points [x, y], got {shortened(values)}")
    points = [as_numbers(value, 2, f"point {number} of {what}", which) for number, value in enumerate(values)]
    return [(x, y) for x, y in points]


def digest_of(records: Any) -> str:
    """Return a digest of plain values."""
    return hashlib.sha1(repr(records).encode(errors="replace")).hexdigest()[:16]


def box_around(points: Sequence[XY]) -> Box:
    """Return the smallest box around points, of which there is at least one."""
    left, top = (min(values) for values in zip(*points, strict=True))
    right, bottom = (max(values) for values in zip(*points, strict=True))
    return left, top, right, bottom


def make_pair(
    which: str,
    images: tuple[Path, Path],
    points: tuple[Sequence[XY], Sequence[XY]],
    *,
    name: str | None = None,
    category: str = "",
    boxes: tuple[Box | None, Box | None] = (None, None),
    visible: Sequence[bool] | None = None,
    indices: bool = True,
) -> Pair:
    """Return a pair whose points lie inside its images.

    Several datasets count pixels from 1, so that a point may be one pixel beyond the right or the bottom edge: it is
    moved onto the edge. Boxes are kept as annotated, even where they leave the image.

    Args:
        which: The file and the record, for messages.
        images: Files that exist.
        points: Points of image a, and as many of image b.
        name: What to call the pair; None takes the names of its images.
        category: What the images show.
        boxes: The object in image a, and in image b.
        visible: A boolean for each point.
        indices: Whether points are indices of pixels, as in the published data sets, whose scripts read features at
            them: the middle of pixel 0 is at 0.5.

    Raises:
        ShapeError: If the numbers of points differ, there is none, one lies outside its image, or a box is not from
            left to right and top to bottom.
        ImageError: If the size of an image cannot be read.
    """
    try:
        inside_a, inside_b = (
            _inside(own, image, 0.5 if indices else 0.0) for own, image in zip(points, images, strict=True)
        )
        named = f"{images[0].name}, {images[1].name}" if name is None else name
        box_a, box_b = boxes
        return Pair(*(*images, inside_a, inside_b, named), category=category, box_a=box_a, box_b=box_b, visible=visible)
    except (ShapeError, ImageError) as error:
        raise type(error)(f"{which}: {error}") from error


def _inside(points: Sequence[XY], image: Path, shift: float) -> Float[Tensor, "n 2"]:
    """Return points, shifted; those up to a pixel beyond the right or the bottom edge are moved onto it."""
    height, width = size_of(image)
    for x, y in points:
        if not (0 <= x <= width + 1 and 0 <= y <= height + 1):
            raise ShapeError(
                f"expected points (x, y) inside {image.name!r} of {width}×{height} pixels, got ({x:g}, {y:g}); "
                "are x and y the wrong way round?"
            )
    return torch.tensor([(min(x + shift, width), min(y + shift, height)) for x, y in points]).reshape(-1, 2)
