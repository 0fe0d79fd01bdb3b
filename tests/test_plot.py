"""Plots: pictures of a sane size that show what they are given, without pyplot."""

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from synthetic import describe, random_descriptor

import vitfeats as vf
from vitfeats import plot
from vitfeats.errors import ShapeError, UnknownFacetError
from vitfeats.matching import match_mutual, match_nearest
from vitfeats.pca import PCA
from vitfeats.similarity import similarity_map

WIDE, TALL = torch.rand(3, 30, 60), torch.rand(3, 64, 24)
A = random_descriptor(0, rows=3, cols=6, source=(30, 60))
B = random_descriptor(1, rows=8, cols=3, source=(64, 24))
LOOKS = describe(torch.rand(1, 18, 2), 3, 6, source=(30, 60), tap="attention@1")


def check(picture) -> np.ndarray:
    assert isinstance(picture, Image.Image)
    assert picture.mode == "RGB"
    assert 100 <= picture.width <= 4000
    assert 100 <= picture.height <= 4000
    pixels = np.asarray(picture)
    assert pixels.std() > 5  # something was drawn
    return pixels


def test_pca_of_one_and_of_several_images():
    one = plot.pca(WIDE, A)
    check(one)
    assert one.width / one.height == pytest.approx(60 / (2 * 30), rel=0.1)  # the image above its colours
    two = plot.pca([WIDE, TALL], [A, B])
    check(two)
    check(plot.pca([WIDE, WIDE], describe(A.features.repeat(2, 1, 1), 3, 6, source=(30, 60))))


def test_pca_uses_the_fitted_one_given():
    first = np.asarray(plot.pca(WIDE, A))
    assert np.array_equal(first, np.asarray(plot.pca(WIDE, A, fitted=PCA(3).fit(A))))
    assert not np.array_equal(first, np.asarray(plot.pca(WIDE, A, fitted=PCA(3).fit([A, B]))))


def test_similarity_of_several_points():
    points = [(10.0, 10.0), (50.0, 25.0), (59.0, 1.0)]
    check(plot.similarity(WIDE, points, TALL, similarity_map(A, points, B)))
    check(plot.similarity(WIDE, points[:1], WIDE, similarity_map(A, points[:1], A)))


def test_matches_are_drawn_and_unmatched_rows_left_out():
    only, kept = match_mutual(A, B), match_mutual(A, B, keep_unmatched=True)
    assert 0 < len(only) < len(kept)
    drawn = check(plot.matches(WIDE, TALL, only))
    assert np.array_equal(drawn, np.asarray(plot.matches(WIDE, TALL, kept)))


def test_at_most_so_many_matches_are_drawn():
    found = match_nearest(A, B)
    none = np.asarray(plot.matches(WIDE, TALL, found, most=0))
    one, five, all_ = (np.asarray(plot.matches(WIDE, TALL, found, most=most)) for most in (1, 5, 1000))
    changed = [(picture != none).any(2).sum() for picture in (one, five, all_)]
    assert 0 < changed[0] < changed[1] < changed[2]
    assert np.array_equal(all_, np.asarray(plot.matches(WIDE, TALL, found, most=18)))
    # The draw is the seed's.
    assert np.array_equal(five, np.asarray(plot.matches(WIDE, TALL, found, most=5)))
    assert any((five != np.asarray(plot.matches(WIDE, TALL, found, most=5, seed=seed))).any() for seed in (1, 2))
    # No matches at all are a picture of the two images.
    assert np.array_equal(none, np.asarray(plot.matches(WIDE, TALL, found[:0])))


ASKED = [(10.0, 10.0), (50.0, 25.0), (30.0, 15.0)]
CARRIED = [(5.0, 40.0), (20.0, 5.0), (12.0, 30.0)]


