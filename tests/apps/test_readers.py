"""Datasets in their official layouts: what is annotated is what is read, and what is broken is named."""

import copy
import json
import math
import random
import re
import struct
from collections.abc import Callable, Sequence
from itertools import combinations
from pathlib import Path

import layouts
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from layouts import Truth
from PIL import Image, ImageFile
from scipy.io import loadmat, savemat

from vitfeats.apps.evaluation.annotations import PairReader, size_of
from vitfeats.apps.evaluation.datasets import Pair
from vitfeats.apps.evaluation.drawn import AP10K, CUB200, DrawnPairs
from vitfeats.apps.evaluation.matlab import read_matrices
from vitfeats.apps.evaluation.readers import PairList, PairTable, PFPascal, PFWillow, SPair71k, open_pairs, read_pairs
from vitfeats.errors import ConfigError, ImageError, ShapeError, StoreError, VitFeatsError
from vitfeats.preprocess import load_image

# Each layout: the writer, which returns the truth, and the reader.
LISTED: dict[str, tuple[Callable[[Path], list[Truth]], Callable[[Path], PairReader]]] = {
    "spair": (layouts.write_spair, SPair71k),
    "pf_pascal": (layouts.write_pf_pascal, PFPascal),
    "pf_willow": (layouts.write_pf_willow, PFWillow),
    "pair_list": (layouts.write_pair_list, lambda root: PairList(root / "pairs.json", root)),
    "pair_table": (layouts.write_pair_table, lambda root: PairTable(root / "pairs.csv", root)),
}
DRAWN = {"cub": (layouts.write_cub, CUB200), "ap10k": (layouts.write_ap10k, AP10K)}
ALL = LISTED | DRAWN


def middles(points: Sequence[Sequence[float]]) -> list[list[float]]:
    """Return the middles of the pixels that annotations name."""
    return [[x + 0.5, y + 0.5] for x, y in points]


def assert_is(pair: Pair, truth: Truth, root: Path, *, indices: bool = True) -> None:
    assert (pair.image_a, pair.image_b) == (root / truth.image_a, root / truth.image_b)
    for found, annotated in ((pair.points_a, truth.points_a), (pair.points_b, truth.points_b)):
        assert found.tolist() == (middles(annotated) if indices else [list(p) for p in annotated])
    assert (pair.category, pair.box_a, pair.box_b) == (truth.category, truth.box_a, truth.box_b)
    assert (None if pair.visible is None else pair.visible.tolist()) == truth.visible


def edit_json(path: Path, change: Callable) -> None:
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def edit_line(path: Path, number: int, old: str, new: str) -> None:
    """Replace a text in one line, counted from 1; it must be there."""
    lines = path.read_text().splitlines()
    assert old in lines[number - 1]
    lines[number - 1] = lines[number - 1].replace(old, new, 1)
    path.write_text("\n".join(lines) + "\n")


def first_csv_row(path: Path, **values: object) -> None:
    header, first, *others = path.read_text().splitlines()
    row = dict(zip(header.split(","), first.split(","), strict=True))
    assert row.keys() >= values.keys()
    path.write_text("\n".join([header, ",".join(map(str, (row | values).values())), *others]) + "\n")


# What is annotated is what is read ------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LISTED)
def test_every_listed_pair_is_read_as_it_is_annotated(tmp_path, layout):
    write, open_reader = LISTED[layout]
    truths = write(tmp_path)
    reader = open_reader(tmp_path)
    assert len(reader) == len(truths)
    for _ in range(2):  # it can be iterated over twice
        for pair, truth in zip(reader, truths, strict=True):
            assert_is(pair, truth, tmp_path, indices=layout != "pair_table")


@pytest.mark.parametrize("layout", ALL)
def test_indices_count_from_both_ends_and_end_there(tmp_path, layout):
    write, open_reader = ALL[layout]
    write(tmp_path)
    reader = open_reader(tmp_path)
    count = len(reader)
    for index in range(count):
        assert reader[index].name == reader[index - count].name
        assert torch.equal(reader[index].points_b, reader[index - count].points_b)
    for index in (count, -count - 1):
        with pytest.raises(IndexError, match=f"expected an index below {count}, got {index}"):
            reader[index]


def test_names_say_what_is_read(tmp_path):
    for name, (write, _) in ALL.items():
        write(tmp_path / name)
    assert SPair71k(tmp_path / "spair").name == "SPair-71k test"
    assert SPair71k(tmp_path / "spair", category="cat").name == "SPair-71k test cat"
    assert PFPascal(tmp_path / "pf_pascal").name == "PF-PASCAL test"
    assert repr(PFWillow(tmp_path / "pf_willow")) == "PFWillow(PF-WILLOW, 2 pairs)"
    assert PairList(tmp_path / "pair_list" / "pairs.json", tmp_path).name == "pairs.json"
    assert PairTable(tmp_path / "pair_table" / "pairs.csv", tmp_path).name == "pairs.csv"
    assert CUB200(tmp_path / "cub").name == "CUB-200-2011 test"
    assert AP10K(tmp_path / "ap10k").name == "AP-10K test, split 1"


def test_pairs_have_names(tmp_path):
    layouts.write_spair(tmp_path)
    layouts.write_pf_willow(tmp_path)
    assert SPair71k(tmp_path)[1].name == "000001-2008_001a-2008_001b:dog"
    assert PFWillow(tmp_path)[0].name == "0a.png, 0b.png"


def test_one_category_of_spair_is_read_alone(tmp_path):
    truths = layouts.write_spair(tmp_path)
    reader = SPair71k(tmp_path, category="cat")
    assert [pair.category for pair in reader] == ["cat", "cat"]
    assert_is(reader[1], truths[2], tmp_path)
    with pytest.raises(ConfigError, match=r"expected a category of '.*test.txt', got 'cot'. Did you mean 'cat'"):
        SPair71k(tmp_path, category="cot")


