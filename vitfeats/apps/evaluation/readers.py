"""Annotated pairs of images, read from datasets in their official layouts and from one's own lists."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from vitfeats.apps.evaluation.annotations import (
    XY,
    PairReader,
    as_box,
    as_numbers,
    as_point_list,
    as_text,
    box_around,
    digest_of,
    existing,
    make_pair,
    read_json,
    read_lines,
    read_table,
    require,
    split_of,
)
from vitfeats.apps.evaluation.datasets import Box, Pair
from vitfeats.apps.evaluation.matlab import read_matrices
from vitfeats.errors import ConfigError, ShapeError, StoreError, nearest_names

_SPLITS = {"train": "trn", "trn": "trn", "val": "val", "test": "test"}
_ROOT = "is root= the dataset's folder?"
_IMAGES = "is images= its folder?"
_COORDINATES = ("xa", "ya", "xb", "yb")
# The order of PASCAL VOC; the pair lists of PF-PASCAL count from 1.
_VOC = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog"),
    *("horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)


class SPair71k(PairReader):
    """SPair-71k (Min et al., 2019): pairs of 18 categories with the points that are visible in both images.

    Layout: ``Layout/large/{trn,val,test}.txt`` lists names ``ID-SOURCE-TARGET:CATEGORY``; each is a file
    ``PairAnnotation/{trn,val,test}/NAME.json`` with ``src_imname``, ``trg_imname``, ``src_kps``, ``trg_kps`` and the
    boxes ``src_bndbox``, ``trg_bndbox``, (x0, y0, x1, y1); images are ``JPEGImages/CATEGORY/IMNAME``. Copies that
    replaced the colon in the names, which some file systems do not allow, are not read.

    Attributes:
        name: "SPair-71k test". The name of a pair is its line in the list.
    """

    def __init__(self, root: Path | str, split: str = "test", category: str | None = None) -> None:
        """Read the list; the annotation of a pair is read when the pair is asked for.

        Args:
            root: Folder of the dataset.
            split: "train" (or "trn"), "val" or "test".
            category: One category alone; None is all.

        Raises:
            ConfigError: If there is no such split, or the list has no pair of the category.
            StoreError: If the list cannot be read.
        """
        self._root, self._split = Path(root), split_of(split, _SPLITS)
        self.name = " ".join(["SPair-71k", self._split, *([] if category is None else [category])])
        path = self._root / "Layout" / "large" / f"{self._split}.txt"
        listed = read_lines(path, "a list of pairs", 1)
        for which, (name,) in listed:
            if not all(name.rpartition(":")):
                raise StoreError(f"expected a name ID-SOURCE-TARGET:CATEGORY in {which}, got {name!r}")
        self._lines = [(which, name) for which, (name,) in listed if category in (None, _category(name))]
        if category is not None and not self._lines:
            known = sorted({_category(name) for _, (name,) in listed})
            raise ConfigError(f"expected a category of '{path}', got {category!r}. {nearest_names(category, known)}")

    def __len__(self) -> int:
        """Return the number of pairs."""
        return len(self._lines)

    def _read(self, index: int) -> Pair:
        line, name = self._lines[index]
        path = self._root / "PairAnnotation" / self._split / f"{name}.json"
        which = f"'{path}', for {line}"
        keys = ("src_imname", "trg_imname", "src_kps", "trg_kps", "src_bndbox", "trg_bndbox")
        record = require(read_json(path, f"the annotation of {line} in JSON"), keys, which)
        folder = self._root / "JPEGImages" / _category(name)
        image_a, image_b = (
            existing("an image", [folder / as_text(record[key], key, which)], which, _ROOT) for key in keys[:2]
        )
        points_a, points_b = (as_point_list(record[key], key, which) for key in keys[2:4])
        box_a, box_b = (as_box(record[key], key, which) for key in keys[4:])
        return make_pair(
            *(which, (image_a, image_b), (points_a, points_b)),
            name=name,
            category=_category(name),
            boxes=(box_a, box_b),
        )


class PFPascal(PairReader):
    """PF-PASCAL (Ham et al., 2017), with the pair lists of Rocco et al. and their followers.

    Layout: ``{trn,val,test}_pairs.csv``, in the root or in ``image_pairs/``, with the columns ``source_image``,
    ``target_image`` and ``class`` (1 to 20, the classes of PASCAL VOC in the order of the alphabet); the column
    ``flip`` of the training list is ignored: no pair is mirrored. An image is at its path below the root, or at
    ``JPEGImages/NAME``. Its points are in ``Annotations/CLASS/STEM.mat``: ``kps`` (n, 2), NaN where absent, and, in
    some copies, ``bbox`` (x0, y0, x1, y1); where there is none, the box is the one around the image's points. Lists
    of the same name that hold the points themselves are not read.

    A pair has the points that are present in both images. Pairs that share none are left out.

    Attributes:
        name: "PF-PASCAL test".
    """

    def __init__(self, root: Path | str, split: str = "test") -> None:
        """Read the list, and the points of every image in it.

        Args:
            root: Folder of the dataset.
            split: "train" (or "trn"), "val" or "test".

        Raises:
            ConfigError: If there is no such split.
            StoreError: If the list or the points of an image cannot be read, or no pair has a point in common.
            ShapeError: If a box is not four numbers, or the images of a pair have different numbers of points.
        """
        self._root, split = Path(root), split_of(split, _SPLITS)
        self.name = f"PF-PASCAL {split}"
        places = [self._root / f"{split}_pairs.csv", self._root / "image_pairs" / f"{split}_pairs.csv"]
        path = existing("a list of pairs", places, self.name, _ROOT)
        marked: dict[Path, _Marked] = {}
        self._pairs: list[tuple[str, dict[str, str], _Marked, _Marked]] = []
        for which, row in read_table(path, "a list of pairs", ("source_image", "target_image", "class")):
            if row["class"] not in map(str, range(1, len(_VOC) + 1)):
                raise StoreError(f"expected a class from 1 to {len(_VOC)} in {which}, got {row['class']!r}")
            ends = []
            for image in (row["source_image"], row["target_image"]):
                mat = self._root / "Annotations" / _VOC[int(row["class"]) - 1] / f"{Path(image).stem}.mat"
                if mat not in marked:
                    marked[mat] = _read_mat(existing("points", [mat], which, _ROOT), which)
                ends.append(marked[mat])
            a, b = ends
            which = f"{which}, points of '{a.path}' and '{b.path}'"
            if len(a.points) != len(b.points):
                raise ShapeError(f"{which}: expected a point b for each a, got {len(a.points)} and {len(b.points)}")
            if _common(a, b):
                self._pairs.append((which, row, a, b))
        if not self._pairs:
            raise StoreError(f"expected points in both images of a pair, got none in any pair of '{path}'")

    def __len__(self) -> int:
        """Return the number of pairs with a point in common."""
        return len(self._pairs)

    def _read(self, index: int) -> Pair:
        which, row, a, b = self._pairs[index]
        named = [row[column] for column in ("source_image", "target_image")]
        places = [[self._root / name, self._root / "JPEGImages" / Path(name).name] for name in named]
        image_a, image_b = (existing("an image", where, which, _ROOT) for where in places)
        both = _common(a, b)
        return make_pair(
            *(which, (image_a, image_b), ([p for p, _ in both], [q for _, q in both])),
            category=_VOC[int(row["class"]) - 1],
            boxes=(a.box, b.box),
        )


class PFWillow(PairReader):
    """PF-WILLOW (Ham et al., 2016), with the pair list of its followers: 10 points a pair.

    Layout: ``test_pairs_pf.csv`` or ``test_pairs.csv`` with the columns ``imageA``, ``imageB``, and ``XA1`` to
    ``XA10``, ``YA1`` …, ``XB1`` …, ``YB1`` …, in any order. An image is at its path below the root, with or without
    the path's first folder. The category is the folder of image A, such as "car(G)". The dataset has no boxes: they
    are those around the points, as is usual.

    Attributes:
        name: "PF-WILLOW".
    """

    def __init__(self, root: Path | str) -> None:
        """Read the list.

        Args:
            root: Folder of the dataset.

        Raises:
            StoreError: If the list cannot be read.
        """
        self.name, self._root = "PF-WILLOW", Path(root)
        places = [self._root / name for name in ("test_pairs_pf.csv", "test_pairs.csv")]
        path = existing("a list of pairs", places, self.name, _ROOT)
        axes = [[f"{axis}{number}" for number in range(1, 11)] for axis in ("XA", "YA", "XB", "YB")]
        self._axes = axes
        self._rows = read_table(
            path, "a list of pairs", ["imageA", "imageB", *(name for axis in axes for name in axis)]
        )

    def __len__(self) -> int:
        """Return the number of pairs."""
        return len(self._rows)

    def _read(self, index: int) -> Pair:
        which, row = self._rows[index]
        named = [Path(row["imageA"]), Path(row["imageB"])]
        places = [[self._root / name, self._root.joinpath(*name.parts[1:])] for name in named]
        image_a, image_b = (existing("an image", where, which, _ROOT) for where in places)
        columns = [
            as_numbers([row[name] for name in axis], 10, f"{axis[0]} to {axis[-1]}", which) for axis in self._axes
        ]
        points_a, points_b = (list(zip(*columns[two : two + 2], strict=True)) for two in (0, 2))
        return make_pair(
            *(which, (image_a, image_b), (points_a, points_b)),
            category=named[0].parent.name,
            boxes=(box_around(points_a), box_around(points_b)),
        )


class PairList(PairReader):
    """Pairs in the JSON of Diffusion Hyperfeatures (Luo et al., 2023), and of one's own lists.

    An array of objects with ``source_path``, ``target_path``, ``source_points`` and ``target_points`` ((x, y), indices
    of pixels), and, where they are known, ``category`` and the boxes ``source_bounding_box`` and
    ``target_bounding_box``, (x0, y0, x1, y1). Other keys are left alone.

    Attributes:
        name: The file's name.
    """

    def __init__(self, path: Path | str, images: Path | str) -> None:
        """Read the list; each pair is checked when it is asked for.

        Args:
            path: The JSON file.
            images: Folder that the image paths begin at.

        Raises:
            StoreError: If the file cannot be read, or is not an array with at least one element.
        """
        self._path, self._images = Path(path), Path(images)
        self.name = self._path.name
        self._records = read_json(self._path, "a list of pairs in JSON")
        if not isinstance(self._records, list) or not self._records:
            got = "an empty one" if self._records == [] else type(self._records).__name__
            raise StoreError(f"expected a JSON array of pairs in '{path}', got {got}")
        self.fingerprint = digest_of(self._records)

    def __len__(self) -> int:
        """Return the number of pairs."""
        return len(self._records)

    def _read(self, index: int) -> Pair:
        which = f"pair {index} of '{self._path}'"
        keys = ("source_path", "target_path", "source_points", "target_points")
        record = require(self._records[index], keys, which)
        named = [as_text(record[key], key, which) for key in keys[:2]]
        image_a, image_b = (existing("an image", [self._images / name], which, _IMAGES) for name in named)
        points_a, points_b = (as_point_list(record[key], key, which) for key in keys[2:])
        category = record.get("category")
        box_a, box_b = (
            None if record.get(key) is None else as_box(record[key], key, which)
            for key in ("source_bounding_box", "target_bounding_box")
        )
        return make_pair(
            *(which, (image_a, image_b), (points_a, points_b)),
            category="" if category is None else as_text(category, "category", which),
            boxes=(box_a, box_b),
        )


class PairTable(PairReader):
    """Pairs of one's own in CSV, a row for each point, in pixels from the image's corner: pixel 0 reaches from 0 to 1.

    The header names the columns, in any order: ``image_a``, ``image_b``, ``xa``, ``ya``, ``xb`` and ``yb``, and, where
    they are known, ``category``, ``visible`` (1 or 0: whether the point can be seen in both images), ``box_a`` and
    ``box_b`` (four numbers with blanks between: "x0 y0 x1 y1"). Other columns are left alone. Rows of the same two
    images that follow each other are one pair; its category and boxes stand in its first row, and the rows below repeat
    them or leave them empty.

    Attributes:
        name: The file's name.
    """

    def __init__(self, path: Path | str, images: Path | str) -> None:
        """Read the table; each pair is checked when it is asked for.

        Args:
            path: The CSV file.
            images: Folder that the image paths begin at.

        Raises:
            StoreError: If the file cannot be read, lacks a column or has no rows.
        """
        path = Path(path)
        self.name, self._images = path.name, Path(images)
        rows = read_table(path, "a table of points", ("image_a", "image_b", *_COORDINATES))
        self._pairs = [list(same) for _, same in groupby(rows, lambda row: (row[1]["image_a"], row[1]["image_b"]))]
        self.fingerprint = digest_of(rows)

    def __len__(self) -> int:
        """Return the number of pairs."""
        return len(self._pairs)

    def _read(self, index: int) -> Pair:
        rows = self._pairs[index]
        which, first = rows[0]
        for below, row in rows:
            for column in ("category", "box_a", "box_b"):
                if row.get(column) and row[column] != first[column]:
                    raise StoreError(f"expected {column} as in {which}, or nothing, in {below}, got {row[column]!r}")
        named = (first["image_a"], first["image_b"])
        image_a, image_b = (existing("an image", [self._images / name], which, _IMAGES) for name in named)
        found = [as_numbers([row[name] for name in _COORDINATES], 4, "xa, ya, xb, yb", line) for line, row in rows]
        box_a, box_b = (
            as_box(first[column].split(), column, which) if first.get(column) else None for column in ("box_a", "box_b")
        )
        return make_pair(
            *(which, (image_a, image_b), ([(xa, ya) for xa, ya, _, _ in found], [(xb, yb) for _, _, xb, yb in found])),
            category=first.get("category", ""),
            boxes=(box_a, box_b),
            visible=[_as_flag(row["visible"], line) for line, row in rows] if "visible" in first else None,
            indices=False,
        )


def open_pairs(path: Path | str, images: Path | str) -> PairList | PairTable:
    """Open a list of pairs of one's own.

    Args:
        path: The list; with the suffix ``.json`` it is a :class:`PairList`, with ``.csv`` a :class:`PairTable`.
        images: Folder that the image paths begin at.

    Raises:
        ConfigError: If the suffix is another one.
        StoreError: If the list cannot be read.
    """
    kinds = {".json": PairList, ".csv": PairTable}
    suffix = Path(path).suffix.lower()
    if suffix not in kinds:
        raise ConfigError(f"expected a list of pairs with the suffix .json or .csv, got '{path}'")
    return kinds[suffix](path, images)


def read_pairs(path: Path | str, images: Path | str) -> list[Pair]:
    """Read every pair of a list in the format of Diffusion Hyperfeatures.

    Args:
        path: The list: a JSON array, as :class:`PairList` describes it.
        images: Folder that the image paths begin at.

    Returns:
        Pairs with the images' paths, source as a.

    Raises:
        StoreError: If the file cannot be read or is not such a list, or an image is not there; the message says which.
        ShapeError: If the points of a pair do not do.
        ImageError: If the size of an image cannot be read.
    """
    return list(PairList(path, images))


@dataclass(frozen=True)
class _Marked:
    """The points of an image of PF-PASCAL, None where absent, and its box."""

    path: Path
    points: Sequence[XY | None]
    box: Box | None


def _category(name: str) -> str:
    return name.rpartition(":")[2]


def _common(a: _Marked, b: _Marked) -> list[tuple[XY, XY]]:
    return [(p, q) for p, q in zip(a.points, b.points, strict=True) if p is not None and q is not None]


def _as_flag(text: str, which: str) -> bool:
    if text not in ("0", "1"):
        raise StoreError(f"expected visible as 1 or 0 in {which}, got {text!r}")
    return text == "1"


def _read_mat(path: Path, which: str) -> _Marked:
    """Return the points of a file of MATLAB's; ``which`` is the row that asks for it."""
    which = f"'{path}', for {which}"
    values = read_matrices(path, ("kps", "bbox"), which)
    kps = values.get("kps")
    if kps is None or kps.ndim != 2 or kps.shape[1] != 2:
        got = "none" if kps is None else f"shape {kps.shape}"
        raise StoreError(f"expected points kps (n, 2) in {which}, got {got}")
    points: list[XY | None] = [None if math.isnan(x) or math.isnan(y) else (x, y) for x, y in kps.tolist()]
    present = [point for point in points if point is not None]
    if "bbox" in values:
        return _Marked(path, points, as_box(values["bbox"].ravel().tolist(), "bbox", which))
    return _Marked(path, points, box_around(present) if present else None)