def test_points_are_drawn_where_they_are_carried():
    plain = check(plot.points(WIDE, ASKED, TALL, CARRIED))
    assert np.array_equal(plain, np.asarray(plot.points(WIDE, torch.tensor(ASKED), TALL, np.array(CARRIED))))
    assert np.array_equal(plain, np.asarray(plot.points(WIDE, ASKED, TALL, CARRIED, right=[True] * 3)))
    nowhere = torch.zeros(0, 2)
    none = np.asarray(plot.points(WIDE, nowhere, TALL, nowhere))
    half = plain.shape[1] // 2
    assert (plain != none)[:, :half].any()
    assert (plain != none)[:, half:].any()


def test_points_have_a_mark_for_those_that_are_wrong_and_a_ring_for_where_they_should_be():
    targets = [(7.0, 44.0), (20.0, 5.0), (2.0, 3.0)]
    plain = np.asarray(plot.points(WIDE, ASKED, TALL, CARRIED))
    crossed = np.asarray(plot.points(WIDE, ASKED, TALL, CARRIED, right=[True, False, True]))
    ringed = np.asarray(plot.points(WIDE, ASKED, TALL, CARRIED, targets=targets))
    both = check(plot.points(WIDE, ASKED, TALL, CARRIED, targets=targets, right=[True, False, True]))
    assert len({picture.tobytes() for picture in (plain, crossed, ringed, both)}) == 4
    # Image a is the same in all of them.
    left = slice(0, plain.shape[1] // 3)
    assert all(np.array_equal(plain[:, left], picture[:, left]) for picture in (crossed, ringed, both))


def test_a_point_beyond_the_edge_does_not_shrink_the_picture():
    inside = plot.points(WIDE, ASKED, TALL, CARRIED)
    outside = plot.points(WIDE, ASKED, TALL, [(-500.0, 9000.0), *CARRIED[1:]], targets=CARRIED)
    assert outside.size == inside.size


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"carried": CARRIED[:2]}, "3 on image a, 2 carried, 2 targets and 3 marks"),
        ({"targets": CARRIED[:1]}, "3 on image a, 3 carried, 1 targets and 3 marks"),
        ({"right": [True]}, "3 on image a, 3 carried, 3 targets and 1 marks"),
    ],
)
def test_as_many_points_of_each_are_needed(changes, told):
    given = {"image_a": WIDE, "points_a": ASKED, "image_b": TALL, "carried": CARRIED} | changes
    with pytest.raises(ShapeError, match=f"expected as many points of each, got {told}"):
        plot.points(**given)


def test_accuracy_is_a_line_a_method_over_thresholds_in_any_order():
    one = {0.0: 0.0, 0.1: 0.4, 0.2: 0.7}
    other = {0.2: 0.2, 0.0: 0.0, 0.1: 0.1}
    drawn = plot.accuracy({"one": one, "other": other})
    check(drawn)
    assert drawn.tobytes() == plot.accuracy({"one": one, "other": dict(sorted(other.items()))}).tobytes()
    others = [{"one": one}, {"one": other, "other": one}, {"one": one, "another": other}, {"one": {0.0: math.nan}}]
    assert len({plot.accuracy(shares).tobytes() for shares in others} | {drawn.tobytes()}) == 5
    with pytest.raises(ShapeError, match="expected at least one method, got none"):
        plot.accuracy({})


def test_saliency():
    check(plot.saliency(WIDE, LOOKS))
    assert not np.array_equal(
        np.asarray(plot.saliency(WIDE, LOOKS, heads=(0,))), np.asarray(plot.saliency(WIDE, LOOKS, heads=(1,)))
    )