@pytest.mark.parametrize(("said", "meant"), [("train", "trn"), ("trn", "trn"), ("val", "val")])
def test_other_splits_are_read_from_their_own_lists(tmp_path, said, meant):
    for write, reader in ((layouts.write_spair, SPair71k), (layouts.write_pf_pascal, PFPascal)):
        truths = write(tmp_path, meant)
        found = reader(tmp_path, said)
        assert found.name.endswith(f" {meant}")
        for pair, truth in zip(found, truths, strict=True):
            assert_is(pair, truth, tmp_path)
        with pytest.raises(StoreError, match="test"):  # its list is not there
            reader(tmp_path, "test")


@pytest.mark.parametrize("reader", [SPair71k, PFPascal, CUB200, AP10K])
def test_an_unknown_split_is_refused(tmp_path, reader):
    with pytest.raises(ConfigError, match="expected split to be 'train' or .*'test', got 'tset'"):
        reader(tmp_path, "tset")


def test_pf_pascal_without_boxes_has_those_around_the_points_that_are_there(tmp_path):
    truths = layouts.write_pf_pascal(tmp_path, boxes=False)
    for pair, truth in zip(PFPascal(tmp_path), truths, strict=True):
        assert_is(pair, truth, tmp_path)


def test_lists_of_images_may_carry_a_leading_folder(tmp_path):
    truths = layouts.write_pf_pascal(tmp_path / "pascal", folder="PF-dataset-PASCAL/")
    for pair, truth in zip(PFPascal(tmp_path / "pascal"), truths, strict=True):
        assert_is(pair, truth, tmp_path / "pascal")
    truths = layouts.write_pf_willow(tmp_path / "willow", folder="PF-dataset/", name="test_pairs.csv")
    for pair, truth in zip(PFWillow(tmp_path / "willow"), truths, strict=True):
        assert_is(pair, truth, tmp_path / "willow")


def test_pf_pascal_lists_may_lie_in_a_folder(tmp_path):
    truths = layouts.write_pf_pascal(tmp_path)
    (tmp_path / "image_pairs").mkdir()
    (tmp_path / "test_pairs.csv").rename(tmp_path / "image_pairs" / "test_pairs.csv")
    assert len(PFPascal(tmp_path)) == len(truths) == 3


def test_columns_are_found_by_their_names(tmp_path):
    truths = layouts.write_pf_willow(tmp_path)
    path = tmp_path / "test_pairs_pf.csv"
    columns = list(zip(*(line.split(",") for line in path.read_text().splitlines()), strict=True))
    random.Random(0).shuffle(columns)
    layouts.write_text(path, [",".join(row) for row in zip(*columns, strict=True)])
    for pair, truth in zip(PFWillow(tmp_path), truths, strict=True):
        assert_is(pair, truth, tmp_path)


def test_a_table_needs_six_columns_only(tmp_path):
    truth = layouts.write_pair_table(tmp_path)[0]
    points = [(*p, *q) for p, q in zip(truth.points_a, truth.points_b, strict=True)]
    lines = ["yb,image_a,xa,ya,xb,image_b", *(f"{yb},0.png,{xa},{ya},{xb},1.png" for xa, ya, xb, yb in points)]
    layouts.write_text(tmp_path / "few.csv", lines)
    (pair,) = PairTable(tmp_path / "few.csv", tmp_path)
    assert_is(pair, Truth("0.png", "1.png", truth.points_a, truth.points_b), tmp_path, indices=False)


def test_a_list_of_ones_own_is_opened_by_its_suffix(tmp_path):
    layouts.write_pair_list(tmp_path)
    layouts.write_pair_table(tmp_path)
    assert type(open_pairs(tmp_path / "pairs.json", tmp_path)) is PairList
    assert type(open_pairs(str(tmp_path / "pairs.csv"), str(tmp_path))) is PairTable
    with pytest.raises(ConfigError, match=r"suffix .json or .csv, got '.*pairs.xml'"):
        open_pairs(tmp_path / "pairs.xml", tmp_path)


def test_a_list_is_read_whole_or_pair_by_pair(tmp_path):
    truths = layouts.write_pair_list(tmp_path)
    found = read_pairs(tmp_path / "pairs.json", tmp_path)
    assert type(found) is list
    for pair, truth in zip(found, truths, strict=True):
        assert_is(pair, truth, tmp_path)


# Only what a pair needs is read ---------------------------------------------------------------------------------------


def test_opening_many_pairs_opens_no_image_and_no_annotation(tmp_path, monkeypatch):
    truth = layouts.write_pair_list(tmp_path)[0]
    record = {"source_path": truth.image_a, "target_path": truth.image_b}
    (tmp_path / "pairs.json").write_text(json.dumps([record] * 2000))
    layouts.write_text(tmp_path / "Layout" / "large" / "test.txt", [f"{n}-a-b:cat" for n in range(2000)])
    monkeypatch.setattr(Image, "open", lambda *_: pytest.fail("an image was opened"))
    assert len(PairList(tmp_path / "pairs.json", tmp_path)) == 2000
    reader = SPair71k(tmp_path)
    assert len(reader) == 2000
    with pytest.raises(
        StoreError, match="annotation of line 2000 of '.*test.txt' in JSON at '.*1999-a-b:cat.json', but: "
    ):
        reader[-1]


@pytest.mark.parametrize("layout", ALL)
def test_pixels_are_never_read(tmp_path, layout, monkeypatch):
    write, open_reader = ALL[layout]
    write(tmp_path)
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda *_: pytest.fail("pixels were decoded"))
    assert list(open_reader(tmp_path))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_sizes_are_those_of_the_loaded_image(tmp_path, kind, orientation):
    picture = Image.new("RGB", (40, 30), "teal")
    exif = picture.getexif()
    exif[274] = orientation
    path = tmp_path / "a"
    picture.save(path, kind, exif=exif)
    assert size_of(path) == tuple(load_image(path).shape[1:]) == ((40, 30) if orientation > 4 else (30, 40))


