"""PCK of features and of methods: against numbers worked out by hand, naive loops, and runs that were never stopped."""

import copy
import json
import math
import os
import subprocess
import sys
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from killing import kill_now_and_then
from sklearn.decomposition import TruncatedSVD
from synthetic import as_users_run, describe, random_descriptor
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import vitfeats as vf
from vitfeats.apps.evaluation import (
    Pair,
    PairErrors,
    PckResult,
    carry_points,
    describe_with,
    draw_accuracy,
    draw_pairs,
    evaluate_method,
    evaluate_pck,
    fused,
    joined,
    joint_pca,
    keep_in,
    pck,
    same_place,
)
from vitfeats.apps.evaluation.describing import fingerprint_of
from vitfeats.card import ModelCard
from vitfeats.configs import MEANS, PckProtocol
from vitfeats.descriptor import Descriptor
from vitfeats.errors import ConfigError, ImageError, ShapeError, StoreError, TapError
from vitfeats.extractors.base import Extractor
from vitfeats.hooks import count_hooks
from vitfeats.preprocess import Prepared, Preprocess
from vitfeats.similarity import cosine_similarity, unit
from vitfeats.taps import Reading, Tap

IMAGE = PckProtocol(reference="image", mean="keypoint")
BOX = PckProtocol(mean="keypoint")


class Named(list):
    """Pairs with a name, as data sets have."""

    name = "a few pairs"


def picture(height: int, width: int, seed: int = 0) -> Tensor:
    """Return a smooth image."""
    coarse = torch.rand(1, 3, 4, 5, generator=torch.Generator().manual_seed(seed))
    return F.interpolate(coarse, (height, width), mode="bilinear")[0]


def marked(offsets: Sequence[tuple[float, float]], size: tuple[int, int] = (60, 100), **facts) -> tuple[Pair, Tensor]:
    """Return a pair of black images, and an answer that misses each of its points by an offset."""
    target = torch.tensor([[20.0 + 3 * place, 30.0 - place] for place in range(len(offsets))])
    return Pair(torch.zeros(3, 40, 50), torch.zeros(3, *size), target, target, **facts), target + torch.tensor(offsets)


def measured(marks: Sequence[tuple[Pair, Tensor]], protocol: PckProtocol, **settings) -> PckResult:
    """Measure a method that gives these answers, one after the other."""
    answers = iter([answer for _, answer in marks])
    return evaluate_method(
        lambda a, b, points: next(answers), Named(p for p, _ in marks), protocol=protocol, **settings
    )


def mosaic(order: Sequence[int], rows: int = 4, cols: int = 4) -> Tensor:
    """Return an image of cells of 8 × 8 pixels, each a grey of its own."""
    grey = torch.tensor(order, dtype=torch.float32).view(1, rows, cols) / 32
    return grey.repeat_interleave(8, 1).repeat_interleave(8, 2).repeat(3, 1, 1)


def read_mosaic(image: Tensor) -> Descriptor:
    """Describe each cell of a mosaic by a channel for its grey: cells are alike, or have nothing in common."""
    cells = (image[0, 4::8, 4::8] * 32).round().long()
    return describe(F.one_hot(cells.flatten(), 32)[None].float(), *cells.shape)


def drawn_pairs(count: int, points: int = 4, seed: int = 0, category: Callable[[int], str] = lambda n: "ab"[n % 2]):
    """Return pairs of small smooth images of different sizes, with points anywhere."""
    generator = torch.Generator().manual_seed(seed)
    pairs = Named()
    for number in range(count):
        sizes = [(30 + 7 * ((number + side) % 3), 40 + 5 * ((number + 2 * side) % 4)) for side in range(2)]
        a, b = (torch.rand(points, 2, generator=generator) * torch.tensor([w, h]) for h, w in sizes)
        images = [picture(*size, seed=2 * number + side) for side, size in enumerate(sizes)]
        box = (1.0, 2.0, 30.0, 25.0)
        pairs.append(Pair(*images, a, b, f"pair {number}", category=category(number), box_b=box))
    return pairs