def test_images_come_in_every_way(tmp_path):
    pixels = (WIDE * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    path = tmp_path / "wide.png"
    Image.fromarray(pixels).save(path)
    drawn = [np.asarray(plot.pca(image, A)) for image in (path, str(path), Image.fromarray(pixels), pixels)]
    assert all(np.array_equal(drawn[0], other) for other in drawn)


def test_descriptors_with_a_graph_can_be_drawn():
    d = describe(A.features.clone().requires_grad_(), 3, 6, source=(30, 60))
    points = [(10.0, 10.0)]
    check(plot.pca(WIDE, d))
    check(plot.similarity(WIDE, points, WIDE, similarity_map(d, points, d)))
    looks = describe(LOOKS.features.clone().requires_grad_(), 3, 6, source=(30, 60), tap="attention@1")
    check(plot.saliency(WIDE, looks))


@pytest.mark.parametrize("shape", [(20, 300), (300, 20)])
def test_long_images_have_pictures_too(shape):
    image = torch.rand(3, *shape)
    rows, cols = (2, 30) if shape[0] < shape[1] else (30, 2)
    d = random_descriptor(0, rows=rows, cols=cols, source=shape)
    for picture in (plot.pca(image, d), plot.matches(image, image, match_nearest(d, d))):
        assert min(picture.size) >= 20
        assert max(picture.size) <= 4000


def test_numbers_that_do_not_agree_are_refused():
    message = "expected one image a descriptor, got 2 images and 1 descriptors"
    for draw in (lambda: plot.pca([WIDE, WIDE], A), lambda: plot.saliency([WIDE, WIDE], LOOKS)):
        with pytest.raises(ShapeError, match=message):
            draw()
    with pytest.raises(ShapeError, match="expected one map a point, got 2 maps for 1 points"):
        plot.similarity(WIDE, [(1.0, 1.0)], WIDE, torch.zeros(2, 3, 6))


def test_nothing_to_draw_is_refused():
    with pytest.raises(ShapeError, match="expected at least one point, got none"):
        plot.similarity(WIDE, torch.zeros(0, 2), WIDE, torch.zeros(0, 3, 6))
    with pytest.raises(ShapeError, match="expected at least one descriptor, got none"):
        plot.pca([], [])


def test_saliency_of_another_facet_is_refused():
    with pytest.raises(UnknownFacetError, match="expected a descriptor of the facet 'attention', got 'key@1'"):
        plot.saliency(WIDE, A)


def test_pyplot_is_never_imported():
    # It would choose a backend, and open windows on some machines.
    code = """
import sys, torch
from vitfeats import plot
from vitfeats.descriptor import Descriptor
from vitfeats.grid import Frame, PatchGrid
from vitfeats.matching import match_nearest
from vitfeats.taps import Tap
grid = PatchGrid(2, 3, 8, 8)
make = lambda tap: Descriptor(torch.rand(1, 6, 4), grid, (Frame((16, 24), (16, 24)),), Tap.parse(tap), "m")
image, d = torch.rand(3, 16, 24), make("key@1")
plot.pca(image, d)
plot.matches(image, image, match_nearest(d, d))
plot.similarity(image, [(3.0, 4.0)], image, torch.rand(1, 2, 3))
plot.saliency(image, make("attention@1"))
plot.mixing(torch.rand(2, 3), ["a", "b", "c"], [1, 0])
plot.side_by_side([image, image], ["a", "b"])
plot.points(image, [(3.0, 4.0)], image, [(5.0, 6.0)])
plot.accuracy({"m": {0.0: 0.0, 0.1: 0.5}})
print("matplotlib.figure" in sys.modules, "matplotlib.pyplot" in sys.modules)
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.split() == ["True", "False"]


def test_pca_with_a_foreground_from_saliency(mini):
    """The colours are those of the descriptors as they were fitted, also of a batch."""
    image = vf.samples.cat().resize((160, 112))
    ds = mini([image, image], ["key@11", "attention@11"])
    fitted = vf.PCA(3).fit(ds["key@11"], foreground=ds["attention@11"])
    picture = vf.plot.pca([image, image], ds["key@11"], fitted=fitted)
    assert picture.width > picture.height / 2


def test_a_negative_number_of_matches_is_refused(mini):
    d = mini(vf.samples.cat(), "key@11")
    with pytest.raises(vf.ConfigError, match="most of at least 0, got -3"):
        vf.plot.matches(vf.samples.cat(), vf.samples.cat(), vf.match_mutual(d, d), most=-3)


def test_losses_of_a_run():
    history = [{"step": i, "loss": 2.0 / (i + 1), "structure": 0.1} for i in range(30)]
    for record in history[::10]:
        record["whole"] = 0.5
    check(plot.losses(history))
    fewer = [{key: value for key, value in record.items() if key != "whole"} for record in history]
    assert not np.array_equal(np.asarray(plot.losses(history)), np.asarray(plot.losses(fewer)))


def test_losses_that_a_logarithm_does_not_take_are_gaps():
    check(plot.losses([{"step": 0, "loss": 1.0}]))
    check(plot.losses([{"step": i, "loss": 1.0 - i} for i in range(4)]))
    check(plot.losses([{"step": i, "loss": 0.0} for i in range(4)]))
    check(plot.losses([{"step": i, "loss": value} for i, value in enumerate((1.0, float("nan"), float("inf"), 0.5))]))


def test_no_losses_are_refused():
    with pytest.raises(ShapeError, match="expected a history of at least one step, got none"):
        plot.losses([])


def test_curves_have_a_panel_for_each_group_that_was_measured():
    history = [{"step": i, "loss": 2.0 / (i + 1), "entropy": 1.0, "spread": 2.0 + i} for i in range(20)]
    groups = [("loss",), ("entropy", "spread"), ("knn",)]
    two = plot.curves(history, groups)
    check(two)
    assert two.tobytes() == plot.curves(history, groups[:2]).tobytes()
    one = plot.curves(history, [("loss", "entropy", "spread")])
    for record in history[4::5]:
        record["knn"] = record["step"] / 20
    three = plot.curves(history, groups)
    check(three)
    assert one.height < two.height < three.height
    assert one.width == two.width == three.width
    history[-1]["knn"] = 0.0
    assert three.tobytes() != plot.curves(history, groups).tobytes()


def test_curves_of_little_or_nothing_are_pictures_too():
    check(plot.curves([{"step": 0, "loss": 1.0}], [("loss",)]))
    check(plot.curves([{"step": i, "loss": value} for i, value in enumerate((1.0, float("nan"), 0.5))], [("loss",)]))
    assert isinstance(plot.curves([{"step": 0}], [("loss",)]), Image.Image)
    with pytest.raises(ShapeError, match="expected a history of at least one step, got none"):
        plot.curves([], [("loss",)])


def test_the_mixing_has_a_cell_for_each_step_and_layer():
    layers, steps = ("up0.res0", "mid", "up1"), (9, 5, 0, 1)
    weights = torch.full((4, 3), 1 / 12)
    even = plot.mixing(weights, layers, steps)
    check(even)
    assert even.size == (round(130 * (3.0 + 0.4 * 4)), round(130 * (1.2 + 0.3 * 3)))
    pictures = {even.tobytes()}
    for place in range(12):  # each weight is seen in a cell of its own
        one = weights.clone()
        one.view(-1)[place] = 0.5
        pictures.add(plot.mixing(one.requires_grad_(), layers, steps).tobytes())
    assert len(pictures) == 13
    assert plot.mixing(weights, layers, (9, 5, 0, 2)).tobytes() not in pictures
    wide = plot.mixing(torch.rand(11, 12), [f"layer {n}" for n in range(12)], range(11))
    assert wide.width > even.width
    assert wide.height > even.height
    check(plot.mixing(torch.ones(1, 1), ["one"], [0]))


@pytest.mark.parametrize("shape", [(3, 4), (0, 0), (12,)])
@pytest.mark.usefixtures("as_a_user")
def test_a_mixing_whose_names_do_not_agree_is_refused(shape):
    layers, steps = (("a", "b", "c"), (9, 5, 0, 1)) if 0 not in shape else ((), ())
    with pytest.raises(ShapeError, match=r"expected weights of at least one step and layer, .* got shape"):
        plot.mixing(torch.zeros(shape), layers, steps)


def _panels_of(picture) -> list[tuple[int, int, int, int]]:
    """Return (left, top, right, bottom) of what is not white, of one image a row, from left to right."""
    inked = (np.asarray(picture) < 250).any(2)
    edges = np.flatnonzero(np.diff(np.concatenate([[0], inked.any(0), [0]]).astype(int)))
    found = []
    for left, right in edges.reshape(-1, 2):
        rows = np.flatnonzero(inked[:, left:right].any(1))
        found.append((left, rows[0], right, rows[-1] + 1))
    return found


def test_images_side_by_side_have_one_height_and_keep_their_proportions_and_order():
    colours = [(0.9, 0.1, 0.1), (0.1, 0.9, 0.1), (0.1, 0.1, 0.9)]
    shapes = [(30, 60), (64, 24), (100, 100)]
    images = [torch.tensor(c)[:, None, None].expand(3, *shape) for c, shape in zip(colours, shapes, strict=True)]
    picture = plot.side_by_side(images)
    pixels = check(picture)
    panels = _panels_of(picture)
    assert len(panels) == 3
    for (left, top, right, bottom), colour, shape in zip(panels, colours, shapes, strict=True):
        assert bottom - top == pytest.approx(panels[0][3] - panels[0][1], abs=1)
        assert (right - left) / (bottom - top) == pytest.approx(shape[1] / shape[0], rel=0.03)
        middle = pixels[(top + bottom) // 2, (left + right) // 2]
        assert np.abs(middle / 255 - colour).max() < 0.02


def test_titles_stand_above_their_images():
    plain, titled = plot.side_by_side([WIDE, TALL]), plot.side_by_side([WIDE, TALL], ["content", "style"])
    assert titled.width == plain.width
    assert titled.height > plain.height
    # What differs between two titles lies above the second image, within its place.
    other = np.asarray(plot.side_by_side([WIDE, TALL], ["content", "made"]))
    rows, cols = np.nonzero((np.asarray(titled) != other).any(2))
    (_, _, right, _), (_, top, _, _) = _panels_of(plain)
    assert cols.min() > right
    assert rows.max() < top + titled.height - plain.height
    assert len(rows) > 20


def test_a_new_row_begins_after_so_many_columns():
    images = [torch.rand(3, 40, 50) for _ in range(5)]
    one, two, three = (plot.side_by_side(images, columns=columns) for columns in (None, 3, 2))
    assert one.tobytes() == plot.side_by_side(images, columns=9).tobytes()
    assert two.width / one.width == pytest.approx(3 / 5, rel=0.03)
    assert (two.height / one.height, three.height / one.height) == pytest.approx((2, 3), rel=0.05)
    for picture in (one, two, three):
        check(picture)


def test_a_very_long_row_is_drawn_smaller():
    long = plot.side_by_side([WIDE] * 30, ["a title"] * 30)
    assert long.width <= 4000
    panels = _panels_of(plot.side_by_side([WIDE] * 30))
    assert len(panels) == 30
    assert (panels[0][2] - panels[0][0]) / (panels[0][3] - panels[0][1]) == pytest.approx(2, rel=0.05)


@pytest.mark.usefixtures("as_a_user")
def test_what_cannot_stand_side_by_side_is_refused():
    with pytest.raises(ShapeError, match="expected at least one image, got none"):
        plot.side_by_side([])
    with pytest.raises(ShapeError, match="expected one title an image, got 1 titles for 2 images"):
        plot.side_by_side([WIDE, TALL], ["content"])
    with pytest.raises(vf.ConfigError, match="expected columns of at least 1, or None for one row, got 0"):
        plot.side_by_side([WIDE, TALL], columns=0)
