"""Tiny datasets of semantic correspondence in their official layouts, made of random pictures and points.

Each writer returns what a reader must find there, so that a test need not know any number.
"""

import csv
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.io import savemat

Points = list[tuple[float, float]]
SIZES = ((30, 40), (48, 36), (24, 24), (20, 50))  # (height, width) of the pictures, in turn
NAN = (float("nan"), float("nan"))


@dataclass
class Truth:
    """What a pair must be; images as paths below the root."""

    image_a: str
    image_b: str
    points_a: Points
    points_b: Points
    category: str = ""
    box_a: tuple[float, ...] | None = None
    box_b: tuple[float, ...] | None = None
    visible: list[bool] | None = None


@dataclass
class Marked:
    """An annotated image of a dataset without pairs: points by part."""

    category: str
    box: tuple[float, ...]
    points: dict[int, tuple[float, float]]
    hidden: set[int] = field(default_factory=set)


def write_picture(path: Path, number: int) -> tuple[int, int]:
    """Write a smooth picture, one of four sizes; return its (height, width)."""
    height, width = SIZES[number % len(SIZES)]
    coarse = np.random.default_rng(number).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).save(path)
    return height, width


def draw_points(size: tuple[int, int], count: int, seed: int) -> Points:
    """Return points inside an image, on halves of pixels, so that float32 and text hold them exactly."""
    drawn = random.Random(seed)
    return [(drawn.randrange(2 * size[1]) / 2, drawn.randrange(2 * size[0]) / 2) for _ in range(count)]


def around(points: Points) -> tuple[float, float, float, float]:
    """Return the box around points."""
    xs, ys = [x for x, _ in points], [y for _, y in points]
    return min(xs), min(ys), max(xs), max(ys)


def write_text(path: Path, lines: Sequence[str]) -> None:
    """Write lines, and the folders above."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))


def write_csv(path: Path, rows: Sequence[dict]) -> None:
    """Write rows below a header of their keys."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]))
        table.writeheader()
        table.writerows(rows)


def write_spair(root: Path, split: str = "test") -> list[Truth]:
    """Write SPair-71k: two pairs of cats, one of dogs."""
    truths, names = [], []
    for number, category in enumerate(("cat", "dog", "cat")):
        stems = [f"2008_{number:03}{side}" for side in "ab"]
        sizes = [
            write_picture(root / "JPEGImages" / category / f"{stem}.jpg", 2 * number + side)
            for side, stem in enumerate(stems)
        ]
        points = [draw_points(size, 3 + number, 10 * number + side) for side, size in enumerate(sizes)]
        boxes = [[1, 2, size[1] - 1, size[0] - 2] for size in sizes]
        record = {
            "src_imname": f"{stems[0]}.jpg",
            "trg_imname": f"{stems[1]}.jpg",
            "src_kps": points[0],
            "trg_kps": points[1],
            "src_bndbox": boxes[0],
            "trg_bndbox": boxes[1],
            "category": category,
            "viewpoint_variation": 1,
        }
        names.append(f"{number:06}-{stems[0]}-{stems[1]}:{category}")
        write_text(root / "PairAnnotation" / split / f"{names[-1]}.json", [json.dumps(record)])
        images = [f"JPEGImages/{category}/{stem}.jpg" for stem in stems]
        truths.append(Truth(*images, *points, category, *map(tuple, boxes)))
    write_text(root / "Layout" / "large" / f"{split}.txt", names)
    return truths