class Colours(Extractor):
    """Reads the mean colour of cells of 8 × 8 pixels, and notes what it was shown."""

    def __init__(self, network: nn.Module | None = None) -> None:
        card = ModelCard("colours", "", "module", 8, 1, 3, None, 0, False, 32, default_tap="out@-1", layers=("last",))
        preprocess = Preprocess(32, 8, 8, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
        super().__init__(network or nn.Identity(), card, preprocess, "float32")
        self.seen: list[Prepared] = []

    def resolve(self, tap: Tap) -> Tap:
        return tap

    def read(self, batch: Prepared, taps: Sequence[Tap]) -> dict[Tap, Reading]:
        self.seen.append(batch)
        cells = F.avg_pool2d(batch.pixels, 8).flatten(2).transpose(1, 2)
        return {tap: Reading(cells) for tap in taps}


def same(one: PckResult, other: PckResult) -> bool:
    """Tell whether two results are the same, NaN included."""
    return (one.name, one.dataset, one.protocol, repr(one.pairs)) == (
        *(other.name, other.dataset, other.protocol),
        repr(other.pairs),
    )


# By hand --------------------------------------------------------------------------------------------------------------

# Distances 5, 10, 0 and 5.01; a tenth of the box's longer side is 5, and of the image's 10.
OFFSETS = [(3.0, 4.0), (6.0, 8.0), (0.0, 0.0), (5.01, 0.0)]
BOXED = (10.0, 10.0, 60.0, 50.0)


@pytest.mark.parametrize(
    ("reference", "strict", "expected"),
    [("box", False, 0.5), ("box", True, 0.25), ("image", False, 1.0), ("image", True, 0.75)],
)
def test_a_point_exactly_at_the_threshold_is_correct_unless_strict(reference, strict, expected):
    marks = [marked(OFFSETS, box_b=BOXED)]
    protocol = PckProtocol(reference=reference, strict=strict, mean="keypoint")
    result = measured(marks, protocol)
    assert result.pck() == expected
    assert result.under(strict=not strict).pck() != expected
    # The same errors judged anew are those that were judged so from the beginning.
    other = measured(marks, PckProtocol(mean="image"))
    assert other.under(protocol).pck() == expected
    assert other.under(reference=reference, strict=strict, mean="keypoint").pck() == expected
    assert other.protocol == PckProtocol(mean="image")


def test_distances_sides_and_answers_are_kept():
    ((pair, answer),) = marks = [marked(OFFSETS, box_b=BOXED, name="a", category="cat")]
    result = measured(marks, BOX, name="by hand")
    (errors,) = result.pairs
    assert errors.distances == pytest.approx([5.0, 10.0, 0.0, 5.01], abs=1e-5)
    assert (errors.index, errors.name, errors.category) == (0, "a", "cat")
    assert (errors.image_side, errors.box_side, errors.visible) == (100.0, 50.0, (True,) * 4)
    assert torch.tensor(errors.predicted).float().equal(answer)
    assert (result.name, result.dataset, result.points) == ("by hand", "a few pairs", 4)
    assert repr(result) == "PckResult(by hand on a few pairs: 1 pairs, PCK@0.1 0.5000)"
    assert measured([(pair, answer)], BOX).name == "method"


def test_each_threshold_has_its_share():
    result = measured([marked(OFFSETS, box_b=BOXED)], replace(BOX, thresholds=(0.2, 0.11, 0.1, 0.05)))
    assert [result.pck(threshold) for threshold in result.protocol.thresholds] == [1.0, 0.75, 0.5, 0.25]
    assert result.pck() == 1.0  # the first
    assert result.pck(0.15) == 0.75  # one that is not the protocol's
    with as_users_run():
        assert [result.under(thresholds=[t]).pck() for t in (0.2, 0.1)] == [1.0, 0.5]
    assert list(result.as_dict()["pck"]) == ["0.2", "0.11", "0.1", "0.05"]


def test_a_box_without_a_side_forgives_nothing():
    result = measured([marked([(0.0, 0.0), (0.0, 0.001)], box_b=(7.0, 7.0, 7.0, 7.0))], BOX)
    assert [result.pck(threshold) for threshold in (0.01, 1.0, 1e9)] == [0.5, 0.5, 0.5]
    assert result.under(strict=True).pck() == 0.0
    assert result.under(reference="image").pck() == 1.0
    counts = list(result.histogram().values())
    assert (counts[0], counts[-1], sum(counts)) == (1, 1, 2)
    assert [errors.index for errors in result.ranked()] == [0]


def test_what_is_not_a_number_is_never_correct_and_what_lies_outside_is_judged_by_its_distance():
    nan, inf = math.nan, math.inf
    offsets = [(nan, 0.0), (inf, 0.0), (nan, nan), (-40.0, 0.0), (0.0, 1e6), (-30.0, 40.0)]
    result = measured([marked(offsets)], IMAGE)
    assert result.pairs[0].distances == (inf, inf, inf, 40.0, 1e6, 50.0)
    assert [result.pck(threshold) for threshold in (0.1, 0.4, 0.5, 1e9)] == [0.0, 1 / 6, 2 / 6, 3 / 6]
    assert result.histogram()[1.0, inf] == 4


def test_pairs_without_a_point_that_counts_are_in_no_mean():
    near, far = (0.0, 0.0), (90.0, 0.0)
    marks = [
        marked([near, far], visible=[True, False], category="cat"),
        marked([far, far], visible=[False, False], category="dog"),
        marked([near, near, far, far], category="cat"),  # nobody said, so all are visible
    ]
    every = measured(marks, IMAGE)
    assert every.every_mean() == pytest.approx(
        {"keypoint": 3 / 8, "image": 1 / 3, "category": 0.25, "category_keypoint": 0.25}
    )
    seen = every.under(visible_only=True)
    assert seen.points == 5
    assert seen.every_mean() == pytest.approx(
        {"keypoint": 3 / 5, "image": 0.75, "category": 0.75, "category_keypoint": 3 / 5}
    )
    assert list(seen.by_category()) == ["cat"]
    assert [errors.index for errors in seen.ranked()] == [0, 2]
    assert sum(seen.histogram().values()) == 5
    assert seen.as_dict()["counted"] == {"pairs": 2, "points": 5}
    none = measured(marks[1:2], replace(IMAGE, visible_only=True))
    assert all(math.isnan(value) for value in none.every_mean().values())
    assert (none.points, none.by_category(), none.ranked()) == (0, {}, [])
    with pytest.raises(ConfigError, match="expected at least one pair with points that count, got none to draw"):
        draw_pairs(none, [pair for pair, _ in marks[1:2]])


def test_the_four_means_differ_where_categories_do():
    near, far = (0.0, 0.0), (90.0, 0.0)
    marks = [
        marked([near], category="dog"),
        marked([near, far, far, far], category="dog"),
        marked([far, far], category="cat"),
    ]
    result = measured(marks, IMAGE)
    means = {"keypoint": 2 / 7, "image": (1 + 1 / 4 + 0) / 3, "category": (5 / 8 + 0) / 2, "category_keypoint": 1 / 5}
    assert result.every_mean() == pytest.approx(means)
    assert len(set(means.values())) == 4
    for name, value in means.items():
        assert result.pck(mean=name) == result.under(mean=name).pck() == pytest.approx(value)
    categories = result.by_category()
    assert list(categories) == ["cat", "dog"]
    assert categories["dog"] == pytest.approx({"pairs": 2, "points": 5, "image": 5 / 8, "keypoint": 2 / 5})
    assert categories["cat"] == pytest.approx({"pairs": 1, "points": 2, "image": 0.0, "keypoint": 0.0})
    assert result.markdown() == (
        "| PCK@ | keypoint | image | category | category, keypoint |\n| --- | --- | --- | --- | --- |\n"
        "| 0.1 | 28.6 | 41.7 | 31.2 | 20.0 |\n| 0.05 | 28.6 | 41.7 | 31.2 | 20.0 |\n"
        "| 0.01 | 28.6 | 41.7 | 31.2 | 20.0 |\n\n"
        "| category | pairs | points | image | keypoint |\n| --- | --- | --- | --- | --- |\n"
        "| cat | 1 | 2 | 0.0 | 0.0 |\n| dog | 2 | 5 | 62.5 | 40.0 |"
    )
    assert "category | pairs" not in measured(marks[:2], IMAGE).markdown()


def test_the_histogram_counts_errors_in_sides():
    shares = [0.0, 0.024, 0.025, 0.1, 0.12, 0.31, 1.0, 7.0, math.nan]
    result = measured([marked([(100 * share, 0.0) for share in shares])], IMAGE)
    found = {low: count for (low, _), count in result.histogram().items()}
    assert found == {0.0: 2, 0.025: 1, 0.05: 0, 0.1: 2, 0.15: 0, 0.2: 0, 0.3: 1, 0.5: 0, 1.0: 3}
    assert result.histogram((0.0, 0.1, 0.5)) == {(0.0, 0.1): 3, (0.1, 0.5): 3}


def test_pairs_are_ranked_by_their_own_pck_and_then_by_their_distances():
    marks = [marked(offsets) for offsets in ([(90.0, 0.0)], [(1.0, 0.0)], [(2.0, 0.0), (80.0, 0.0)], [(0.5, 0.0)])]
    assert [errors.index for errors in measured(marks, IMAGE).ranked()] == [3, 1, 2, 0]


def test_features_are_carried_to_the_cells_of_the_same_grey():
    order = [5, 2, 7, 0, 1, 15, 3, 4, 6, 8, 10, 9, 11, 14, 12, 13]
    b = mosaic(order)
    centres = read_mosaic(b).grid.centres()
    cells = [0, 5, 9, 15]
    found = torch.stack([centres[order.index(cell)] for cell in cells])
    truth = found + torch.tensor([[0.0, 0.0], [3.0, 4.0], [0.0, 5.01], [-6.0, 8.0]])
    asked = centres[cells] + torch.tensor([[3.0, -3.0], [0.0, 0.0], [-3.9, 3.9], [1.0, 1.0]])  # anywhere in the cell
    pair = Pair(mosaic(range(16)), b, asked, truth.clamp_min(0), "mosaic", box_b=(0.0, 0.0, 50.0, 20.0))
    assert truth.equal(pair.points_b)
    result = evaluate_pck(read_mosaic, None, [pair], protocol=replace(BOX, thresholds=(0.1, 0.2, 0.11)))
    assert torch.tensor(result.pairs[0].predicted).float().equal(found)
    assert [result.pck(t) for t in (0.1, 0.2, 0.11)] == [0.5, 1.0, 0.75]
    assert result.under(strict=True).pck() == 0.25
    assert (result.name, result.dataset) == ("features", "list")


@pytest.mark.usefixtures("as_a_user")
def test_another_choice_needs_a_new_run_and_another_mean_a_name():
    result = measured([marked(OFFSETS)], IMAGE)
    with pytest.raises(
        ConfigError,
        match="expected changes of reference, thresholds, strict, mean, visible_only, got 'size', which needs a new",
    ):
        result.under(size=224)
    with pytest.raises(ConfigError, match="expected a mean of keypoint, image, category, category_keypoint, got 'sum'"):
        result.pck(mean="sum")
    with pytest.raises(ConfigError, match="expected a box for PCK@bbox, but pair 0 .* use reference='image'"):
        result.under(reference="box").pck()


# Laws -----------------------------------------------------------------------------------------------------------------

halves = st.integers(-40, 240).map(lambda twice: twice / 2)
spots = st.lists(st.tuples(halves, halves, halves, halves), min_size=1, max_size=8)
shares = st.sampled_from([0.02, 0.1, 0.15, 0.33])


def apart(rows: list[tuple[float, ...]]) -> tuple[Tensor, Tensor]:
    both = torch.tensor(rows)
    return both[:, :2], both[:, 2:]


def judged(predicted: Tensor, target: Tensor, size: tuple[int, int], **choices) -> PckResult:
    """Return the result of one pair whose points were carried there."""
    distances = tuple((predicted.double() - target.double()).norm(dim=1).tolist())
    spread = target.max(0).values - target.min(0).values
    errors = PairErrors(0, "", "", (), distances, (True,) * len(target), float(max(size)), float(spread.max()))
    return PckResult("", "", PckProtocol(**choices), (errors,))


@given(spots, shares, st.booleans(), st.sampled_from(["box", "image"]))
@settings(max_examples=60, deadline=None)
def test_mirroring_and_scaling_both_images_change_nothing(rows, share, strict, reference):
    predicted, target = apart(rows)
    choices = {"strict": strict, "reference": reference}
    expected = judged(predicted, target, (90, 120), **choices)

    def moved(change: Callable[[Tensor], Tensor], size: tuple[int, int]) -> None:
        other = judged(change(predicted), change(target), size, **choices)
        assert other.pck(share) == expected.pck(share)
        assert list(other.histogram().values()) == list(expected.histogram().values())
        if reference == "image":
            found = pck(change(predicted), change(target), size, alpha=share, strict=strict)
            assert found == pytest.approx(expected.pck(share))

    moved(lambda points: points, (90, 120))
    moved(lambda points: torch.tensor([120.0, 0.0]) + points * torch.tensor([-1.0, 1.0]), (90, 120))
    moved(lambda points: points.flip(1), (120, 90))
    moved(lambda points: 4 * points, (360, 480))
    moved(lambda points: points / 8, (90 / 8, 120 / 8))


@given(spots, st.booleans())
@settings(max_examples=60, deadline=None)
def test_more_is_correct_at_larger_thresholds_and_less_where_strict(rows, strict):
    predicted, target = apart(rows)
    result = judged(predicted, target, (90, 120), strict=strict, reference="image")
    steps = [0.01, 0.05, 0.1, 0.11, 0.25, 0.5, 1.0, 5.0]
    found = [result.pck(step) for step in steps]
    assert found == sorted(found)
    assert found == [pytest.approx(pck(predicted, target, (90, 120), alpha=step, strict=strict)) for step in steps]
    if strict:
        assert all(
            one <= loose for one, loose in zip(found, [result.under(strict=False).pck(s) for s in steps], strict=True)
        )


@given(spots)
@settings(max_examples=30, deadline=None)
def test_a_perfect_prediction_scores_1(rows):
    _, target = apart(rows)
    for strict in (False, True):
        assert judged(target, target, (90, 120), strict=strict, reference="image").every_mean(1e-6) == dict.fromkeys(
            MEANS, 1.0
        )


def test_a_shuffled_prediction_scores_chance():
    generator = torch.Generator().manual_seed(0)
    target = torch.rand(12, 2, generator=generator) * 100
    # Each of the 12! orders is as likely, so each point meets each target with the same chance.
    near = (target[:, None] - target[None]).norm(dim=2) <= 30
    chance = float(near.double().mean())
    assert 0.15 < chance < 0.6
    found = []
    for _ in range(500):
        shuffled = target[torch.randperm(12, generator=generator)]
        found.append(judged(shuffled, target, (100, 80), reference="image").pck(0.3))
        assert found[-1] == pytest.approx(pck(shuffled, target, (100, 80), alpha=0.3))
    values = torch.tensor(found)
    assert abs(float(values.mean()) - chance) < 5 * float(values.std()) / math.sqrt(len(found))


# Carrying points ------------------------------------------------------------------------------------------------------

SHAPES = [
    # rows and columns, patch, stride, source (height, width) of a; the same of b
    ((4, 5, 8, 8, (33, 41)), (5, 4, 8, 8, (40, 32))),
    ((6, 4, 8, 4, (28, 20)), (5, 7, 8, 4, (51, 35))),
    ((1, 6, 8, 8, (9, 50)), (6, 1, 8, 8, (47, 7))),
    ((1, 1, 8, 8, (13, 8)), (3, 4, 8, 2, (24, 32))),
]


def both(shapes, dim: int = 6) -> tuple[Descriptor, Descriptor]:
    a, b = (
        random_descriptor(seed, rows, cols, dim, patch=patch, stride=stride, source=source)
        for seed, (rows, cols, patch, stride, source) in enumerate(shapes)
    )
    return a, b


def points_in(d: Descriptor, count: int = 12) -> Tensor:
    height, width = d.frames[0].source_size
    inside = torch.rand(count, 2, generator=torch.Generator().manual_seed(7))
    inside = torch.cat([inside, torch.tensor([[0.0, 0.0], [1.0, 1.0], [1.0, 0.0], [0.0, 1.0]])])
    return inside * torch.tensor([width, height])


def cosine(one: Tensor, other: Tensor) -> float:
    lengths = float(one.norm() * other.norm())
    return float(one @ other) / lengths if lengths else 0.0


@pytest.mark.parametrize("shapes", SHAPES)
def test_cell_is_the_nearest_cell_and_then_the_most_similar_one(shapes):
    a, b = both(shapes)
    points = points_in(a)
    found = carry_points(a, b, points)
    for point, carried in zip(points, found, strict=True):
        at = a.frames[0].to_network(point[None])[0]
        nearest = min(range(a.grid.tokens), key=lambda cell: float((a.grid.centres()[cell] - at).norm()))
        alike = [cosine(a.features[0, nearest], other) for other in b.features[0]]
        best = max(range(b.grid.tokens), key=lambda cell: alike[cell])
        assert torch.allclose(carried, b.frames[0].to_source(b.grid.centres()[best : best + 1])[0])


def assert_as_naive(a: Descriptor, b: Descriptor, points: Tensor, sizes, found: Tensor) -> None:
    """Compare with maps that are enlarged whole: what was found must be the centre of a most similar pixel."""
    (height_a, width_a), (height_b, width_b) = sizes
    dense_a, dense_b = vf.upsample(a, sizes[0]), vf.upsample(b, sizes[1])
    source_a, source_b = (torch.tensor(d.frames[0].source_size[::-1]) for d in (a, b))
    asked = (points / source_a * torch.tensor([width_a, height_a])).floor().long()
    asked = asked.clamp_max(torch.tensor([width_a - 1, height_a - 1]))
    pixels = found / source_b * torch.tensor([width_b, height_b]) - 0.5
    assert torch.allclose(pixels, pixels.round(), atol=1e-3)
    col, row = pixels.round().long().T
    assert ((col >= 0) & (col < width_b) & (row >= 0) & (row < height_b)).all()
    alike = unit(dense_a.features[0, asked[:, 1] * width_a + asked[:, 0]]) @ unit(dense_b.features[0]).T
    chosen = alike[torch.arange(len(points)), row * width_b + col]
    assert torch.allclose(chosen, alike.max(1).values, atol=2e-6)


@pytest.mark.parametrize("shapes", SHAPES)
@pytest.mark.parametrize("enlarged", ["source", "network", 19, (23, 31)])
def test_map_is_the_most_similar_pixel_of_the_enlarged_maps(shapes, enlarged):
    a, b = both(shapes)
    points = points_in(a)
    found = carry_points(a, b, points, predict="map", enlarged=enlarged)

    def size_of(d: Descriptor) -> tuple[int, int]:
        if enlarged == "source":
            return d.frames[0].source_size
        if enlarged == "network":
            return d.frames[0].network_size
        return vf.upsample(d, enlarged).grid.network_size

    assert_as_naive(a, b, points, [size_of(a), size_of(b)], found)


def test_map_goes_on_where_one_block_of_points_ends(monkeypatch):
    a, b = both(SHAPES[0])
    points = points_in(a)
    whole = carry_points(a, b, points, predict="map")
    monkeypatch.setattr("vitfeats.apps.evaluation.carrying.CHUNK_BYTES", 5 * 40 * 32 * 4)
    assert carry_points(a, b, points, predict="map").equal(whole)


def test_the_pixel_of_an_image_with_itself_is_the_pixel():
    a, _ = both(SHAPES[0], dim=30)
    # Between the outermost centres features change from pixel to pixel.
    points = torch.tensor([[7.5, 9.5], [20.5, 14.5], [30.2, 20.9], [12.0, 25.0]])
    expected = points.floor() + 0.5
    assert torch.allclose(carry_points(a, a, points, predict="map"), expected)


class Largest(TorchDispatchMode):
    """Notes the numbers of the largest tensor that is made."""

    numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for one in made if isinstance(made, tuple | list) else [made]:
            if isinstance(one, Tensor):
                self.numbers = max(self.numbers, one.numel())
        return made


def test_map_never_makes_the_enlarged_map():
    dim, height, width = 256, 160, 200
    a, b = both((SHAPES[0][0], (8, 10, 8, 8, (height, width))), dim=dim)
    points = points_in(a)
    with as_users_run(), Largest() as naive:
        vf.upsample(b, (height, width))
    assert naive.numbers >= dim * height * width
    with as_users_run(), Largest() as made:
        carry_points(a, b, points, predict="map")
    assert made.numbers <= len(points) * height * width * 1.01


def test_features_of_zero_are_alike_to_nothing():
    a, b = both(SHAPES[0])
    points = points_in(a)
    some = b.features.clone()
    some[0, ::2] = 0
    for other in (replace(b, features=torch.zeros_like(b.features)), replace(b, features=some)):
        for one in (a, replace(a, features=torch.zeros_like(a.features))):
            for predict in ("cell", "map", "window"):
                found = carry_points(one, other, points, predict=predict)
                assert found.isfinite().all()
                assert (found >= 0).all()
                assert (found <= torch.tensor([32.0, 40.0])).all()
                if predict == "map":
                    assert_as_naive(one, other, points, [(33, 41), (40, 32)], found)


@pytest.mark.parametrize("predict", ["cell", "map"])
def test_points_on_the_far_edges_belong_to_the_last_cell_and_pixel(predict):
    a, b = both(SHAPES[0])
    edges = torch.tensor([[41.0, 33.0], [41.0, 10.2], [20.2, 33.0], [0.0, 0.0]])
    inside = torch.tensor([[40.5, 32.5], [40.5, 10.5], [20.5, 32.5], [0.5, 0.5]])
    assert carry_points(a, b, edges, predict=predict).equal(carry_points(a, b, inside, predict=predict))


@pytest.mark.parametrize("predict", ["cell", "map", "window"])
def test_what_cannot_be_carried_is_refused(predict):
    a, b = both(SHAPES[0])
    for point in ((41.1, 5.0), (5.0, 33.1), (-0.1, 5.0)):
        with pytest.raises(ShapeError, match=r"expected points \(x, y\) inside the image of 41×33 pixels"):
            carry_points(a, b, [point], predict=predict)
    with pytest.raises(ShapeError, match="expected descriptors with as many channels, got 6"):
        carry_points(a, random_descriptor(1, dim=7), [(1.0, 1.0)], predict=predict)
    with pytest.raises(ShapeError, match="one image"):
        carry_points(a, random_descriptor(1, dim=6, batch=2), [(1.0, 1.0)], predict=predict)
    assert carry_points(a, b, torch.zeros(0, 2), predict=predict).shape == (0, 2)


def test_a_way_of_carrying_that_does_not_exist_is_refused():
    a, b = both(SHAPES[0])
    with as_users_run(), pytest.raises(ConfigError, match="expected predict 'cell', 'map' or 'window', got 'soft'"):
        carry_points(a, b, [(1.0, 1.0)], predict="soft")


def test_window_is_the_soft_argmax_of_transfer_points():
    a, b = both(SHAPES[1])
    points = points_in(a)
    expected = vf.transfer_points(a, b, points, refine="window")
    assert carry_points(a, b, points, predict="window").equal(expected)
    assert not carry_points(a, b, points).equal(expected)


# Describing -----------------------------------------------------------------------------------------------------------


def test_the_cosine_of_what_is_joined_is_the_mean_of_cosines():
    one = [random_descriptor(seed, dim=dim) for seed, dim in ((0, 5), (1, 9), (2, 3))]
    other = [random_descriptor(seed, dim=dim) for seed, dim in ((3, 5), (4, 9), (5, 3))]
    loud = [replace(d, features=100 * d.features) if d.dim == 9 else d for d in one]
    cosines = torch.stack([cosine_similarity(a, b) for a, b in zip(one, other, strict=True)])
    for parts in (one, loud):
        assert torch.allclose(cosine_similarity(joined(parts), joined(other)), cosines.mean(0), atol=1e-6)
    weights = (0.5, 2.0, 1.0)
    squares = torch.tensor(weights) ** 2
    expected = (cosines * squares[:, None, None, None]).sum(0) / squares.sum()
    found = cosine_similarity(joined(one, weights=weights), joined(other, weights=weights))
    assert torch.allclose(found, expected, atol=1e-6)
    assert not torch.allclose(expected, cosines.mean(0), atol=1e-2)


def test_descriptors_are_joined_on_the_finest_of_their_grids():
    source = (33, 41)
    coarse = random_descriptor(0, 2, 3, 5, patch=16, source=source)
    fine = random_descriptor(1, 5, 7, 4, patch=8, stride=4, source=source, tap="token@2", heads=2)
    fine = replace(fine, cls=torch.rand(1, 4), registers=torch.rand(1, 2, 4), model="other")
    centres = fine.frames[0].to_source(fine.grid.centres())
    expected = torch.cat([unit(coarse.at(centres)[0]), unit(fine.features[0])], 1)
    found = joined([coarse, fine])
    assert torch.allclose(found.features[0], expected, atol=1e-6)
    assert (found.grid, found.frames, found.tap) == (fine.grid, fine.frames, fine.tap)
    assert (found.model, found.cls, found.registers, found.heads) == ("synthetic + other", None, None, None)
    swapped = joined([fine, coarse])
    assert torch.allclose(swapped.features[0], expected.roll(4, 1), atol=1e-6)
    assert joined([coarse]).features[0].norm(dim=1).allclose(torch.ones(6))


def test_what_cannot_be_joined_is_refused():
    a = random_descriptor(0)
    with pytest.raises(ShapeError, match="expected at least one descriptor to join, got none"):
        joined([])
    with pytest.raises(ShapeError, match=r"expected descriptors of one source image, got images of \[\(30, 40\), \(32"):
        joined([a, random_descriptor(1, source=(30, 40))])
    with pytest.raises(ShapeError, match="expected a weight for each of 2 descriptors, got 1"):
        joined([a, a], weights=[1.0])
    with pytest.raises(ShapeError, match="one image"):
        joined([a, random_descriptor(1, batch=2)])


def test_several_taps_are_read_in_one_pass_and_joined(mini, monkeypatch):
    image = picture(60, 90)
    passes, read = [], type(mini).read
    monkeypatch.setattr(type(mini), "read", lambda *asked: passes.append(1) or read(*asked))
    found = describe_with(mini, ("key@9", "token@11"))(image)
    assert len(passes) == 1
    expected = joined([mini(image, "key@9"), mini(image, "token@11")])
    assert torch.allclose(found.features, expected.features, atol=1e-5)
    assert describe_with(mini, "key@9")(image).features.equal(mini(image, "key@9").features)
    assert describe_with(mini, Tap.parse("key@9"))(image).features.equal(mini(image, "key@9").features)
    assert describe_with(mini)(image).features.equal(mini(image).features)


def test_what_is_fused_is_joined_and_the_image_is_read_once(mini, tmp_path):
    image = picture(60, 90)
    vf.preprocess.to_pil(image).save(tmp_path / "image.png")
    shown = []

    def one(given):
        shown.append(given)
        return mini(given, "key@9")

    coarse = describe_with(mini.resized(size=64), "token@11")
    found = fused([one, coarse], weights=(2.0, 1.0))(tmp_path / "image.png")
    expected = joined([mini(tmp_path / "image.png", "key@9"), coarse(tmp_path / "image.png")], weights=(2.0, 1.0))
    assert torch.allclose(found.features, expected.features, atol=1e-6)
    assert isinstance(shown[0], Tensor)


@pytest.mark.parametrize("dim", [1, 3, 9])
def test_a_joint_pca_is_the_projection_of_a_singular_value_decomposition(dim):
    a, b = random_descriptor(0, 4, 5, 12), random_descriptor(1, 5, 4, 12)
    scale = torch.linspace(0.3, 3, 12)  # components of different sizes
    a, b = (replace(d, features=d.features * scale + 0.5) for d in (a, b))
    found = joint_pca(dim)(a, b)
    together = torch.cat([a.features[0], b.features[0]]).double().numpy()
    together -= together.mean(0)
    projected = TruncatedSVD(dim, algorithm="arpack", random_state=0).fit_transform(together)
    first, second = torch.from_numpy(projected).float().split([20, 20])
    assert [d.dim for d in found] == [dim, dim]
    assert torch.allclose(cosine_similarity(*found)[0], unit(first) @ unit(second).T, atol=1e-4)
    assert (found[0].grid, found[1].frames, found[0].heads) == (a.grid, b.frames, None)
    again = joint_pca(dim)(a, b)
    assert all(one.features.equal(other.features) for one, other in zip(found, again, strict=True))


def test_all_components_keep_every_cosine_about_the_mean():
    a, b = random_descriptor(0, dim=12), random_descriptor(1, dim=12)
    mean = torch.cat([a.features[0], b.features[0]]).mean(0)
    a, b = (replace(d, features=d.features - mean) for d in (a, b))
    for dim in (12, 256):
        found = joint_pca(dim)(a, b)
        assert [d.dim for d in found] == [12, 12]
        assert torch.allclose(cosine_similarity(*found), cosine_similarity(a, b), atol=1e-5)
    assert not torch.allclose(cosine_similarity(*joint_pca(2)(a, b)), cosine_similarity(a, b), atol=1e-2)
    with pytest.raises(ConfigError, match="expected dim of at least 1, got 0"):
        joint_pca(0)


def test_a_joint_pca_has_no_more_components_than_there_are_tokens():
    a, b = random_descriptor(0, 1, 2, 30), random_descriptor(1, 1, 3, 30)
    assert [d.dim for d in joint_pca(20)(a, b)] == [5, 5]


def test_a_joint_pca_of_other_channels_is_refused():
    with pytest.raises(ShapeError, match="expected descriptors with as many channels, got 8"):
        joint_pca(2)(random_descriptor(0, dim=8), random_descriptor(1, dim=7))


def test_what_was_kept_is_not_made_again(tmp_path):
    made = []

    def slow(image):
        made.append(image)
        return read_mosaic(image)

    one, other = mosaic(range(16)), mosaic(range(1, 17))
    quick = keep_in(tmp_path / "deep" / "cache", slow, "print")
    first = [quick(one), quick(other)]
    assert len(made) == 2
    for remembered in (quick, keep_in(tmp_path / "deep" / "cache", slow, "print")):
        for image, before in zip((one, other), first, strict=True):
            again = remembered(image)
            assert again.features.equal(before.features)
            assert (again.grid, again.frames, again.tap, again.model) == (
                *(before.grid, before.frames),
                *(before.tap, before.model),
            )
    assert len(made) == 2
    vf.preprocess.to_pil(one).save(tmp_path / "one.png")
    made.clear()
    quick(tmp_path / "one.png")
    quick(tmp_path / "one.png")
    assert len(made) <= 1
    made.clear()
    keep_in(tmp_path / "deep" / "cache", slow, "another print")(one)
    assert len(made) == 1


def test_a_damaged_file_is_made_again(tmp_path):
    made = []

    def slow(image):
        made.append(image)
        return read_mosaic(image)

    image = mosaic(range(16))
    keep_in(tmp_path, slow, "print")(image)
    (file,) = tmp_path.glob("*/*.safetensors")
    whole = file.read_bytes()
    for damaged in (b"", whole[:40], whole[:-7], b"not one at all" * 9):
        file.write_bytes(damaged)
        assert keep_in(tmp_path, slow, "print")(image).features.equal(read_mosaic(image).features)
        assert Descriptor.load(file).features.equal(read_mosaic(image).features)
    assert len(made) == 5
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match="expected a folder for features at '.*file/.*', but: "):
        keep_in(tmp_path / "file", slow, "print")


