"""What speaks for foreground: each formula against loops, and laws of images and clusters in another order."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic import describe, random_descriptor
from torch import Tensor

from vitfeats.apps.cosegmentation.evidence import (
    border_saliency,
    cluster_saliency,
    cluster_weights,
    common,
    count_votes,
    elect,
    inliers,
    stretched,
)
from vitfeats.descriptor import Descriptor
from vitfeats.errors import ConfigError, ShapeError

settings.register_profile("coseg-evidence", deadline=None, max_examples=30)
settings.load_profile("coseg-evidence")


# The border -----------------------------------------------------------------------------------------------------------


def naive_border_saliency(d: Descriptor, neighbours: int) -> np.ndarray:
    tokens = d.features[0].double().numpy().reshape(d.grid.rows, d.grid.cols, -1)
    border = []
    for row in range(d.grid.rows):
        for col in range(d.grid.cols):
            if row in (0, d.grid.rows - 1) or col in (0, d.grid.cols - 1):
                border.append(tokens[row, col])
    found = np.zeros((d.grid.rows, d.grid.cols))
    for row in range(d.grid.rows):
        for col in range(d.grid.cols):
            token = tokens[row, col]
            cosines = [token @ other / (np.linalg.norm(token) * np.linalg.norm(other)) for other in border]
            found[row, col] = 1 - np.mean(sorted(cosines)[-neighbours:])
    low, high = found.min(), found.max()
    return np.zeros_like(found) if high - low < 1e-9 else (found - low) / (high - low)


@pytest.mark.parametrize(("rows", "cols"), [(4, 5), (7, 3), (2, 6), (1, 6), (6, 1), (9, 9)])
@pytest.mark.parametrize("neighbours", [1, 2, 5, 1000])
def test_border_saliency_is_that_of_loops(rows, cols, neighbours):
    d = random_descriptor(rows * cols, rows, cols)
    expected = naive_border_saliency(d, neighbours)
    assert np.allclose(border_saliency(d, neighbours), expected, atol=1e-5)


def test_five_neighbours_are_usual():
    d = random_descriptor(3, 6, 7)
    assert torch.equal(border_saliency(d), border_saliency(d, 5))
    assert not torch.allclose(border_saliency(d), border_saliency(d, 4), atol=1e-3)


@pytest.mark.parametrize("dim", [1, 3, 384, 1024])
def test_where_all_tokens_are_equal_nothing_is_salient(dim):
    token = torch.randn(dim, generator=torch.Generator().manual_seed(dim))
    assert torch.equal(border_saliency(describe(token.expand(1, 30, dim), 5, 6)), torch.zeros(5, 6))
    assert torch.equal(border_saliency(describe(torch.zeros(1, 30, dim), 5, 6)), torch.zeros(5, 6))


def test_tokens_that_differ_in_length_alone_are_not_salient():
    lengths = torch.rand(1, 30, 1, generator=torch.Generator().manual_seed(0)) + 0.5
    d = describe(lengths * torch.tensor([3.0, -1, 2, 5]), 5, 6)
    assert torch.equal(border_saliency(d), torch.zeros(5, 6))


def test_a_square_of_other_tokens_in_the_middle_has_one_and_the_rest_zero():
    inside = torch.zeros(7, 8, dtype=torch.bool)
    inside[2:5, 3:6] = True
    tokens = torch.where(inside[..., None], torch.tensor([0.0, 1, 1]), torch.tensor([1.0, 0, 1]))
    saliency = border_saliency(describe(tokens.view(1, 56, 3), 7, 8))
    assert torch.allclose(saliency, inside.float(), atol=1e-5)


def test_a_token_need_only_be_like_some_of_the_border():
    # The upper half of the image is sky, the lower one grass, and neither is salient; what stands in between is.
    tokens = torch.zeros(8, 8, 3)
    tokens[:4, :, 0] = tokens[4:, :, 1] = 1
    tokens[3:5, 3:5] = torch.tensor([0.0, 0, 1])
    saliency = border_saliency(describe(tokens.view(1, 64, 3), 8, 8))
    expected = torch.zeros(8, 8)
    expected[3:5, 3:5] = 1
    assert torch.allclose(saliency, expected, atol=1e-5)


@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (1, 2), (1, 7), (7, 1), (2, 2), (2, 3), (3, 3)])
def test_small_grids_have_finite_saliency_from_zero_to_one(rows, cols):
    saliency = border_saliency(random_descriptor(1, rows, cols))
    assert saliency.shape == (rows, cols)
    assert saliency.isfinite().all()
    assert 0 <= float(saliency.min()) <= float(saliency.max()) <= 1
    assert float(saliency.max()) == (0 if rows * cols < 3 else 1)  # two tokens are as like each other


def test_the_token_of_a_grid_of_one_is_not_salient():
    assert border_saliency(random_descriptor(0, 1, 1)).tolist() == [[0.0]]


def test_a_batch_is_refused():
    with pytest.raises(ShapeError, match="expected a descriptor of one image, got a batch of 2"):
        border_saliency(random_descriptor(0, batch=2))


@pytest.mark.parametrize("neighbours", [0, -1])
def test_fewer_than_one_neighbour_are_refused(neighbours):
    with pytest.raises(ConfigError, match=f"expected neighbours of at least 1, got {neighbours}"):
        border_saliency(random_descriptor(0), neighbours)


def test_the_saliency_has_no_graph():
    d = random_descriptor(0)
    asked = describe(d.features.clone().requires_grad_(), 4, 5)
    assert not border_saliency(asked).requires_grad


@given(st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=20))
def test_values_are_stretched_from_zero_to_one_and_keep_their_order(values):
    given_values = torch.tensor(values)
    found = stretched(given_values)
    if float(given_values.max() - given_values.min()) < 1e-6:
        assert not found.any()
    else:
        assert (float(found.min()), float(found.max())) == (0, 1)
        order = given_values.argsort()
        assert (found[order].diff() >= 0).all()


# Clusters and votes ---------------------------------------------------------------------------------------------------


def labelled(seed: int, images: int, count: int) -> tuple[list[Tensor], list[Tensor]]:
    """Return labels and saliency of images of different sizes; not every cluster is in every image."""
    rng = np.random.default_rng(seed)
    labels, saliency = [], []
    for _ in range(images):
        size = int(rng.integers(1, 12))
        labels.append(torch.from_numpy(rng.integers(0, count, size)))
        saliency.append(torch.from_numpy(rng.random(size)).float())
    return labels, saliency


def naive_cluster_saliency(labels: list[Tensor], saliency: list[Tensor], count: int) -> np.ndarray:
    found = np.full((len(labels), count), np.nan)
    for image, (numbers, values) in enumerate(zip(labels, saliency, strict=True)):
        for cluster in range(count):
            own = [float(value) for number, value in zip(numbers, values, strict=True) if int(number) == cluster]
            if own:
                found[image, cluster] = sum(own) / len(own)
    return found


@given(st.integers(0, 10_000), st.integers(1, 6), st.integers(1, 7))
def test_cluster_saliency_is_that_of_loops_and_nan_where_a_cluster_is_absent(seed, images, count):
    labels, saliency = labelled(seed, images, count)
    found = cluster_saliency(labels, saliency, count)
    assert found.shape == (images, count)
    assert np.allclose(found, naive_cluster_saliency(labels, saliency, count), atol=1e-6, equal_nan=True)


def test_images_without_saliency_are_refused():
    labels, saliency = [torch.tensor([0, 1])] * 3, [torch.tensor([0.5, 0.6])] * 2
    with pytest.raises(ValueError, match="zip"):
        cluster_saliency(labels, saliency, 2)


def test_a_cluster_has_a_vote_where_its_mean_is_above_the_threshold():
    nan = float("nan")
    means = torch.tensor([[0.5, 0.3, nan], [0.25, 0.5, nan], [nan, 0.5, 0.2]])
    assert count_votes(means, 0.25).tolist() == [1, 3, 0]  # at the threshold is not above it
    assert count_votes(means, 0.0).tolist() == [2, 3, 1]


@pytest.mark.parametrize(
    ("images", "share", "needed"),
    [
        (10, 0.7, 7),  # in floats, 0.7 · 10 is 7.000000000000001 on some machines, and 0.55 · 100 is on all
        (100, 0.55, 55),
        (100, 0.07, 7),
        (10, 0.71, 8),
        (4, 0.75, 3),
        (3, 0.75, 3),
        (2, 0.75, 2),
        (5, 0.75, 4),
        (1, 0.75, 1),
        (7, 1.0, 7),
        (7, 0.0, 1),
        (3, 0.01, 1),
    ],
)
def test_votes_are_rounded_up_and_at_least_one(images, share, needed):
    votes = torch.arange(images + 1)
    assert elect(votes, images, share).tolist() == [number >= needed for number in range(images + 1)]


@given(st.integers(1, 300), st.integers(0, 100))
def test_no_rounding_asks_for_one_vote_too_many(images, percent):
    needed = max(1, -(-percent * images // 100))  # in whole numbers
    votes = torch.tensor([needed - 1, needed])
    assert elect(votes, images, percent / 100).tolist() == [False, True]


def test_weights_are_mean_saliency_with_absence_as_zero_stretched():
    nan = float("nan")
    means = torch.tensor([[0.8, 0.1, nan], [0.6, nan, nan], [0.7, 0.2, 0.9]])
    mean = [0.7, 0.1, 0.3]
    expected = [(value - 0.1) / (0.7 - 0.1) for value in mean]
    assert cluster_weights(means).tolist() == pytest.approx(expected, abs=1e-6)


def test_a_cluster_that_one_image_alone_has_is_weak():
    means = torch.full((10, 3), 0.5)
    means[1:, 0] = float("nan")
    means[:, 2] = 0.0
    weights = cluster_weights(means)
    assert weights.tolist() == pytest.approx([0.1, 1.0, 0.0], abs=1e-6)


def test_a_single_cluster_weighs_one_and_equal_ones_nothing():
    assert cluster_weights(torch.tensor([[0.3], [0.1]])).tolist() == [1.0]
    assert cluster_weights(torch.full((3, 4), 0.4)).tolist() == [0.0] * 4


@given(st.integers(0, 10_000), st.integers(1, 6), st.integers(1, 7), st.floats(0, 1), st.floats(0, 1))
def test_images_in_another_order_change_neither_votes_nor_weights(seed, images, count, threshold, share):
    labels, saliency = labelled(seed, images, count)
    order = np.random.default_rng(seed + 1).permutation(images)
    forth = cluster_saliency(labels, saliency, count)
    back = cluster_saliency([labels[i] for i in order], [saliency[i] for i in order], count)
    assert torch.equal(back.nan_to_num(-1), forth[torch.from_numpy(order)].nan_to_num(-1))
    votes = count_votes(forth, threshold)
    assert torch.equal(count_votes(back, threshold), votes)
    assert torch.equal(elect(count_votes(back, threshold), images, share), elect(votes, images, share))
    assert torch.allclose(cluster_weights(back), cluster_weights(forth), atol=1e-4)
    assert torch.equal(common([labels[i] for i in order], count, share), common(labels, count, share))


@given(st.integers(0, 10_000), st.integers(1, 6), st.integers(1, 7), st.floats(0, 1), st.floats(0, 1))
def test_clusters_of_other_names_have_the_same_votes_and_weights_by_their_names(seed, images, count, threshold, share):
    labels, saliency = labelled(seed, images, count)
    names = torch.from_numpy(np.random.default_rng(seed + 1).permutation(count))
    renamed = [names[numbers] for numbers in labels]
    forth, back = cluster_saliency(labels, saliency, count), cluster_saliency(renamed, saliency, count)
    assert torch.equal(back[:, names].nan_to_num(-1), forth.nan_to_num(-1))
    assert torch.equal(count_votes(back, threshold)[names], count_votes(forth, threshold))
    assert torch.allclose(cluster_weights(back)[names], cluster_weights(forth), atol=1e-5)
    assert torch.equal(common(renamed, count, share)[names], common(labels, count, share))


# Images that are left out, and clusters in common ---------------------------------------------------------------------


def test_a_cls_far_from_the_mean_is_left_out():
    cls = torch.tensor([[1.0, 0, 0.1], [2.0, 0.2, 0], [1.0, -0.1, 0], [-0.1, 1.0, 0.5]])
    mean = cls.mean(0)
    cosine = [float(one @ mean / (one.norm() * mean.norm())) for one in cls]
    assert inliers(cls, 0.7).tolist() == [True, True, True, False]
    for least in (-1.0, 0.5, 0.95):
        assert inliers(cls, least).tolist() == [value >= least for value in cosine]


def test_where_no_image_passes_the_message_says_how_far_the_cosines_go():
    cls = torch.eye(4)
    with pytest.raises(ConfigError, match=r"expected outliers= that some image passes, got 0\.9; .* up to 0\.500"):
        inliers(cls, 0.9)
    assert inliers(cls, 0.49).all()


@pytest.mark.parametrize("least", [-1.0, 0.999, 1.0])
def test_images_of_one_cls_pass_every_threshold_up_to_one(least):
    for seed in range(10):
        cls = random_descriptor(seed, dim=192).features[0, 0].expand(1 + seed % 3, -1)
        assert inliers(cls, least).all()


def test_a_cosine_may_miss_the_threshold_by_what_rounding_makes():
    cls = torch.tensor([[0.8, 0.6], [0.8, -0.6]])  # a cosine of 0.8 to their mean
    assert inliers(cls, 0.8 + 5e-7).all()
    with pytest.raises(ConfigError, match=r"got 0\.80001; the cosines go up to 0\.800"):
        inliers(cls, 0.80001)


@given(st.integers(0, 10_000), st.integers(1, 6), st.integers(1, 7), st.floats(0, 1))
def test_common_clusters_are_those_of_a_loop(seed, images, count, share):
    labels, _ = labelled(seed, images, count)
    needed = max(1, math.ceil(round(share * images, 9)))
    expected = [sum(cluster in numbers.tolist() for numbers in labels) >= needed for cluster in range(count)]
    assert common(labels, count, share).tolist() == expected


def test_a_cluster_with_many_tokens_of_one_image_is_not_common():
    labels = [torch.tensor([0, 0, 0, 0, 1]), torch.tensor([1]), torch.tensor([1, 2])]
    assert common(labels, 4, 0.5).tolist() == [False, True, False, False]
    assert common(labels, 4, 0.0).tolist() == [True, True, True, False]
