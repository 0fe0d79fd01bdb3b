"""Annotated images without pairs, of which pairs within a category are drawn."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from reprlib import repr as shortened
from typing import Any

import torch

from vitfeats.apps.evaluation.annotations import (
    XY,
    PairReader,
    as_numbers,
    as_sized_box,
    as_text,
    digest_of,
    existing,
    make_pair,
    read_json,
    read_lines,
    require,
    split_of,
)
from vitfeats.apps.evaluation.datasets import Box, Pair
from vitfeats.errors import ConfigError, ShapeError, StoreError

_ROOT = "is root= the dataset's folder?"
_KEYPOINTS = 17  # of an animal of AP-10K
_AP10K_SPLITS = (1, 2, 3)


@dataclass(frozen=True)
class Subject:
    """One annotated object in one image.

    Attributes:
        key: What the dataset calls it, or its place in the file.
        image: The image, whether there is one or not.
        category: What it is.
        box: Its box.
        points: (x, y) in pixels, by part; parts that are absent are left out.
        hidden: Parts among them that cannot be seen.
    """

    key: str
    image: Path
    category: str
    box: Box
    points: Mapping[str | int, XY]
    hidden: frozenset[str | int] = frozenset()


class DrawnPairs(PairReader):
    """Pairs of different images of one category, drawn with a seed; no pair is drawn twice, in either order.

    All pairs that share enough parts are as likely, so that a category with many images has more of them. Fewer pairs
    are the first ones of more. Where fewer can be had than asked for, there are all of them.

    Attributes:
        name: The dataset and its split.
        drawn: The pairs, as places in the sequence of subjects.
    """

    def __init__(
        self, name: str, subjects: Sequence[Subject], where: str, *, pairs: int, seed: int, least: int
    ) -> None:
        """Draw the pairs.

        Args:
            name: The dataset and its split.
            subjects: What the pairs are drawn of.
            where: What the subjects' keys are counted in, for messages: "images of 'file'".
            pairs: How many pairs.
            seed: Seed of the draw.
            least: Parts that both images of a pair must have.

        Raises:
            ConfigError: If ``pairs`` or ``least`` is not positive.
            StoreError: If there is no such pair.
        """
        for setting, value in (("pairs", pairs), ("least", least)):
            if value < 1:
                raise ConfigError(f"expected {setting} of at least 1, got {value}")
        self.name, self._subjects, self._where = name, subjects, where
        possible = _possible(subjects, least)
        if not possible:
            raise StoreError(f"expected two {where} of one category with {least} parts in both, got none")
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(possible), generator=generator)[:pairs].tolist()
        turned = torch.randint(2, (len(possible),), generator=generator).tolist()
        self.drawn = [possible[place][::-1] if turned[place] else possible[place] for place in order]
        self.fingerprint = digest_of(self.drawn)

    def __len__(self) -> int:
        """Return the number of pairs."""
        return len(self.drawn)

    def _read(self, index: int) -> Pair:
        a, b = (self._subjects[place] for place in self.drawn[index])
        which = f"{a.key} and {b.key} of the {self._where}"
        image_a, image_b = (existing("an image", [subject.image], which, _ROOT) for subject in (a, b))
        both = [part for part in a.points if part in b.points]
        return make_pair(
            *(which, (image_a, image_b), ([a.points[part] for part in both], [b.points[part] for part in both])),
            category=a.category,
            boxes=(a.box, b.box),
            visible=[part not in a.hidden and part not in b.hidden for part in both],
        )


class CUB200(DrawnPairs):
    """Caltech-UCSD Birds 200-2011 (Wah et al., 2011): 15 parts; pairs of birds of one species.

    Layout: ``images.txt``, ``bounding_boxes.txt`` (x, y, width, height), ``train_test_split.txt``, ``parts/parts.txt``
    and ``parts/part_locs.txt`` (image, part, x, y, visible: a line for each part of each image); images are below
    ``images/``. The category is the folder of an image, such as "001.Black_footed_Albatross". Parts that are not
    visible have no place, and are left out. There is no official list of pairs: results on lists that were drawn in
    different ways cannot be compared.
    """

    def __init__(
        self, root: Path | str, split: str = "test", *, pairs: int = 1000, seed: int = 0, least: int = 3
    ) -> None:
        """Read the lists, and draw the pairs.

        Args:
            root: Folder of the dataset, with images.txt.
            split: "train" or "test".
            pairs: How many pairs to draw; there are fewer where fewer can be had.
            seed: Seed of the draw.
            least: Parts that must be visible in both images.

        Raises:
            ConfigError: If there is no such split, or ``pairs`` or ``least`` is not positive.
            StoreError: If a list cannot be read or is not such a list, lists do not fit each other, or no pair can be
                drawn.
            ShapeError: If the places of parts or boxes are no numbers.
        """
        root, wanted = Path(root), split_of(split, {"train": "1", "test": "0"})
        lists = [root / name for name in ("images.txt", "train_test_split.txt", "bounding_boxes.txt")]
        images, flags, boxes = (_by_key(path, columns) for path, columns in zip(lists, (2, 2, 5), strict=True))
        for path, lines in zip(lists[1:], (flags, boxes), strict=True):
            if alone := images.keys() ^ lines.keys():
                raise StoreError(f"expected the same images in '{lists[0]}' and '{path}', got {min(alone)!r} in one")
        points = _read_parts(root, images)
        subjects = []
        for key, (_, (name,)) in images.items():
            if _as_flag(flags[key][1][0], flags[key][0]) == wanted:
                box = as_sized_box(boxes[key][1], "x, y, width, height", boxes[key][0])
                image = root / "images" / name
                subjects.append(Subject(key, image, image.parent.name, box, points.get(key, {})))
        files = "images.txt, train_test_split.txt, bounding_boxes.txt, parts/part_locs.txt"
        super().__init__(
            f"CUB-200-2011 {split}", subjects, f"images of '{root}' ({files})", pairs=pairs, seed=seed, least=least
        )


class AP10K(DrawnPairs):
    """AP-10K (Yu et al., 2021): animals with 17 keypoints; pairs of animals of one species.

    Layout: ``annotations/ap10k-{train,val,test}-split{1,2,3}.json`` as of COCO, with ``images`` (id, file_name),
    ``categories`` (id, name) and ``annotations`` (image_id, category_id, bbox (x, y, width, height), and keypoints
    x, y, v of each: v is 0 where absent, 1 where hidden, 2 where visible); images are ``data/FILE_NAME``. Images with
    several animals are left out: nothing says which of them a pair is about. There is no official list of pairs:
    results on lists that were drawn in different ways cannot be compared.
    """

    def __init__(
        self,
        root: Path | str,
        split: str = "test",
        *,
        annotations: int = 1,
        pairs: int = 1000,
        seed: int = 0,
        least: int = 3,
    ) -> None:
        """Read the annotations, and draw the pairs.

        Args:
            root: Folder of the dataset.
            split: "train", "val" or "test".
            annotations: Which of the three ways to split the dataset.
            pairs: How many pairs to draw; there are fewer where fewer can be had.
            seed: Seed of the draw.
            least: Keypoints, hidden or not, that both images must have.

        Raises:
            ConfigError: If there is no such split, or ``pairs`` or ``least`` is not positive.
            StoreError: If the annotations cannot be read or are not such annotations, or no pair can be drawn.
            ShapeError: If keypoints or boxes are not the numbers that they should be.
        """
        split_of(split, {name: name for name in ("train", "val", "test")})
        if annotations not in _AP10K_SPLITS:
            raise ConfigError(f"expected annotations to be 1, 2 or 3, got {annotations}")
        path = Path(root) / "annotations" / f"ap10k-{split}-split{annotations}.json"
        subjects = _read_animals(path, Path(root) / "data")
        super().__init__(
            f"AP-10K {split}, split {annotations}",
            *(subjects, f"annotations of '{path}'"),
            pairs=pairs,
            seed=seed,
            least=least,
        )


def _possible(subjects: Sequence[Subject], least: int) -> list[tuple[int, int]]:
    """Return all pairs of subjects of one category that share enough parts, as places."""
    places: dict[str, list[int]] = {}
    for place, subject in enumerate(subjects):
        places.setdefault(subject.category, []).append(place)
    return [
        (i, j)
        for same in places.values()
        for i, j in combinations(same, 2)
        if subjects[i].image != subjects[j].image
        and len(subjects[i].points.keys() & subjects[j].points.keys()) >= least
    ]


def _by_key(path: Path, columns: int) -> dict[str, tuple[str, list[str]]]:
    """Return the lines of a list by their first column: what to call the line, and its other columns."""
    found: dict[str, tuple[str, list[str]]] = {}
    for which, (key, *values) in read_lines(path, "a list", columns):
        if key in found:
            raise StoreError(f"expected each number once in '{path}', got {key!r} again in {which}")
        found[key] = which, values
    return found


def _read_parts(root: Path, images: Mapping[str, Any]) -> dict[str, dict[str | int, XY]]:
    """Return the places of visible parts, by image and part."""
    known = _by_key(root / "parts" / "parts.txt", 2)
    path = root / "parts" / "part_locs.txt"
    points: dict[str, dict[str | int, XY]] = {}
    seen: set[tuple[str, str]] = set()
    for which, (image, part, *place, visible) in read_lines(path, "places of parts", 5):
        if image not in images:
            raise StoreError(f"expected an image of '{root / 'images.txt'}' in {which}, got {image!r}")
        if part not in known:
            raise StoreError(f"expected a part of '{root / 'parts' / 'parts.txt'}' in {which}, got {part!r}")
        if (image, part) in seen:
            raise StoreError(f"expected each part of an image once in '{path}', got {image} {part} again in {which}")
        seen.add((image, part))
        x, y = as_numbers(place, 2, "x, y", which)
        if _as_flag(visible, which) == "1":
            points.setdefault(image, {})[part] = (x, y)
    if len(seen) != len(images) * len(known):
        raise StoreError(
            f"expected a line for each of {len(known)} parts of {len(images)} images in '{path}', got {len(seen)}; "
            f"is one of 'images.txt', 'parts.txt' and 'part_locs.txt' cut off?"
        )
    return points


def _as_flag(text: str, which: str) -> str:
    if text not in ("0", "1"):
        raise StoreError(f"expected 1 or 0 in the last column of {which}, got {text!r}")
    return text


def _read_animals(path: Path, folder: Path) -> list[Subject]:
    """Return the animals that are alone in their image."""
    lists = ("images", "categories", "annotations")
    found = require(read_json(path, "annotations in JSON"), lists, f"'{path}'")
    for name in lists:
        if not isinstance(found[name], list) or not found[name]:
            raise StoreError(f"expected {name} to be a list with at least one element in '{path}'")
    names, categories = (
        _texts_by_id(found[what], key, f"of the {what} of '{path}'")
        for what, key in (("images", "file_name"), ("categories", "name"))
    )
    subjects: dict[int, list[Subject]] = {}
    for number, record in enumerate(found["annotations"]):
        which = f"annotation {number} of '{path}'"
        require(record, ("image_id", "category_id", "bbox", "keypoints"), which)
        image = _known_id(record["image_id"], names, "image_id", which)
        category = _known_id(record["category_id"], categories, "category_id", which)
        points, hidden = _keypoints(record["keypoints"], which)
        box = as_sized_box(record["bbox"], "bbox", which)
        subject = Subject(str(number), folder / names[image], categories[category], box, points, hidden)
        subjects.setdefault(image, []).append(subject)
    return [alone for alone, *others in subjects.values() if not others]


def _texts_by_id(records: Sequence[Any], key: str, where: str) -> dict[int, str]:
    texts: dict[int, str] = {}
    for number, record in enumerate(records):
        which = f"element {number} {where}"
        fields = require(record, ("id", key), which)
        if type(fields["id"]) is not int or fields["id"] in texts:
            raise StoreError(f"expected id to be a number of its own in {which}, got {shortened(fields['id'])}")
        texts[fields["id"]] = as_text(fields[key], key, which)
    return texts


def _known_id(value: Any, known: Mapping[int, str], what: str, which: str) -> int:
    if type(value) is not int or value not in known:
        raise StoreError(f"expected {what} to be one of the file's in {which}, got {shortened(value)}")
    return value


def _keypoints(values: Any, which: str) -> tuple[dict[str | int, XY], frozenset[str | int]]:
    """Return the keypoints that are there, by number, and which of them are hidden."""
    numbers = as_numbers(values, 3 * _KEYPOINTS, "keypoints", which)
    points: dict[str | int, XY] = {}
    hidden = set()
    for part in range(_KEYPOINTS):
        x, y, seen = numbers[3 * part : 3 * part + 3]
        if seen not in (0, 1, 2):
            raise ShapeError(f"{which}: expected keypoint {part} with v of 0, 1 or 2, got {seen:g}")
        if seen:
            points[part] = (x, y)
        if seen == 1:
            hidden.add(part)
    return points, frozenset(hidden)