def test_a_fingerprint_is_that_of_the_same_features_alone(mini):
    usual = fingerprint_of(mini, "key@11")
    assert fingerprint_of(copy.copy(mini), "key@11") == fingerprint_of(mini, Tap.parse("key@11")) == usual
    assert fingerprint_of(vf.load_extractor("mini", size=112, device="cpu"), "key@11") == usual
    network = copy.deepcopy(mini.model)
    with torch.no_grad():
        next(iter(network.parameters())).add_(0.01)
    changed = copy.copy(mini)
    changed.model = network
    others = [
        fingerprint_of(mini, "key@10"),
        fingerprint_of(mini, None),
        fingerprint_of(mini, ("key@11", "key@10")),
        fingerprint_of(mini.resized(size=64), "key@11"),
        fingerprint_of(mini.resized(stride=8), "key@11"),
        fingerprint_of(vf.load_extractor("mini", size=112, device="cpu", norm=True), "key@11"),
        fingerprint_of(vf.load_extractor("mini", size=112, device="cpu", dtype="bfloat16"), "key@11"),
        fingerprint_of(changed, "key@11"),
    ]
    assert len({usual, *others}) == 1 + len(others)


def test_a_list_of_one_tap_is_joined_and_has_a_fingerprint_of_its_own(mini):
    image = picture(60, 90)
    alone, listed = describe_with(mini, "key@11")(image), describe_with(mini, ["key@11"])(image)
    assert not torch.allclose(alone.features, listed.features)  # which has tokens of length 1
    assert fingerprint_of(mini, "key@11") != fingerprint_of(mini, ["key@11"])


