"""The k-NN accuracy of descriptors, against scikit-learn."""

import math

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

from vitfeats.apps.evaluation.neighbours import neighbours_accuracy
from vitfeats.errors import ShapeError


def clouds(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return descriptors of four classes that overlap, and their classes."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(4, (count,), generator=generator)
    middles = torch.randn(4, 8, generator=torch.Generator().manual_seed(9))
    return middles[labels] + 1.5 * torch.randn(count, 8, generator=generator), labels


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.07), (5, 0.07), (20, 0.5), (20, math.inf)])
def test_accuracy_is_that_of_scikit_learn(k, temperature):
    (known, labels), (asked, truth) = clouds(90, 0), clouds(60, 1)
    weigh = "uniform" if math.isinf(temperature) else lambda distances: np.exp((1 - distances) / temperature)
    other = KNeighborsClassifier(k, metric="cosine", algorithm="brute", weights=weigh)
    wanted = other.fit(known.numpy(), labels.numpy()).score(asked.numpy(), truth.numpy())
    found = neighbours_accuracy(known, labels, asked, truth, k=k, temperature=temperature)
    assert found == pytest.approx(wanted, abs=1e-9)
    assert 0.3 < found < 0.95


def test_what_is_known_by_heart_is_right():
    known, labels = clouds(30, 0)
    assert neighbours_accuracy(known, labels, 3 * known, labels, k=1) == 1
    assert neighbours_accuracy(known, labels, known, labels + 1, k=1) == 0


def test_more_neighbours_than_there_are_is_all_of_them():
    (known, labels), (asked, truth) = clouds(7, 0), clouds(20, 1)
    found = neighbours_accuracy(known, labels, asked, truth, k=100)
    assert found == neighbours_accuracy(known, labels, asked, truth, k=7)


def test_many_that_are_asked_are_asked_in_parts():
    (known, labels), (asked, truth) = clouds(50, 0), clouds(1500, 1)
    halves = [neighbours_accuracy(known, labels, a, t) for a, t in zip(asked.split(750), truth.split(750), strict=True)]
    assert neighbours_accuracy(known, labels, asked, truth) == pytest.approx(sum(halves) / 2)


def test_votes_that_are_sharp_stay_finite():
    (known, labels), (asked, truth) = clouds(50, 0), clouds(30, 1)
    sharp = neighbours_accuracy(known, labels, asked, truth, k=20, temperature=1e-4)
    assert sharp == neighbours_accuracy(known, labels, asked, truth, k=1)


def test_half_precision_is_read_as_single():
    (known, labels), (asked, truth) = clouds(50, 0), clouds(30, 1)
    half = neighbours_accuracy(known.bfloat16(), labels, asked.bfloat16(), truth)
    assert half == neighbours_accuracy(known.bfloat16().float(), labels, asked.bfloat16().float(), truth)


@pytest.mark.parametrize("counts", [(0, 0, 2, 2), (2, 2, 0, 0), (3, 2, 2, 2), (2, 2, 2, 3)])
@pytest.mark.usefixtures("as_a_user")
def test_descriptors_without_a_label_each_are_refused(counts):
    known, labels, asked, truth = counts
    message = f"expected descriptors with a label each, got {known} with {labels} labels and {asked} with {truth}"
    with pytest.raises(ShapeError, match=message):
        neighbours_accuracy(
            torch.ones(known, 4), torch.zeros(labels).long(), torch.ones(asked, 4), torch.zeros(truth).long()
        )