def test_a_size_is_read_again_when_the_file_changes(tmp_path):
    path = tmp_path / "a.png"
    for size in ((40, 30), (400, 300)):
        Image.new("RGB", size, "teal").save(path)
        assert size_of(path) == size[::-1]


def test_an_image_without_a_size_is_named(tmp_path):
    path = tmp_path / "a.png"
    with pytest.raises(
        ImageError, match=r"expected an image at '.*a.png', but its size cannot be read: .*No such file"
    ):
        size_of(path)
    layouts.write_pair_list(tmp_path)
    (tmp_path / "pictures" / "1b.png").write_text("no image")
    reader = PairList(tmp_path / "pairs.json", tmp_path)
    with pytest.raises(ImageError, match=r"pair 1 of '.*pairs.json': expected an image at '.*1b.png', but its size"):
        reader[1]
    assert reader[0].category == "bird"  # the others can be read


# Points at the edge ---------------------------------------------------------------------------------------------------


def test_points_of_datasets_that_count_from_one_are_moved_onto_the_edge(tmp_path):
    layouts.write_pair_list(tmp_path)
    height, width = layouts.SIZES[0]
    path = tmp_path / "pairs.json"
    edge = [[width + 1, height + 1], [0, 0], [width, height], [width + 0.5, 3.5]]
    edit_json(path, lambda records: records[0].update(source_points=edge))
    found = PairList(path, tmp_path)[0].points_a.tolist()
    assert found == [[width, height], [0.5, 0.5], [width, height], [width, 4.0]]


@pytest.mark.parametrize("point", [[41.1, 3], [3, 31.1], [-0.1, 3], [3, -0.1], [30, 40], [1e300, 3], [3, 10**400]])
def test_points_outside_are_refused(tmp_path, point):
    layouts.write_pair_list(tmp_path)
    path = tmp_path / "pairs.json"
    edit_json(path, lambda records: records[0]["source_points"].__setitem__(2, point))
    told = "finite numbers" if point[1] == 10**400 else r"inside '0a.png' of 40×30 pixels, got \(.*\); are x and y"
    with pytest.raises(ShapeError, match=rf"pair 0 of '.*pairs.json': expected .*{told}"):
        PairList(path, tmp_path)[0]


def test_boxes_are_kept_as_annotated(tmp_path):
    layouts.write_pair_list(tmp_path)  # whose second box is larger than the image
    assert PairList(tmp_path / "pairs.json", tmp_path)[0].box_b == (0, 0, 99, 99.5)


# What is broken is named ----------------------------------------------------------------------------------------------

SPAIR = "PairAnnotation/test/000001-2008_001a-2008_001b:dog.json"


@pytest.mark.parametrize(
    ("change", "error", "told"),
    [
        (lambda r: r.pop("trg_kps"), StoreError, "expected src_imname, .* in '.*', but trg_kps is missing"),
        (lambda r: r.update(src_imname=3), StoreError, "expected src_imname to be text in '.*', got 3"),
        (lambda r: r.update(src_imname="x.jpg"), StoreError, r"an image at '.*dog/x.jpg', for '.*', .*; is root= the"),
        (lambda r: r.update(src_kps="ab"), ShapeError, "expected src_kps as a list of points .* got 'ab'"),
        (lambda r: r["src_kps"].pop(), ShapeError, "expected a point b for each a, got 3 and 4"),
        (lambda r: r.update(src_kps=[], trg_kps=[]), ShapeError, "at least one point, got none"),
        (lambda r: r["trg_kps"].__setitem__(1, [1, None]), ShapeError, r"point 1 of trg_kps as 2 finite .*\[1, None\]"),
        (lambda r: r["trg_kps"].__setitem__(1, [True, 1]), ShapeError, "point 1 of trg_kps as 2 finite numbers"),
        (lambda r: r["trg_kps"].__setitem__(1, [math.nan, 1]), ShapeError, "point 1 of trg_kps as 2 finite numbers"),
        (lambda r: r.update(src_bndbox=[1, 2, 3]), ShapeError, r"src_bndbox as 4 finite numbers, got \[1, 2, 3\]"),
        (lambda r: r.update(src_bndbox=[9, 2, 3, 4]), ShapeError, r"expected a box \(x0, y0, x1, y1\) from left"),
    ],
)
def test_what_is_wrong_in_spair_is_named_with_its_file(tmp_path, change, error, told):
    layouts.write_spair(tmp_path)
    edit_json(tmp_path / SPAIR, change)
    reader = SPair71k(tmp_path)
    with pytest.raises(error, match=told) as raised:
        reader[1]
    assert str(tmp_path / SPAIR) in str(raised.value)
    assert reader[0].category == "cat"


def test_lists_of_spair_are_checked(tmp_path):
    with pytest.raises(StoreError, match="expected a list of pairs at '.*test.txt', but: .*No such file"):
        SPair71k(tmp_path)
    path = tmp_path / "Layout" / "large" / "test.txt"
    layouts.write_text(path, ["1-a-b:cat", "", "2-a-b.dog"])
    with pytest.raises(StoreError, match="ID-SOURCE-TARGET:CATEGORY in line 3 of '.*test.txt', got '2-a-b.dog'"):
        SPair71k(tmp_path)
    path.write_text("\n")
    with pytest.raises(StoreError, match="expected a list of pairs in '.*test.txt', got an empty file"):
        SPair71k(tmp_path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(StoreError, match="expected a list of pairs at '.*test.txt', but: .*decode"):
        SPair71k(tmp_path)


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"class": 21}, "expected a class from 1 to 20 in line 2 of '.*test_pairs.csv', got '21'"),
        ({"class": 2}, "expected points at '.*bicycle/2009_000a.mat', for line 2 of '.*test_pairs.csv', but there is"),
        ({"target_image": "x/b.jpg"}, "expected points at '.*aeroplane/b.mat', for line 2 of '.*test_pairs.csv'"),
    ],
)
def test_what_is_wrong_in_a_list_of_pf_pascal_is_named_with_its_line(tmp_path, values, told):
    layouts.write_pf_pascal(tmp_path)
    first_csv_row(tmp_path / "test_pairs.csv", **values)
    with pytest.raises(StoreError, match=told):
        PFPascal(tmp_path)