# Evaluating -----------------------------------------------------------------------------------------------------------


def test_a_protocol_says_at_which_size_images_are_read():
    pairs = drawn_pairs(1)
    pair = replace_images(pairs[0], picture(20, 50), picture(40, 30, seed=1))

    def shown(protocol) -> list[tuple[int, int]]:
        extractor = Colours()
        evaluate_pck(extractor, "out@last", [pair], protocol=protocol)
        return [(batch.pixels.shape[2], batch.pixels.shape[3]) for batch in extractor.seen]

    assert shown("spair") == [(32, 80), (40, 32)]  # its own: the shorter side is 32
    assert shown("hyperfeatures") == [(224, 224)] * 2
    assert shown(PckProtocol.preset("dift", size=64)) == [(64, 160), (88, 64)]
    assert shown(PckProtocol.preset("sd_dino", size=48)) == [(48, 48)] * 2
    assert PckProtocol.preset("dift").size == (768, 768)
    assert PckProtocol.preset("sd_dino").size == 840


def replace_images(pair: Pair, a: Tensor, b: Tensor, **facts) -> Pair:
    """Return a pair with other images, its points drawn anew inside them."""
    generator = torch.Generator().manual_seed(3)
    points = [torch.rand(5, 2, generator=generator) * torch.tensor([i.shape[2], i.shape[1]]) for i in (a, b)]
    return Pair(a, b, *points, pair.name, category=pair.category, box_b=pair.box_b, **facts)


