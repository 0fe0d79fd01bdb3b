"""PCK, by hand."""

import math

import numpy as np
import pytest
import torch
from synthetic import as_users_run

from vitfeats.apps.evaluation import pck
from vitfeats.errors import ConfigError, ShapeError

TARGET = torch.tensor([[10.0, 10.0], [50.0, 20.0], [30.0, 30.0], [0.0, 0.0]])


def shifted(*shifts):
    return TARGET + torch.tensor(shifts)


def test_by_hand():
    # Distances 0, 5, 13 and 20; a tenth of the longer side (100) is 10.
    predicted = shifted((0.0, 0.0), (3.0, 4.0), (5.0, 12.0), (20.0, 0.0))
    assert pck(predicted, TARGET, (60.0, 100.0)) == 0.5
    assert pck(predicted, TARGET, (100.0, 60.0)) == 0.5
    assert pck(predicted, TARGET, (60.0, 100.0), alpha=0.04) == 0.25
    assert pck(predicted, TARGET, (60.0, 100.0), alpha=0.15) == 0.75
    assert pck(predicted, TARGET, (60.0, 100.0), alpha=1.0) == 1.0
    assert pck(TARGET, TARGET, (60.0, 100.0), alpha=1e-9) == 1.0


def test_exactly_at_the_threshold_counts_and_just_beyond_does_not():
    predicted = shifted((6.0, 8.0), (0.0, 10.0), (0.0, 10.01), (7.1, 7.1))
    assert pck(predicted, TARGET, (60.0, 100.0)) == 0.5


@pytest.mark.parametrize(("alpha", "side"), [(0.29, 100.0), (0.57, 100.0), (0.1, 70.0), (0.07, 300.0), (0.15, 20.0)])
def test_the_threshold_is_not_moved_by_rounding(alpha, side):
    # 0.29 · 100 is 28.999999999999996 in floating point.
    distance = round(alpha * side)
    assert pck([(float(distance), 0.0)], [(0.0, 0.0)], (side, side), alpha=alpha) == 1.0
    assert pck([(distance + 0.001, 0.0)], [(0.0, 0.0)], (side, side), alpha=alpha) == 0.0


@pytest.mark.parametrize(("x", "distance"), [(0.1, 10), (0.3, 7), (100.7, 50), (333.3, 20)])
def test_points_with_decimals_at_the_threshold_count(x, distance):
    # 10.1 − 0.1 is more than 10 in float32.
    for give in (np.array, lambda pairs: pairs):
        assert pck(give([(x + distance, 0.0)]), give([(x, 0.0)]), (10.0 * distance, 10.0)) == 1.0


def test_only_visible_points_count():
    predicted = shifted((0.0, 0.0), (99.0, 0.0), (0.0, 0.0), (99.0, 0.0))
    for give in (torch.tensor, np.array, list):
        assert pck(predicted, TARGET, (60.0, 100.0), visible=give([True, True, True, False])) == pytest.approx(2 / 3)
        assert pck(predicted, TARGET, (60.0, 100.0), visible=give([True, False, True, False])) == 1.0
        assert pck(predicted, TARGET, (60.0, 100.0), visible=give([False, True, False, False])) == 0.0


def test_without_points_there_is_no_share():
    assert math.isnan(pck(TARGET, TARGET, (60.0, 100.0), visible=[False] * 4))
    assert math.isnan(pck(torch.zeros(0, 2), torch.zeros(0, 2), (60.0, 100.0)))


def test_the_order_of_points_and_the_place_of_the_origin_do_not_matter():
    predicted = shifted((0.0, 0.0), (3.0, 4.0), (5.0, 12.0), (20.0, 0.0))
    order = torch.tensor([2, 0, 3, 1])
    expected = pck(predicted, TARGET, (60.0, 100.0))
    assert pck(predicted[order], TARGET[order], (60.0, 100.0)) == expected
    assert pck(predicted + 64, TARGET + 64, (60.0, 100.0)) == expected
    assert pck(predicted * 2, TARGET * 2, (120.0, 200.0)) == expected


def test_numbers_of_points_must_agree():
    with pytest.raises(ShapeError, match="expected as many predicted points as targets, got 3 and 4"):
        pck(TARGET[:3], TARGET, (60.0, 100.0))
    with pytest.raises(ShapeError, match=r"expected visible of shape \(4,\), got \(3,\)"):
        pck(TARGET, TARGET, (60.0, 100.0), visible=[True] * 3)
    with pytest.raises(ShapeError, match=r"expected points \(n, 2\)"):
        pck(torch.zeros(4, 3), TARGET, (60.0, 100.0))


@pytest.mark.parametrize(
    ("alpha", "reference"),
    [
        (0.0, (60.0, 100.0)),
        (-0.1, (60.0, 100.0)),
        (math.nan, (60.0, 100.0)),
        (0.1, (60.0, -1.0)),
        (0.1, (math.nan, 100.0)),
        (0.1, (60.0, math.nan)),
    ],
)
def test_settings_that_measure_nothing_are_refused(alpha, reference):
    with pytest.raises(
        ConfigError, match=r"expected alpha above 0 and a reference \(height, width\) of at least 0, got"
    ):
        pck(TARGET, TARGET, reference, alpha=alpha)


def test_a_strict_threshold_leaves_out_the_point_that_is_exactly_there():
    # Distances 0, 10, 9.99 and 10.01 at a threshold of 10.
    predicted = shifted((0.0, 0.0), (6.0, 8.0), (0.0, 9.99), (0.0, 10.01))
    assert pck(predicted, TARGET, (60.0, 100.0)) == 0.75
    assert pck(predicted, TARGET, (60.0, 100.0), strict=True) == 0.5


@pytest.mark.parametrize(("alpha", "side"), [(0.29, 100.0), (0.57, 100.0), (0.1, 70.0), (0.07, 300.0), (0.15, 20.0)])
def test_a_strict_threshold_is_not_moved_by_rounding(alpha, side):
    distance = round(alpha * side)
    for x in (0.0, 0.1, 100.7):
        assert pck([(x + distance, 0.0)], [(x, 0.0)], (side, side), alpha=alpha, strict=True) == 0.0
        assert pck([(x + distance - 0.001, 0.0)], [(x, 0.0)], (side, side), alpha=alpha, strict=True) == 1.0


def test_of_a_box_without_a_side_only_what_is_met_exactly_is_correct():
    predicted = shifted((0.0, 0.0), (0.0, 1e-3), (1.0, 0.0), (0.0, 0.0))
    for alpha in (0.1, 1e9):
        assert pck(predicted, TARGET, (0.0, 0.0), alpha=alpha) == 0.5
        assert pck(predicted, TARGET, (0.0, 0.0), alpha=alpha, strict=True) == 0.0
    assert pck(predicted, TARGET, (0.0, 1.0), alpha=1.0) == 1.0  # one side is enough


def test_what_is_not_a_number_is_refused():
    for value in (math.nan, math.inf):
        with pytest.raises(ShapeError, match="expected finite points, got NaN or infinity"):
            pck([(value, 0.0)], [(0.0, 0.0)], (60.0, 100.0))


def test_whole_numbers_will_do():
    with as_users_run():
        assert pck([(6, 8)], [(0, 0)], (60, 100)) == 1.0