KPS = np.array([[1.0, 2.0], [3.0, 4.0]])


@pytest.mark.parametrize(
    ("values", "error", "told"),
    [
        ({"other": KPS}, StoreError, r"expected points kps \(n, 2\) in '.*_000a.mat', for line 2 of .*, got none"),
        ({"kps": KPS.T[:, :1]}, StoreError, r"expected points kps \(n, 2\) in .*, got shape \(2, 1\)"),
        ({"kps": "ab"}, StoreError, r"expected points kps \(n, 2\) in .*, got none"),
        ({"kps": KPS}, ShapeError, r"line 2 of .*_000a.mat' and '.*_000b.mat': expected a point b for each a, got 2"),
        (
            {"kps": KPS, "bbox": KPS[0]},
            ShapeError,
            "'.*_000a.mat', for line 2 of .*: expected bbox as 4 finite numbers",
        ),
        (b"x" * 1_000_001, StoreError, "_000a.mat', for line 2 of .*, got more than 1000000 bytes, too many"),
        (b"x" * 200, StoreError, "_000a.mat', for line 2 of .*, got a file that is not of MATLAB 5 to 7.2"),
        (b"", StoreError, "_000a.mat', for line 2 of .*, got a file that is not of MATLAB 5 to 7.2"),
        (None, StoreError, "expected matrices in '.*_000a.mat', for line 2 of .*, but the file is damaged: it br"),
    ],
)
def test_what_is_wrong_in_points_of_pf_pascal_is_named_with_file_and_line(tmp_path, values, error, told):
    layouts.write_pf_pascal(tmp_path)
    path = tmp_path / "Annotations" / "aeroplane" / "2009_000a.mat"
    if isinstance(values, dict):
        savemat(path, values)
    else:
        path.write_bytes(path.read_bytes()[:150] if values is None else values)
    with pytest.raises(error, match=told):
        PFPascal(tmp_path)


def test_pf_pascal_without_any_common_point_is_refused(tmp_path):
    layouts.write_pf_pascal(tmp_path)
    path = tmp_path / "test_pairs.csv"
    header, _, without, *_ = path.read_text().splitlines()
    layouts.write_text(path, [header, without])
    with pytest.raises(StoreError, match="expected points in both images of a pair, got none in any pair of '.*csv'"):
        PFPascal(tmp_path)


def test_lists_that_are_not_there_are_named_with_every_place(tmp_path):
    with pytest.raises(StoreError, match="a list of pairs at '.*test_pairs_pf.csv' or '.*test_pairs.csv', for PF-WILL"):
        PFWillow(tmp_path)
    with pytest.raises(
        StoreError, match="a list of pairs at '.*val_pairs.csv' or '.*image_pairs/val_pairs.csv', for PF"
    ):
        PFPascal(tmp_path, "val")


@pytest.mark.parametrize(
    ("values", "error", "told"),
    [
        ({"XA3": "x"}, ShapeError, "line 2 of '.*': expected XA1 to XA10 as 10 finite numbers"),
        ({"YB10": ""}, ShapeError, "line 2 of '.*': expected YB1 to YB10 as 10 finite numbers"),
        ({"YB10": "nan"}, ShapeError, "line 2 of '.*': expected YB1 to YB10 as 10 finite numbers"),
        ({"YB10": "999"}, ShapeError, r"line 2 of '.*': expected points \(x, y\) inside '0b.png'"),
        ({"imageB": "PF/x.png"}, StoreError, "an image at '.*PF/x.png' or '.*x.png', for line 2 of '.*', but there is"),
    ],
)
def test_what_is_wrong_in_pf_willow_is_named_with_its_line(tmp_path, values, error, told):
    layouts.write_pf_willow(tmp_path)
    first_csv_row(tmp_path / "test_pairs_pf.csv", **values)
    reader = PFWillow(tmp_path)
    with pytest.raises(error, match=told):
        reader[0]
    assert reader[1].category == "winebottle(woC)"


@pytest.mark.parametrize(
    ("change", "error", "told"),
    [
        ({"source_points": None}, StoreError, "in pair 1 of '.*pairs.json', but source_points is missing"),
        ({"target_path": 3}, StoreError, "expected target_path to be text in pair 1 of '.*', got 3"),
        ({"category": 3}, StoreError, "expected category to be text in pair 1 of '.*', got 3"),
        ({"target_points": [[1, 2]]}, ShapeError, "pair 1 of '.*': expected a point b for each a, got 4 and 1"),
        (
            {"source_points": [1, 2]},
            ShapeError,
            "pair 1 of '.*': expected point 0 of source_points as 2 finite numbers",
        ),
        ({"source_bounding_box": [1, 2, "a", 4]}, ShapeError, "pair 1 of .*: expected source_bounding_box as 4 finite"),
        ({"target_bounding_box": [1, 2, 0, 4]}, ShapeError, "pair 1 of .*: expected a box .* from left to right"),
    ],
)
def test_what_is_wrong_in_a_list_is_named_with_its_pair(tmp_path, change, error, told):
    layouts.write_pair_list(tmp_path)

    def edit(records):
        records[1] = {key: value for key, value in (records[1] | change).items() if value is not None}

    edit_json(tmp_path / "pairs.json", edit)
    reader = PairList(tmp_path / "pairs.json", tmp_path)
    with pytest.raises(error, match=told):
        reader[1]
    assert reader[0].category == "bird"