def test_a_protocol_says_how_points_are_carried(mini):
    pairs = drawn_pairs(2)
    changes = {
        "spair": ({}, {"predict": "cell"}),
        "hyperfeatures": ({"size": (64, 48)}, {"predict": "map", "enlarged": (64, 48)}),
        "dift": ({"size": (64, 48)}, {"predict": "map", "enlarged": "source"}),
    }
    found = {}
    for name, (changed, carried) in changes.items():
        result = evaluate_pck(mini, "key@11", pairs, protocol=PckProtocol.preset(name, **changed))
        reads = mini.resized(**changed)
        for errors, pair in zip(result.pairs, pairs, strict=True):
            a, b = reads(pair.image_a, "key@11"), reads(pair.image_b, "key@11")
            expected = carry_points(a, b, pair.points_a, **carried)
            assert torch.allclose(torch.tensor(errors.predicted).float(), expected)
        found[name] = result.pairs[0].predicted
    assert len(set(found.values())) == 3
    assert result.name == "mini key@11"
    assert result.protocol == PckProtocol.preset("dift", size=(64, 48))


def test_padding_moves_points_into_the_square_and_back():
    a, b = picture(20, 50), picture(41, 30, seed=1)
    pair = replace_images(drawn_pairs(1)[0], a, b)
    shown = []

    def method(image_a, image_b, points):
        shown.append((image_a, image_b, points))
        return points + torch.tensor([1.0, 2.0])

    result = evaluate_method(method, [pair], protocol=PckProtocol(pad=True, reference="image"))
    ((image_a, image_b, points),) = shown
    assert image_a.shape == (3, 50, 50)
    assert image_b.shape == (3, 41, 41)
    assert image_a[:, 15:35].equal(a)
    assert image_b[:, :, 5:35].equal(b)
    assert image_a.sum() == pytest.approx(float(a.sum()), rel=1e-5)  # and black elsewhere
    assert image_b.sum() == pytest.approx(float(b.sum()), rel=1e-5)
    assert points.equal(pair.points_a + torch.tensor([0.0, 15.0]))
    moved = pair.points_a + torch.tensor([1.0 - 5.0, 2.0 + 15.0])
    assert torch.allclose(torch.tensor(result.pairs[0].predicted).float(), moved, atol=1e-5)
    distances = (moved - pair.points_b).norm(dim=1)
    assert result.pairs[0].distances == pytest.approx(distances.tolist(), rel=1e-5)
    assert result.pairs[0].image_side == 41.0  # of the image as it was