def write_pf_pascal(root: Path, split: str = "test", *, boxes: bool = True, folder: str = "") -> list[Truth]:
    """Write PF-PASCAL: six points an image, some absent; the second of four listed pairs has none in common."""
    absent = [({5}, {0}), ({0, 1, 2}, {3, 4, 5}), (set(), set()), ({1, 2}, {2, 3})]
    truths, rows = [], []
    for number, category in enumerate((1, 8, 8, 20)):
        name = {1: "aeroplane", 8: "cat", 20: "tvmonitor"}[category]
        ends = []
        for side in range(2):
            stem = f"2009_{number:03}{'ab'[side]}"
            size = write_picture(root / "JPEGImages" / f"{stem}.jpg", 2 * number + side)
            points = draw_points(size, 6, 10 * number + side)
            gone = absent[number][side]
            values: dict = {"kps": np.array([NAN if part in gone else p for part, p in enumerate(points)])}
            box = (1.0, 2.0, size[1] - 1.0, size[0] - 2.0)
            if boxes:
                values["bbox"] = np.array([box])
            else:
                box = around([p for part, p in enumerate(points) if part not in gone])
            mat = root / "Annotations" / name / f"{stem}.mat"
            mat.parent.mkdir(parents=True, exist_ok=True)
            savemat(mat, values, do_compression=bool(side))
            ends.append((f"JPEGImages/{stem}.jpg", points, box))
        (image_a, points_a, box_a), (image_b, points_b, box_b) = ends
        both = [part for part in range(6) if part not in absent[number][0] | absent[number][1]]
        rows.append({"source_image": folder + image_a, "target_image": folder + image_b, "class": category})
        if split == "trn":
            rows[-1]["flip"] = number % 2
        if both:
            own = ([points[part] for part in both] for points in (points_a, points_b))
            truths.append(Truth(image_a, image_b, *own, name, box_a, box_b))
    write_csv(root / f"{split}_pairs.csv", rows)
    return truths


def write_pf_willow(root: Path, *, name: str = "test_pairs_pf.csv", folder: str = "") -> list[Truth]:
    """Write PF-WILLOW: a pair of two categories each."""
    truths, rows = [], []
    for number, category in enumerate(("car(G)", "winebottle(woC)")):
        images = [f"{category}/{number}{side}.png" for side in "ab"]
        sizes = [write_picture(root / image, 2 * number + side) for side, image in enumerate(images)]
        points_a, points_b = (draw_points(size, 10, 10 * number + side) for side, size in enumerate(sizes))
        row = {"imageA": folder + images[0], "imageB": folder + images[1]}
        for letter, points in (("A", points_a), ("B", points_b)):
            for axis in range(2):
                row |= {f"{'XY'[axis]}{letter}{place}": str(p[axis]) for place, p in enumerate(points, 1)}
        rows.append(row)
        truths.append(Truth(*images, points_a, points_b, category, around(points_a), around(points_b)))
    write_csv(root / name, rows)
    return truths


def write_pair_list(root: Path) -> list[Truth]:
    """Write pairs.json of Diffusion Hyperfeatures: one with all that is known, one with what is needed."""
    truths, records = [], []
    for number in range(2):
        images = [f"pictures/{number}{side}.png" for side in "ab"]
        sizes = [write_picture(root / image, 2 * number + side) for side, image in enumerate(images)]
        points_a, points_b = (draw_points(size, 4, 10 * number + side) for side, size in enumerate(sizes))
        truth = Truth(*images, points_a, points_b)
        record = {
            "source_path": images[0],
            "target_path": images[1],
            "source_points": points_a,
            "target_points": points_b,
            "mirror": False,
        }
        if not number:
            truth.category, truth.box_a, truth.box_b = "bird", (1, 2, 30, 20), (0, 0, 99, 99.5)
            record |= {"category": "bird", "source_bounding_box": truth.box_a, "target_bounding_box": truth.box_b}
        truths.append(truth)
        records.append(record)
    write_text(root / "pairs.json", [json.dumps(records)])
    return truths