@pytest.mark.parametrize(
    ("line", "old", "new", "error", "told"),
    [
        (3, "0.png", "9.png", StoreError, r"an image at '.*9.png', for line 3 of '.*', .*; is images= its folder\?"),
        (3, ",0,", ",2,", StoreError, "expected visible as 1 or 0 in line 3 of '.*', got '2'"),
        (
            3,
            ",,",
            ",other,",
            StoreError,
            "expected category as in line 2 of '.*', or nothing, in line 3 of '.*', got 'ot",
        ),
        (2, "1 2 20 15.5", "1 2 20", ShapeError, r"line 2 of '.*': expected box_a as 4 finite numbers, got \['1', '2'"),
        (4, "0.png,1.png,", "0.png,1.png,x", ShapeError, "line 4 of '.*': expected xa, ya, xb, yb as 4 finite numbers"),
        (4, "0.png,1.png,", "0.png,1.png,999", ShapeError, r"line 2 of '.*': expected points \(x, y\) inside '0.png'"),
    ],
)
def test_what_is_wrong_in_a_table_is_named_with_its_line(tmp_path, line, old, new, error, told):
    layouts.write_pair_table(tmp_path)
    edit_line(tmp_path / "pairs.csv", line, old, new)
    with pytest.raises(error, match=told):
        list(PairTable(tmp_path / "pairs.csv", tmp_path))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "expected a header with image_a, .* in '.*pairs.csv', but 'image_a' is missing"),
        ("image_a,image_b,xa,ya,xb\n", "but 'yb' is missing"),
        ("image_a,image_b,xa,ya,xb,yb,xa\n", "but 'xa' is there twice"),
        ("image_a,image_b,xa,ya,xb,yb\n\n", "expected a table of points in '.*pairs.csv', got none below the header"),
        ("image_a,image_b,xa,ya,xb,yb\na,b,1,2,3\n", "expected 6 fields, as in the header, in line 2 of '.*', got 5"),
        ("x" * 140_000, "expected a table of points in CSV at '.*pairs.csv', but line 1: field larger than"),
    ],
)
def test_a_file_that_is_no_table_is_refused(tmp_path, text, told):
    (tmp_path / "pairs.csv").write_text(text)
    with pytest.raises(StoreError, match=told):
        PairTable(tmp_path / "pairs.csv", tmp_path)


def test_a_list_nested_too_deeply_is_refused(tmp_path):
    (tmp_path / "pairs.json").write_text("[" * 100_000)
    with pytest.raises(StoreError, match="expected a list of pairs in JSON at '.*pairs.json', but: "):
        PairList(tmp_path / "pairs.json", tmp_path)


# Pairs that are drawn -------------------------------------------------------------------------------------------------


def same_subjects(reader: DrawnPairs) -> list[tuple[str, str]]:
    return [(str(pair.image_a), str(pair.image_b)) for pair in reader]


@pytest.mark.parametrize("layout", DRAWN)
def test_a_drawn_pair_has_what_both_images_are_annotated_with(tmp_path, layout):
    write, open_reader = DRAWN[layout]
    marked = write(tmp_path)
    for pair in open_reader(tmp_path, least=1):
        a, b = (marked[str(Path(image).relative_to(tmp_path))] for image in (pair.image_a, pair.image_b))
        both = sorted(a.points.keys() & b.points.keys())
        assert pair.image_a != pair.image_b
        assert a.category == b.category == pair.category
        assert pair.points_a.tolist() == middles([a.points[part] for part in both])
        assert pair.points_b.tolist() == middles([b.points[part] for part in both])
        assert (pair.box_a, pair.box_b) == (a.box, b.box)
        assert pair.visible.tolist() == [part not in a.hidden | b.hidden for part in both]


@pytest.mark.parametrize("layout", DRAWN)
@pytest.mark.parametrize("least", [1, 4, 5, 6])
def test_where_few_pairs_exist_all_are_drawn_once(tmp_path, layout, least):
    write, open_reader = DRAWN[layout]
    marked = write(tmp_path)
    wanted = {
        frozenset(str(tmp_path / name) for name in names)
        for names in combinations(marked, 2)
        if len({marked[name].category for name in names}) == 1
        and len(set.intersection(*(set(marked[name].points) for name in names))) >= least
    }
    if not wanted:
        with pytest.raises(StoreError, match=rf"expected two .* with {least} parts in both, got none"):
            open_reader(tmp_path, least=least)
        return
    drawn = same_subjects(open_reader(tmp_path, least=least))
    assert len(drawn) == len(wanted)
    assert set(map(frozenset, drawn)) == wanted


@pytest.mark.parametrize("layout", DRAWN)
def test_the_seed_decides_the_pairs_and_fewer_are_the_first_of_more(tmp_path, layout):
    write, open_reader = DRAWN[layout]
    write(tmp_path)
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    ten = same_subjects(open_reader(tmp_path, pairs=10, seed=3))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert ten == same_subjects(open_reader(tmp_path, pairs=10, seed=3))
    assert ten[:4] == same_subjects(open_reader(tmp_path, pairs=4, seed=3))
    others = [same_subjects(open_reader(tmp_path, pairs=10, seed=seed)) for seed in range(20)]
    assert len({tuple(other) for other in others}) > 10
    turned = [a > b for other in others for a, b in other]
    assert 0.3 < sum(turned) / len(turned) < 0.7  # either image may come first


def test_the_training_images_are_another_split(tmp_path):
    layouts.write_cub(tmp_path)
    with pytest.raises(
        StoreError, match=r"expected two images of '.*' \(images.txt, .*\) of one category with 3 parts"
    ):
        CUB200(tmp_path, "train")  # which has one image
    edit_line(tmp_path / "train_test_split.txt", 1, "1 0", "1 1")
    (pair,) = CUB200(tmp_path, "train")
    assert {Path(image).name for image in (pair.image_a, pair.image_b)} == {"Bird_0000.jpg", "Bird_0010.jpg"}


def test_ap10k_has_three_ways_to_split(tmp_path):
    layouts.write_ap10k(tmp_path, "val", 2)
    assert AP10K(tmp_path, "val", annotations=2).name == "AP-10K val, split 2"
    with pytest.raises(StoreError, match="expected annotations in JSON at '.*ap10k-val-split1.json', but: "):
        AP10K(tmp_path, "val")
    with pytest.raises(ConfigError, match="expected annotations to be 1, 2 or 3, got 4"):
        AP10K(tmp_path, "val", annotations=4)