def test_a_padded_pair_of_an_image_with_itself_is_answered_in_its_own_pixels():
    image = mosaic(range(1, 25), 4, 6)  # none is black
    centres = read_mosaic(image).grid.centres()
    pair = Pair(image, image, centres, centres)
    result = evaluate_pck(read_mosaic, None, [pair], protocol=PckProtocol(pad=True, reference="image"))
    assert result.pck(1e-6) == 1.0


def test_a_subset_is_drawn_with_its_seed_and_in_order():
    pairs = drawn_pairs(12)

    def chosen(**drawn) -> list[int]:
        return [errors.index for errors in evaluate_method(same_place, pairs, protocol=IMAGE, **drawn).pairs]

    first = chosen(subset=5, seed=0)
    assert first == chosen(subset=5, seed=0) == sorted(set(first))
    assert len(first) == 5
    assert any(chosen(subset=5, seed=seed) != first for seed in (1, 2, 3))
    assert chosen() == chosen(subset=12) == list(range(12))
    torch.manual_seed(0)
    before = torch.get_rng_state()
    chosen(subset=3)
    assert torch.get_rng_state().equal(before)
    for wrong in (0, 13, -1):
        with pytest.raises(ConfigError, match=f"expected a subset of 1 to 12 pairs, got {wrong}"):
            chosen(subset=wrong)
    result = evaluate_method(same_place, pairs, protocol=IMAGE, subset=4, seed=1)
    assert [errors.name for errors in result.pairs] == [pairs[errors.index].name for errors in result.pairs]


def test_a_transform_changes_what_is_compared(mini):
    pairs = drawn_pairs(2)
    binned = evaluate_pck(mini, "key@11", pairs, transform=lambda a, b: (vf.log_bin(a), vf.log_bin(b)))
    plain = evaluate_pck(mini, "key@11", pairs)
    by_hand = evaluate_pck(lambda image: vf.log_bin(mini(image, "key@11")), None, pairs)
    assert binned.pairs == by_hand.pairs != plain.pairs
    reduced = evaluate_pck(mini, "key@11", pairs, transform=joint_pca(2))
    assert reduced.pairs != plain.pairs
    kept = evaluate_pck(mini, "key@11", pairs, transform=joint_pca(4096))
    assert kept.pck() == pytest.approx(plain.pck(), abs=0.2)


def test_a_function_is_measured_as_an_extractor_is(mini):
    pairs = drawn_pairs(2)
    expected = evaluate_pck(mini, ["key@9", "token@11"], pairs)
    assert expected.name == "mini key@9 + token@11"
    found = evaluate_pck(describe_with(mini, ["key@9", "token@11"]), None, pairs, name="a function")
    assert (found.name, found.pairs) == ("a function", expected.pairs)
    assert evaluate_pck(mini, None, pairs[:1]).name == f"mini {mini.card.default_tap}"
    for tap, cache in (("key@9", None), (None, "folder")):
        with pytest.raises(ConfigError, match="expected tap=None and no cache with a function, which reads as it does"):
            evaluate_pck(describe_with(mini, "key@9"), tap, pairs, cache=cache)


def test_a_cache_changes_nothing_and_is_read(mini, tmp_path, monkeypatch):
    pairs = drawn_pairs(2)
    plain = evaluate_pck(mini, "key@11", pairs)
    assert same(evaluate_pck(mini, "key@11", pairs, cache=tmp_path), plain)
    other = PckProtocol(predict="map", reference="image")
    expected = evaluate_pck(mini, "key@11", pairs, protocol=other)

    def read(*_given):
        raise AssertionError("the network was asked again")

    monkeypatch.setattr(type(mini), "read", read)
    assert same(evaluate_pck(mini, "key@11", pairs, cache=tmp_path), plain)
    assert same(evaluate_pck(mini, "key@11", pairs, protocol=other, cache=tmp_path), expected)
    with pytest.raises(AssertionError, match="asked again"):
        evaluate_pck(mini, "key@10", pairs, cache=tmp_path)


@pytest.mark.usefixtures("as_a_user")
def test_pairs_that_do_not_do_are_named(mini):
    good = drawn_pairs(1)[0]
    outside = Pair(good.image_a, good.image_b, [(500.0, 3.0)], [(1.0, 1.0)], "far", box_b=good.box_b)
    with pytest.raises(ShapeError, match=r"pair 1 \('far'\): expected points \(x, y\) inside the image"):
        evaluate_pck(mini, "key@11", [good, outside])
    unboxed = Pair(good.image_a, good.image_b, [(5.0, 3.0)], [(1.0, 1.0)], "no box")
    with pytest.raises(ConfigError, match=r"expected a box for PCK@bbox, but pair 0 \('no box'\) has none"):
        evaluate_pck(mini, "key@11", [unboxed])
    for answer, got in ((torch.zeros(3, 2), r"\(3, 2\)"), (torch.zeros(4, 3), r"\(4, 3\)"), ([(0.0, 0.0)] * 4, "list")):
        with pytest.raises(ShapeError, match=rf"expected 4 points \(n, 2\) for pair 0 \('pair 0'\), got {got}"):
            evaluate_method(lambda *_given, _answer=answer: _answer, [good])
    with pytest.raises(TapError, match="expected a layer from 0 to 11"):
        evaluate_pck(mini, "key@99", [good])
    with pytest.raises(ConfigError, match="expected a preset, got 'spare'. Did you mean 'spair'"):
        evaluate_pck(mini, "key@11", [good], protocol="spare")
    assert count_hooks(mini.model) == 0


def test_an_image_that_cannot_be_read_names_its_pair(tmp_path):
    good = drawn_pairs(1)[0]
    gone = Pair(tmp_path / "none.png", good.image_b, [(5.0, 3.0)], [(1.0, 1.0)], "gone", box_b=good.box_b)
    with pytest.raises(ImageError, match=r"none\.png"):
        evaluate_method(same_place, [good, gone])
    with pytest.raises(ImageError, match=r"pair 1 \('gone'\)"):
        evaluate_method(same_place, [good, gone])