def write_pair_table(root: Path) -> list[Truth]:
    """Write pairs.csv, a row for each point; the images of the first and the last pair are the same."""
    truths, rows = [], []
    for number, (a, b) in enumerate(((0, 1), (2, 3), (0, 1))):
        images = [f"{side}.png" for side in (a, b)]
        sizes = [write_picture(root / f"{side}.png", side) for side in (a, b)]
        points_a, points_b = (draw_points(size, 3, 10 * number + side) for side, size in enumerate(sizes))
        truth = Truth(*images, points_a, points_b, f"kind {number}", (1, 2, 20, 15.5), None, [True, False, True])
        for place, ((xa, ya), (xb, yb)) in enumerate(zip(points_a, points_b, strict=True)):
            row = {"image_a": images[0], "image_b": images[1], "xa": xa, "ya": ya, "xb": xb, "yb": yb}
            first = {"category": truth.category, "box_a": "1 2 20 15.5"} if not place else {"category": "", "box_a": ""}
            rows.append({**row, **first, "visible": int(place != 1), "remark": "left alone"})
        truths.append(truth)
    write_csv(root / "pairs.csv", rows)
    return truths


def write_cub(root: Path, images: int = 5) -> dict[str, Marked]:
    """Write CUB-200-2011: two species of so many test images each, and one of training; of five parts, some hidden."""
    found: dict[str, Marked] = {}
    lists: dict[str, list[str]] = {name: [] for name in ("images", "split", "boxes", "parts")}
    for number in range(2 * images + 1):
        train = number == 2 * images
        category = ("001.Black_footed_Albatross", "002.Laysan_Albatross")[number % 2]
        name = f"{category}/Bird_{number:04}.jpg"
        size = write_picture(root / "images" / name, number)
        points = draw_points(size, 5, number)
        hidden = number % 6  # 5 hides none
        lists["images"].append(f"{number + 1} {name}")
        lists["split"].append(f"{number + 1} {int(train)}")
        lists["boxes"].append(f"{number + 1} 1.0 2.0 {size[1] - 4}.0 {size[0] - 5}.0")
        for part, (x, y) in enumerate(points):
            place = "0.0 0.0 0" if part == hidden else f"{x} {y} 1"
            lists["parts"].append(f"{number + 1} {part + 1} {place}")
        if not train:
            kept = {part: p for part, p in enumerate(points) if part != hidden}
            found[f"images/{name}"] = Marked(category, (1, 2, size[1] - 3, size[0] - 3), kept)
    write_text(root / "images.txt", lists["images"])
    write_text(root / "train_test_split.txt", lists["split"])
    write_text(root / "bounding_boxes.txt", lists["boxes"])
    write_text(root / "parts" / "part_locs.txt", lists["parts"])
    write_text(root / "parts" / "parts.txt", ["1 back", "2 beak", "3 left eye", "4 right eye", "5 tail"])
    return found


def write_ap10k(root: Path, split: str = "test", annotations: int = 1, images: int = 4) -> dict[str, Marked]:
    """Write AP-10K: two species of so many images each; one more image shows two animals, and is not in the answer."""
    found: dict[str, Marked] = {}
    tables: dict[str, list[dict]] = {
        "images": [],
        "annotations": [],
        "categories": [{"id": 3, "name": "antelope"}, {"id": 7, "name": "fox"}],
    }
    for number in range(2 * images + 1):
        several = number == 2 * images
        category = ("antelope", "fox")[number % 2]
        name = f"{number:012}.jpg"
        size = write_picture(root / "data" / name, number)
        tables["images"].append({"id": 100 + number, "file_name": name, "width": size[1], "height": size[0]})
        points = draw_points(size, 17, number)
        seen = [(part + number) % 3 for part in range(17)]
        flat = [value for p, v in zip(points, seen, strict=True) for value in ((*p, v) if v else (0, 0, 0))]
        for _ in range(1 + several):
            tables["annotations"].append(
                {
                    "id": len(tables["annotations"]),
                    "image_id": 100 + number,
                    "category_id": {"antelope": 3, "fox": 7}[category],
                    "bbox": [1, 2, size[1] - 4, size[0] - 5],
                    "keypoints": flat,
                }
            )
        if not several:
            kept = {part: p for part, p in enumerate(points) if seen[part]}
            hidden = {part for part in kept if seen[part] == 1}
            found[f"data/{name}"] = Marked(category, (1, 2, size[1] - 3, size[0] - 3), kept, hidden)
    write_text(root / "annotations" / f"ap10k-{split}-split{annotations}.json", [json.dumps(tables)])
    return found