@pytest.mark.parametrize("setting", ["pairs", "least"])
def test_nothing_cannot_be_drawn(tmp_path, setting):
    layouts.write_cub(tmp_path)
    with pytest.raises(ConfigError, match=f"expected {setting} of at least 1, got 0"):
        CUB200(tmp_path, **{setting: 0})


def test_a_missing_image_of_a_drawn_pair_is_named(tmp_path):
    layouts.write_cub(tmp_path, images=2)
    layouts.write_ap10k(tmp_path, images=2)
    for picture in [*tmp_path.glob("images/*/*.jpg"), *tmp_path.glob("data/*.jpg")]:
        picture.unlink()
    with pytest.raises(
        StoreError, match=r"an image at '.*Bird_.*', for \d and \d of the images of '.*' \(images.*\), but there is"
    ):
        CUB200(tmp_path)[0]
    with pytest.raises(
        StoreError, match=r"an image at '.*', for \d and \d of the annotations of '.*json', but there is"
    ):
        AP10K(tmp_path)[0]


@pytest.mark.parametrize(
    ("name", "old", "new", "error", "told"),
    [
        ("images.txt", "2 002", "1 002", StoreError, "expected each number once in '.*', got '1' again in line 2"),
        (
            "images.txt",
            "2 002",
            "77 002",
            StoreError,
            r"same images in '.*images.txt' and '.*split.txt', got '(2|77)' in",
        ),
        ("images.txt", "2 002", "2", StoreError, "expected a list of 2 columns in line 2 of '.*', got '2"),
        (
            "train_test_split.txt",
            "2 0",
            "2 2",
            StoreError,
            "expected 1 or 0 in the last column of line 2 of .*, got '2'",
        ),
        ("bounding_boxes.txt", "2 1.0", "2 x", ShapeError, "line 2 of '.*': expected x, y, width, height as 4 finite"),
        ("bounding_boxes.txt", "2 1", "88 1", StoreError, r"same images in .* and '.*boxes.txt', got '(2|88)' in one"),
        ("parts/part_locs.txt", "1 2 ", "99 2 ", StoreError, "an image of '.*images.txt' in line 2 of .*, got '99'"),
        (
            "parts/part_locs.txt",
            "1 2 ",
            "1 9 ",
            StoreError,
            "expected a part of '.*parts.txt' in line 2 of .*, got '9'",
        ),
        (
            "parts/part_locs.txt",
            "1 2 ",
            "1 1 ",
            StoreError,
            "each part of an image once in .*, got 1 1 again in line 2",
        ),
        ("parts/part_locs.txt", "1 2 ", "1 2 x", ShapeError, "line 2 of '.*': expected x, y as 2 finite numbers, got"),
        ("parts/part_locs.txt", " 1", " 3", StoreError, "expected 1 or 0 in the last column of line 6 of .*, got '3'"),
    ],
)
def test_what_is_wrong_in_cub_is_named_with_its_line(tmp_path, name, old, new, error, told):
    layouts.write_cub(tmp_path)
    if new == " 3":  # the last column, of a line whose other columns stay
        lines = (tmp_path / name).read_text().splitlines()
        lines[5] = lines[5][:-1] + "3"
        layouts.write_text(tmp_path / name, lines)
    else:
        edit_line(tmp_path / name, 2, old, new)
    with pytest.raises(error, match=told):
        CUB200(tmp_path)


def test_a_list_of_places_that_is_cut_off_is_refused(tmp_path):
    layouts.write_cub(tmp_path)
    path = tmp_path / "parts" / "part_locs.txt"
    layouts.write_text(path, path.read_text().splitlines()[:-1])
    with pytest.raises(StoreError, match="a line for each of 5 parts of 11 images in '.*', got 54; is one of"):
        CUB200(tmp_path)


@pytest.mark.parametrize(
    ("change", "error", "told"),
    [
        (lambda v: v.pop("images"), StoreError, "expected images, categories, annotations in '.*', but images is miss"),
        (lambda v: v.update(images=[]), StoreError, "expected images to be a list with at least one element in '.*'"),
        (
            lambda v: v["images"][1].update(id=[]),
            StoreError,
            r"id to be a number of its own in element 1 of the images",
        ),
        (
            lambda v: v["images"][1].update(id=100),
            StoreError,
            "id to be a number of its own in element 1 of the images",
        ),
        (
            lambda v: v["images"][1].update(file_name=1),
            StoreError,
            "file_name to be text in element 1 of the images of",
        ),
        (
            lambda v: v["annotations"][2].update(image_id=1),
            StoreError,
            "image_id to be one of .* in annotation 2 of .*1",
        ),
        (
            lambda v: v["annotations"][2].update(category_id=4),
            StoreError,
            "category_id to be .* in annotation 2 of .*4",
        ),
        (lambda v: v["annotations"][2].pop("bbox"), StoreError, "in annotation 2 of '.*', but bbox is missing"),
        (
            lambda v: v["annotations"][2]["keypoints"].pop(),
            ShapeError,
            "annotation 2 of .* keypoints as 51 finite numb",
        ),
        (
            lambda v: v["annotations"][2]["keypoints"].__setitem__(5, 3),
            ShapeError,
            "annotation 2 .* keypoint 1 .* got 3",
        ),
        (
            lambda v: v["annotations"][2].update(bbox=[1, 2, 3]),
            ShapeError,
            "annotation 2 of .* bbox as 4 finite number",
        ),
    ],
)
def test_what_is_wrong_in_ap10k_is_named_with_its_element(tmp_path, change, error, told):
    layouts.write_ap10k(tmp_path)
    edit_json(tmp_path / "annotations" / "ap10k-test-split1.json", change)
    with pytest.raises(error, match=told):
        AP10K(tmp_path)