def test_no_hooks_and_no_random_numbers_are_left_behind(mini):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    evaluate_pck(mini, ["key@11", "token@3"], drawn_pairs(1))
    assert count_hooks(mini.model) == 0
    assert torch.get_rng_state().equal(before)


@pytest.mark.usefixtures("as_a_user")  # the checks of the test run look at pairs, too
def test_one_pair_is_held_at_a_time():
    alive: set[int] = set()
    most = []

    class Counted(Sequence):
        def __len__(self):
            return 6

        def __getitem__(self, index):
            if not 0 <= index < 6:
                raise IndexError(index)
            images = [picture(24, 32, seed=10 * index + side) for side in range(2)]
            for number, image in enumerate(images):
                alive.add(10 * index + number)
                weakref.finalize(image, alive.discard, 10 * index + number)
            most.append(len(alive))
            return Pair(*images, [(5.0, 3.0)], [(1.0, 1.0)], box_b=(0.0, 0.0, 5.0, 5.0))

    evaluate_pck(Colours(), None, Counted())
    assert most == [2] * 6
    assert not alive


def test_progress_is_shown_when_it_is_wanted_and_on_standard_error(capsys):
    evaluate_method(same_place, drawn_pairs(2))
    assert capsys.readouterr() == ("", "")
    evaluate_method(same_place, drawn_pairs(2), name="nobody", progress=True)
    said = capsys.readouterr()
    assert not said.out
    assert "nobody" in said.err
    assert "2/2" in said.err


def test_the_same_place_is_that_of_an_image_stretched_over_the_other():
    a, b = torch.zeros(3, 20, 40), torch.zeros(3, 60, 10)
    found = same_place(a, b, torch.tensor([[0.0, 0.0], [40.0, 20.0], [10.0, 5.0]]))
    assert found.tolist() == [[0.0, 0.0], [10.0, 60.0], [2.5, 15.0]]


# Pictures -------------------------------------------------------------------------------------------------------------


def test_pairs_are_drawn_once_and_also_where_answers_are_nowhere():
    pairs = drawn_pairs(3)
    result = evaluate_method(same_place, pairs, protocol=IMAGE)
    one, every = draw_pairs(result, pairs, best=1, worst=0), draw_pairs(result, pairs, best=2, worst=2)
    assert one.width > 100
    assert every.height > 2 * one.height
    assert draw_pairs(result, pairs, best=3, worst=3).tobytes() == every.tobytes()
    lost = evaluate_method(lambda a, b, p: torch.full_like(p, math.nan), pairs, protocol=IMAGE)
    assert draw_pairs(lost, pairs, best=1, worst=0).width > 100
    with pytest.raises(ConfigError, match="got none to draw"):
        draw_pairs(result, pairs, best=0, worst=0)


def test_answers_at_infinity_are_drawn_too():
    pairs = drawn_pairs(1)
    lost = evaluate_method(lambda a, b, p: torch.full_like(p, math.inf), pairs, protocol=IMAGE)
    assert draw_pairs(lost, pairs).width > 100


def test_accuracy_is_a_line_for_each_method():
    pairs = drawn_pairs(2)
    one = evaluate_method(same_place, pairs, protocol=IMAGE, name="nobody")
    other = evaluate_method(lambda a, b, p: p, pairs, protocol=IMAGE, name="the same pixel")
    assert draw_accuracy([one]).tobytes() != draw_accuracy([one, other]).tobytes()
    with pytest.raises(ShapeError, match="expected at least one method, got none"):
        draw_accuracy([])


# Runs -----------------------------------------------------------------------------------------------------------------


class Breaking(Named):
    """Pairs of which one cannot be had; those that were asked for are noted."""

    breaks: int | None = None

    def __getitem__(self, index):
        self.asked = [*getattr(self, "asked", []), index]
        if index == self.breaks:
            raise RuntimeError("the disk was taken out")
        return super().__getitem__(index)


def shaky(image_a: Tensor, image_b: Tensor, points: Tensor) -> Tensor:
    """Answer by the colours of the images, now and then with nothing."""
    found = points + 20 * (image_a.mean() - image_b.mean())
    return torch.where(found > 30, math.nan, found)


@pytest.mark.usefixtures("as_a_user")  # the checks of the test run look at pairs, too
def test_a_run_that_broke_off_measures_the_rest_alone(tmp_path):
    pairs = Breaking(drawn_pairs(9))
    expected = evaluate_method(shaky, pairs, protocol=IMAGE, out=tmp_path / "whole")
    assert any(math.isinf(d) for errors in expected.pairs for d in errors.distances)
    pairs.breaks, pairs.asked = 5, []
    with pytest.raises(RuntimeError, match="taken out"):
        evaluate_method(shaky, pairs, protocol=IMAGE, out=tmp_path / "run")
    assert pairs.asked == [0, 1, 2, 3, 4, 5]
    assert not (tmp_path / "run" / "pck.json").exists()
    pairs.breaks, pairs.asked = None, []
    found = evaluate_method(shaky, pairs, protocol=IMAGE, out=tmp_path / "run", resume=True)
    assert pairs.asked == [5, 6, 7, 8]
    assert same(found, expected)
    for name in ("pck.json", "history.jsonl", "run.json"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    pairs.asked = []
    assert same(evaluate_method(shaky, pairs, protocol=IMAGE, out=tmp_path / "run", resume=True), expected)
    assert not pairs.asked


@pytest.mark.usefixtures("as_a_user")  # the checks of the test run look at pairs, too
def test_a_subset_is_resumed_too(tmp_path):
    pairs = Breaking(drawn_pairs(9))
    expected = evaluate_method(shaky, pairs, protocol=IMAGE, subset=5, seed=4)
    order = [errors.index for errors in expected.pairs]
    pairs.breaks, pairs.asked = order[3], []
    with pytest.raises(RuntimeError, match="taken out"):
        evaluate_method(shaky, pairs, protocol=IMAGE, subset=5, seed=4, out=tmp_path)
    pairs.breaks, pairs.asked = None, []
    found = evaluate_method(shaky, pairs, protocol=IMAGE, subset=5, seed=4, out=tmp_path, resume=True)
    assert same(found, expected)
    assert pairs.asked == order[3:]


@pytest.mark.usefixtures("as_a_user")
@pytest.mark.parametrize("left", ["a cut line", "a cut record", "no line break", "another's line"])
def test_a_damaged_history_is_measured_again_where_it_is_damaged(tmp_path, left):
    pairs = Breaking(drawn_pairs(5))
    expected = evaluate_method(shaky, pairs, protocol=IMAGE, out=tmp_path)
    history = tmp_path / "history.jsonl"
    lines = history.read_text().splitlines(keepends=True)
    cut = {
        "a cut line": lines[3][: len(lines[3]) // 2],
        "a cut record": json.dumps({"step": 3, "index": 3, "name": "pair 3"}) + "\n",
        "no line break": lines[3].rstrip("\n"),
        "another's line": '{"step": 3, "loss": 0.5}\n',
    }[left]
    history.write_text("".join(lines[:3]) + cut)
    pairs.asked = []
    assert same(evaluate_method(shaky, pairs, protocol=IMAGE, out=tmp_path, resume=True), expected)
    assert pairs.asked == ([4] if left == "no line break" else [3, 4])
    # It can be read once more, whatever was left of the line.
    pairs.asked = []
    assert same(evaluate_method(shaky, pairs, protocol=IMAGE, out=tmp_path, resume=True), expected)
    assert not pairs.asked


def test_a_folder_with_a_run_is_refused_unless_it_is_resumed(tmp_path):
    pairs = drawn_pairs(2)
    evaluate_method(shaky, pairs, protocol=IMAGE, out=tmp_path / "run")
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    with pytest.raises(ConfigError, match=r"expected a folder without a run, but '.*run' has one; resume it \(resume="):
        evaluate_method(shaky, pairs, protocol=IMAGE, out=tmp_path / "run")
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "history.jsonl").write_text('{"step": 0, "loss": 1.0}\n')
    for resume in (False, True):
        with pytest.raises(ConfigError, match="expected a folder without another run, but '.*other' has one"):
            evaluate_method(shaky, pairs, protocol=IMAGE, out=tmp_path / "other", resume=resume)
    (tmp_path / "run" / "run.json").write_text("{")
    with pytest.raises(StoreError, match="expected the settings of a run at '.*run.json', but: "):
        evaluate_method(shaky, pairs, protocol=IMAGE, out=tmp_path / "run", resume=True)
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match="expected a folder to write to at"):
        evaluate_method(shaky, pairs, protocol=IMAGE, out=tmp_path / "file" / "run")


def test_resuming_where_nothing_began_begins(tmp_path):
    pairs = drawn_pairs(2)
    expected = evaluate_method(shaky, pairs, protocol=IMAGE)
    assert same(evaluate_method(shaky, pairs, protocol=IMAGE, out=tmp_path / "new", resume=True), expected)


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"name": "another"}, "method: 'method' there, 'another' here"),
        ({"fingerprint": "other weights"}, "fingerprint: 'da39a3ee5e6b4b0d' there, '[0-9a-f]{16}' here"),
        ({"subset": 2}, "subset: None there, 2 here"),
        (
            {"protocol": replace(IMAGE, predict="map")},
            "protocol: .*'predict': 'cell'.* there, .*'predict': 'map'.* here",
        ),
        ({"protocol": replace(IMAGE, size=(64, 48))}, r"protocol: .*'size': None.* there, .*'size': \[64, 48\].* here"),
        ({"protocol": replace(IMAGE, pad=True)}, "protocol: .*'pad': False.* there"),
        ({"dataset": Named(drawn_pairs(4))}, "pairs: 3 there, 4 here"),
        ({"dataset": list(drawn_pairs(3))}, "dataset: 'a few pairs' there, 'list' here"),
    ],
)
def test_a_run_of_other_settings_is_refused_by_their_names(tmp_path, changed, told):
    usual = {"dataset": drawn_pairs(3), "protocol": IMAGE}
    evaluate_method(shaky, **usual, out=tmp_path)
    with pytest.raises(ConfigError, match=f"but these differ: {told}"):
        evaluate_method(shaky, **(usual | changed), out=tmp_path, resume=True)


def test_the_errors_of_a_run_may_be_judged_in_another_way(tmp_path):
    pairs = drawn_pairs(3)
    evaluate_method(shaky, pairs, protocol=IMAGE, out=tmp_path)
    other = PckProtocol(reference="box", thresholds=(0.3,), strict=True, mean="image")

    def never(*_given):
        raise AssertionError("measured again")

    found = evaluate_method(never, pairs, protocol=other, out=tmp_path, resume=True)
    assert same(found, evaluate_method(shaky, pairs, protocol=other))


def test_features_of_other_weights_or_sizes_are_another_run(mini, tmp_path):
    pairs = drawn_pairs(1)
    evaluate_pck(mini, "key@11", pairs, out=tmp_path, name="mine")
    for extractor, tap in ((mini, "key@10"), (mini.resized(size=64), "key@11"), (mini.resized(stride=8), "key@11")):
        with pytest.raises(ConfigError, match="these differ: fingerprint: "):
            evaluate_pck(extractor, tap, pairs, out=tmp_path, name="mine", resume=True)
    with pytest.raises(ConfigError, match="these differ: fingerprint: "):
        evaluate_pck(mini, "key@11", pairs, transform=joint_pca(3), out=tmp_path, name="mine", resume=True)
    again = evaluate_pck(mini, "key@11", pairs, out=tmp_path, name="mine", resume=True)
    assert same(again, evaluate_pck(mini, "key@11", pairs, name="mine"))


def test_a_transform_with_other_settings_is_another_run(mini, tmp_path):
    pairs = drawn_pairs(1)
    evaluate_pck(mini, "key@11", pairs, transform=joint_pca(3), out=tmp_path)
    with pytest.raises(ConfigError, match="these differ: fingerprint: "):
        evaluate_pck(mini, "key@11", pairs, transform=joint_pca(5), out=tmp_path, resume=True)


def test_a_result_comes_back_from_its_file(tmp_path):
    marks = [
        marked([(math.nan, 0.0), (3.0, 4.0)], category="cat", name="ä", box_b=BOXED, visible=[False, True]),
        marked([(1 / 3, 0.1)], category="dog", box_b=(0.0, 0.0, 0.0, 0.0)),
    ]
    protocol = PckProtocol.preset("sd_dino", size=(64, 48), pad=False, thresholds=(0.1, 1 / 3))
    result = measured(marks, protocol, name="by hand", out=tmp_path)
    assert result.pairs[0].distances[0] == math.inf
    assert math.isnan(result.pairs[0].predicted[0][0])
    for found in (PckResult.load(tmp_path / "pck.json"), PckResult.load(result.save(tmp_path / "copy.json"))):
        assert same(found, result)
        assert found.as_dict()["by_category"] == result.as_dict()["by_category"]
    unboxed = measured([marked([(1.0, 0.0)])], IMAGE)
    assert same(PckResult.load(unboxed.save(tmp_path / "unboxed.json")), unboxed)

    def refused(constant: str):
        raise AssertionError(f"{constant} is no JSON")

    json.loads((tmp_path / "pck.json").read_text(), parse_constant=refused)


def test_answers_at_infinity_come_back_from_their_file(tmp_path):
    result = measured([marked([(math.inf, 0.0)])], IMAGE)
    assert same(PckResult.load(result.save(tmp_path / "pck.json")), result)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"format": "vitfeats.pck/1"}', '{"format": "vitfeats.pck/9"}', '{"format": "vitfeats.pck/1"'],
)
def test_a_file_that_is_no_result_is_refused(tmp_path, text):
    (tmp_path / "pck.json").write_text(text)
    with pytest.raises(StoreError, match="expected a result of evaluate_pck at '.*pck.json'"):
        PckResult.load(tmp_path / "pck.json")
    with pytest.raises(StoreError, match="expected a result of evaluate_pck at '.*none.json', but: "):
        PckResult.load(tmp_path / "none.json")


LONG_RUN = """
import sys, time, torch
from vitfeats.apps.evaluation import Pair, evaluate_method

class Synthetic(list):
    name = "400 synthetic pairs"

def number(seed, *shape):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))

pairs = Synthetic(
    Pair(number(n, 3, 8, 9), number(n + 400, 3, 8, 9), 8 * number(n + 800, 3, 2), 8 * number(n + 1200, 3, 2), str(n))
    for n in range(400)
)

def method(a, b, points):
    time.sleep(0.004)
    found = points + 9 * (a.mean() - b.mean())
    return torch.where(found > 7.5, torch.nan, found)

evaluate_method(method, pairs, protocol="hyperfeatures", out=sys.argv[1], resume=True)
"""


@pytest.mark.slow
def test_a_run_that_was_killed_loses_no_pair_and_has_none_twice(tmp_path):
    def start(name: str) -> subprocess.Popen:
        command = [sys.executable, "-c", LONG_RUN, name]
        return subprocess.Popen(command, cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"})

    assert start("whole").wait() == 0
    history = tmp_path / "killed" / "history.jsonl"
    kill_now_and_then(lambda: start("killed"), history, most=380, times=3, seed=0)
    done = len(history.read_text().splitlines())
    assert 2 <= done < 400
    assert start("killed").wait() == 0
    assert [json.loads(line)["step"] for line in history.read_text().splitlines()] == list(range(400))
    for name in ("history.jsonl", "pck.json", "run.json"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    assert [errors.index for errors in PckResult.load(tmp_path / "killed" / "pck.json").pairs] == list(range(400))