def test_a_box_of_negative_width_is_refused(tmp_path):
    layouts.write_ap10k(tmp_path, images=2)
    path = tmp_path / "annotations" / "ap10k-test-split1.json"
    edit_json(path, lambda values: [record.update(bbox=[9, 9, -1, 3]) for record in values["annotations"]])
    with pytest.raises(
        ShapeError, match=r"\d and \d of the annotations of '.*json': expected a box .* from left to right"
    ):
        AP10K(tmp_path)[0]


# Whatever is in a file ------------------------------------------------------------------------------------------------

ODD = [None, True, "", "x", "a\0b", "\ud800", "../..", "x" * 5000, [], {}, [[]], [None], -5, 0, 1e308, 10**400]
ODD += [math.nan, math.inf, [[1, 2]], [[1, 2, 3]], {"a": [1]}, "nan", "1e999", "١", [[1, 2], [3]], 3.5, [1, 2, 3, 4]]
ODD_TEXT = ["", "x", "nan", "inf", "-1", "1e999", "99999", '"', "a\0b", "0", "1", "2.5", " ", "\n", "../..", "ü", "1,2"]


def nodes(value: object) -> list[tuple[dict | list, object]]:
    """Return every place in nested lists and objects: the container and the key."""
    if not isinstance(value, dict | list):
        return []
    keys = list(value) if isinstance(value, dict) else list(range(len(value)))
    return [(value, key) for key in keys] + [place for key in keys for place in nodes(value[key])]


def malform_json(text: str, drawn: random.Random) -> bytes:
    values = [json.loads(text)]
    for _ in range(drawn.choice((1, 1, 1, 2, 5))):
        container, key = drawn.choice(nodes(values))
        other, there = drawn.choice(nodes(values))
        kind = drawn.randrange(7)
        if kind == 0 and container is not values:
            del container[key]
        elif kind == 1 and isinstance(container, dict):
            container[drawn.choice(["", "x", "id", "src_kps"])] = container.pop(key)
        elif kind == 2 and isinstance(container[key], int | float):
            container[key] = container[key] * drawn.choice((-1, 2, 1000, 1e300)) + drawn.choice((0, 0.5, 1))
        elif kind == 3:
            container[key] = drawn.choice(([container[key]], {"x": container[key]}))
        elif kind == 4:
            swapped = json.dumps(container[key]), json.dumps(other[there])  # as text: no list may hold itself
            other[there] = json.loads(swapped[0])
            if (container, key) != (other, there) and key in (container if isinstance(container, dict) else [key]):
                container[key] = json.loads(swapped[1])
        elif kind == 5 and isinstance(container, list):
            container.append(json.loads(json.dumps(container[key])))
        else:
            container[key] = copy.deepcopy(drawn.choice(ODD))  # which may be changed in its turn
        if not nodes(values):
            break
    return malform_bytes(json.dumps(values[0] if values else None).encode(), drawn, rarely=True)


def malform_lines(text: str, drawn: random.Random, separator: str) -> bytes:
    rows = [line.split(separator) for line in text.splitlines()]
    for _ in range(drawn.choice((1, 1, 1, 2, 5))):
        row, other = drawn.choice(rows), drawn.choice(rows)
        kind = drawn.randrange(8)
        place = drawn.randrange(len(row)) if row else 0
        if kind == 0:
            row[place:] = []
        elif kind == 1:
            row.insert(place, drawn.choice(ODD_TEXT))
        elif kind == 2:
            row[:], other[:] = other[:], row[:]
        elif kind == 3:
            rows.append(list(row))
        elif kind == 4 and len(rows) > 1:
            rows.remove(row)
        elif kind == 5 and other:
            row[place : place + 1] = [drawn.choice(other)]
        else:
            row[place : place + 1] = [drawn.choice(ODD_TEXT)]
    return malform_bytes("\n".join(separator.join(row) for row in rows).encode(), drawn, rarely=True)


def malform_bytes(data: bytes, drawn: random.Random, *, rarely: bool = False) -> bytes:
    if rarely and drawn.random() < 0.8:
        return data
    changed = bytearray(data)
    for _ in range(drawn.choice((1, 1, 3, 20))):
        kind = drawn.randrange(4)
        place = drawn.randrange(len(changed)) if changed else 0
        if kind == 0:
            del changed[place:]
        elif kind == 1:
            changed[place:place] = drawn.randbytes(drawn.randrange(1, 9))
        elif kind == 2:
            changed[place : place + 1] = drawn.randbytes(1)
        else:
            del changed[place : place + drawn.randrange(1, 9)]
    return bytes(changed)


def malform_mat(data: bytes, drawn: random.Random) -> bytes:
    if drawn.random() < 0.5:
        return malform_bytes(data, drawn)
    # The header stays, and what follows is nonsense.
    body = bytearray(data)
    for _ in range(drawn.choice((1, 2, 8))):
        body[drawn.randrange(124, len(body))] = drawn.randrange(256)
    return bytes(body)


def attempt(read: Callable[[], object]) -> tuple[object, str]:
    """Return what is read, or what an error of ours says; any other error is a failure."""
    try:
        return read(), ""
    except VitFeatsError as error:
        return None, str(error)


def check_pair(pair: Pair) -> None:
    assert len(pair.points_a) == len(pair.points_b) > 0
    for image, points, box in ((pair.image_a, pair.points_a, pair.box_a), (pair.image_b, pair.points_b, pair.box_b)):
        height, width = size_of(image)
        assert ((points >= 0) & (points <= torch.tensor([width, height]))).all()
        assert box is None or (all(map(math.isfinite, box)) and box[0] <= box[2] and box[1] <= box[3])
    assert pair.visible is None or len(pair.visible) == len(pair.points_a)
    assert isinstance(pair.category, str)


def check_reading(open_reader: Callable[[], PairReader], file: Path, record: str) -> None:
    """Read all; each pair does, or the error names the file and, where one pair is at fault, the record."""
    reader, told = attempt(open_reader)
    if reader is None:
        assert file.name in told
        return
    assert len(reader) > 0
    for index in range(len(reader)):
        pair, told = attempt(lambda index=index: reader[index])
        if pair is None:
            assert file.name in told
            assert re.search(record, told)
        else:
            check_pair(pair)


def as_json(path: Path, drawn: random.Random) -> bytes:
    return malform_json(path.read_text(), drawn)


def as_csv(path: Path, drawn: random.Random) -> bytes:
    return malform_lines(path.read_text(), drawn, ",")


def as_columns(path: Path, drawn: random.Random) -> bytes:
    return malform_lines(path.read_text(), drawn, " ")


def as_mat(path: Path, drawn: random.Random) -> bytes:
    return malform_mat(path.read_bytes(), drawn)


FILES: list[tuple[str, str, Callable[[Path, random.Random], bytes], str]] = [
    ("spair", SPAIR, as_json, r"line 2 of"),
    ("spair", "Layout/large/test.txt", as_columns, r"line \d+ of"),
    ("pair_list", "pairs.json", as_json, r"pair \d+ of"),
    ("pair_table", "pairs.csv", as_csv, r"line \d+ of"),
    ("pf_willow", "test_pairs_pf.csv", as_csv, r"line \d+ of"),
    ("pf_pascal", "test_pairs.csv", as_csv, r"line \d+ of"),
    ("pf_pascal", "Annotations/aeroplane/2009_000a.mat", as_mat, r"line 2 of"),
    ("pf_pascal", "Annotations/aeroplane/2009_000b.mat", as_mat, r"line 2 of"),  # compressed
    ("ap10k", "annotations/ap10k-test-split1.json", as_json, r"\d+ and \d+ of the annotations of"),
    *(
        ("cub", name, as_columns, r"\S+ and \S+ of the images of")
        for name in (
            "images.txt",
            "train_test_split.txt",
            "bounding_boxes.txt",
            "parts/parts.txt",
            "parts/part_locs.txt",
        )
    ),
]


@pytest.fixture(scope="module")
def datasets(tmp_path_factory) -> dict[str, Path]:
    """Every layout, each in its own folder."""
    root = tmp_path_factory.mktemp("datasets")
    for name, (write, _) in ALL.items():
        write(root / name)
    return {name: root / name for name in ALL}


@pytest.mark.parametrize(("layout", "name", "malform", "record"), FILES, ids=[f"{f[0]}-{f[1]}" for f in FILES])
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(drawn=st.randoms(use_true_random=False))
def test_a_malformed_file_gives_pairs_that_do_or_an_error_that_names_it(datasets, layout, name, malform, record, drawn):
    root = datasets[layout]
    path = root / name
    whole = path.read_bytes()
    try:
        path.write_bytes(malform(path, drawn))
        check_reading(lambda: ALL[layout][1](root), path, record)
    finally:
        path.write_bytes(whole)


@pytest.mark.parametrize("layout", ALL)
def test_the_check_of_malformed_files_accepts_whole_ones(datasets, layout):
    check_reading(lambda: ALL[layout][1](datasets[layout]), Path("none"), "none")


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("kind", ["u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f4", "f8"])
def test_matrices_are_read_as_scipy_reads_them(tmp_path, kind, compressed):
    drawn = np.random.default_rng(0)
    shapes = {"a": (6, 2), "kps": (1, 1), "a_name_longer_than_a_tag": (3, 4, 2), "empty": (0, 2)}
    values = {name: drawn.integers(0, 120, shape).astype(kind) for name, shape in shapes.items()}
    path = tmp_path / "a.mat"
    savemat(
        path, values | {"text": "x", "struct": {"a": 1}, "complex": np.ones((2, 2)) * 1j}, do_compression=compressed
    )
    wanted = loadmat(path, variable_names=list(shapes))
    found = read_matrices(path, [*shapes, "text", "struct", "complex", "absent"], "a file")
    assert found.keys() == shapes.keys()
    for name, matrix in found.items():
        assert matrix.dtype == np.float64
        assert np.array_equal(matrix, wanted[name])
    assert read_matrices(path, ["a"], "a file").keys() == {"a"}


def test_matrices_of_the_other_byte_order_are_read(tmp_path):
    # Written by hand: an element of 6 × 8 bytes of numbers, whose name and shape stand before them.
    numbers = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    parts = struct.pack(">IIII", 6, 8, 6, 0) + struct.pack(">IIii", 5, 8, 3, 2)
    parts += struct.pack(">HH4s", 3, 1, b"kps") + struct.pack(">II6d", 9, 48, *numbers)
    header = b"MATLAB 5.0 MAT-file".ljust(124) + b"\x01\x00MI"
    path = tmp_path / "a.mat"
    path.write_bytes(header + struct.pack(">II", 14, len(parts)) + parts)
    assert read_matrices(path, ["kps"], "a file")["kps"].tolist() == [[1, 4], [2, 5], [3, 6]]
    assert np.array_equal(loadmat(path)["kps"], [[1, 4], [2, 5], [3, 6]])


ODD_POINTS: Sequence[object] = [
    *(KPS.astype(kind) for kind in (np.uint8, np.int16, np.float32, np.complex128, bool)),
    *(np.full((6, 2), value) for value in (-1, 1e308, math.nan, math.inf)),
    *(np.zeros(shape) for shape in ((0, 2), (6, 2), (2, 6), (6, 2, 2), (0, 0), (6, 3))),
    *({"a": KPS}, np.array([KPS, "x"], dtype=object), "text", ["a", "b"], np.array([["a", "b"]], dtype=object)),
]


@pytest.mark.parametrize("key", ["kps", "bbox"])
@pytest.mark.parametrize("values", ODD_POINTS, ids=str)
def test_whole_files_with_odd_values_give_pairs_that_do_or_an_error_that_names_them(tmp_path, key, values):
    layouts.write_pf_pascal(tmp_path)
    path = tmp_path / "Annotations" / "aeroplane" / "2009_000a.mat"
    savemat(path, {"kps": np.ones((6, 2)), key: values})
    check_reading(lambda: PFPascal(tmp_path), path, "line 2 of")
