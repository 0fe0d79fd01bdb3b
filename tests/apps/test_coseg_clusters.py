"""Clusters of tokens: k-means by either library against sums written out, and the elbow rule against a plain loop."""

import importlib.util

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import cdist
from torch import Tensor

from vitfeats.apps.cosegmentation import clusters as module
from vitfeats.apps.cosegmentation.clusters import Clusters, elbow_clusters, fit_clusters
from vitfeats.errors import ConfigError, ShapeError

settings.register_profile("coseg-clusters", deadline=None, max_examples=30)
settings.load_profile("coseg-clusters")


@pytest.fixture(params=["sklearn", "faiss"])
def library(request, monkeypatch) -> str:
    """Fit by one library, and then by the other."""
    if request.param == "faiss":
        pytest.importorskip("faiss")
    else:
        without(monkeypatch, "faiss")
    return request.param


def without(monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    monkeypatch.setattr(module, "find_spec", lambda name: None if name == missing else importlib.util.find_spec(name))


def vectors(seed: int, count: int = 60, dim: int = 5) -> Tensor:
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed))


def blobs(seed: int = 0, each: int = 20, dim: int = 6, spread: float = 0.02) -> tuple[Tensor, Tensor]:
    """Return vectors of five blobs a length of 1 from the origin, mixed, and which blob each is of."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.eye(5, dim)
    labels = torch.arange(5).repeat_interleave(each)[torch.randperm(5 * each, generator=generator)]
    return centres[labels] + spread * torch.randn(5 * each, dim, generator=generator), labels


def naive_inertia(centres: Tensor, points: Tensor) -> float:
    total = 0.0
    for point in points.double():
        total += min(float((point - centre).square().sum()) for centre in centres.double())
    return total


# Fitting --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 3, 7])
def test_the_inertia_is_the_sum_of_squared_distances_to_the_nearest_centres(library, count):
    points = vectors(1)
    found = fit_clusters(points, count)
    assert len(found) == count
    assert found.inertia == pytest.approx(naive_inertia(found.centres, points), rel=1e-4)


def test_the_inertia_of_more_vectors_than_are_measured_at_once_is_that_of_all():
    points = vectors(2, 9000, 2)
    found = fit_clusters(points, 1)
    assert found.inertia == pytest.approx(float((points - points.mean(0)).square().sum()), rel=1e-4)


def test_one_cluster_is_the_mean():
    points = vectors(3)
    assert torch.allclose(fit_clusters(points, 1).centres[0], points.mean(0), atol=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_blobs_that_lie_apart_are_found_exactly(library, seed):
    points, labels = blobs(seed)
    found = fit_clusters(points, 5, seed=seed, restarts=10)
    mean_of = torch.stack([points[labels == blob].mean(0) for blob in range(5)])
    nearest = torch.from_numpy(cdist(mean_of, found.centres)).argmin(1)
    assert sorted(nearest.tolist()) == [0, 1, 2, 3, 4]
    assert torch.allclose(found.centres[nearest], mean_of, atol=1e-4)
    assert torch.equal(found.nearest(points), nearest[labels])
    assert found.inertia == pytest.approx(naive_inertia(mean_of, points), rel=1e-3)


def test_each_centre_is_the_mean_of_its_vectors_when_it_came_to_rest(library):
    points = vectors(4, 80, 3)
    found = fit_clusters(points, 4, iterations=300)
    labels = found.nearest(points)
    means = torch.stack([points[labels == number].mean(0) for number in range(4)])
    assert torch.allclose(found.centres, means, atol=1e-4)


@pytest.mark.parametrize("count", [3, 4, 50])
def test_fewer_different_vectors_than_clusters_are_their_own_centres(library, count):
    different = vectors(5, 3)
    points = different[torch.tensor([0, 1, 1, 2, 0, 0, 2])]
    found = fit_clusters(points, count)
    assert len(found) == 3
    assert found.inertia == 0
    assert sorted(found.centres.tolist()) == sorted(different.tolist())
    assert torch.equal(found.centres[found.nearest(points)], points)


def test_one_vector_is_one_cluster():
    found = fit_clusters(vectors(0, 1), 4)
    assert (len(found), found.inertia) == (1, 0.0)


def test_the_same_seed_gives_the_same_clusters(library):
    points = vectors(6, 200)
    first, second = fit_clusters(points, 9, seed=3), fit_clusters(points, 9, seed=3)
    assert torch.equal(first.centres, second.centres)
    assert first.inertia == second.inertia
    assert not torch.equal(first.centres, fit_clusters(points, 9, seed=4).centres)


def test_more_first_guesses_are_not_worse(library):
    points = vectors(7, 150, 2)
    assert fit_clusters(points, 12, restarts=10).inertia <= fit_clusters(points, 12, restarts=1).inertia * (1 + 1e-6)


def test_the_vectors_and_the_global_generators_are_left_as_they_were(library):
    points = vectors(8)
    kept = points.clone()
    torch.manual_seed(5)
    np.random.seed(5)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    first = fit_clusters(points, 4)
    assert torch.equal(points, kept)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])
    torch.manual_seed(99)
    np.random.seed(99)
    assert torch.equal(first.centres, fit_clusters(points, 4).centres)


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_vectors_that_are_not_finite_are_refused(value, count):
    points = vectors(9)
    points[4, 2] = value
    with pytest.raises(ShapeError, match="expected finite vectors to cluster, got NaN or infinity"):
        fit_clusters(points, count)


@pytest.mark.parametrize("count", [0, -1])
def test_fewer_than_one_cluster_are_refused(count):
    with pytest.raises(ConfigError, match=f"expected at least 1 cluster, got {count}"):
        fit_clusters(vectors(0), count)


def test_no_vectors_are_refused():
    with pytest.raises(ShapeError, match="expected at least one vector to cluster, got none"):
        fit_clusters(torch.zeros(0, 4), 3)
    with pytest.raises(ShapeError, match="expected at least one vector to cluster, got none"):
        elbow_clusters(torch.zeros(0, 4))


def test_without_faiss_scikit_learn_is_asked(monkeypatch):
    asked = []
    for name in ("_by_faiss", "_by_sklearn"):
        monkeypatch.setattr(
            module, name, lambda points, count, *rest, name=name: asked.append(name) or points[:count].copy()
        )
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    fit_clusters(vectors(0), 3)
    monkeypatch.setattr(module, "find_spec", lambda name: object())
    fit_clusters(vectors(0), 3)
    assert asked == ["_by_sklearn", "_by_faiss"]


# The elbow rule -------------------------------------------------------------------------------------------------------


def naive_elbow(inertias: list[float], elbow: float, most: int) -> int:
    """Return the number of clusters that the rule stops at; ``inertias[k − 1]`` is that of k clusters."""
    count = 1
    while count < most:
        count += 1
        if inertias[count - 1] > elbow * inertias[count - 2]:
            return count
    return count


@given(
    st.lists(st.floats(0.5, 1.0), min_size=14, max_size=14),
    st.sampled_from([0.0, 0.6, 0.9, 0.975, 1.0]),
    st.integers(1, 14),
)
def test_the_elbow_rule_stops_where_a_plain_loop_does(ratios, elbow, most):
    inertias = list(1000 * np.cumprod(ratios))
    tried = []

    def fit(points: Tensor, count: int, **how: int) -> Clusters:
        tried.append((count, how))
        return Clusters(torch.zeros(count, points.shape[1]), float(inertias[count - 1]))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "fit_clusters", fit)
        found = elbow_clusters(vectors(0), elbow=elbow, most=most, seed=7, restarts=2, iterations=5)
    expected = naive_elbow(inertias, elbow, most)
    assert len(found) == expected  # the step that triggered, and not the one before it
    assert found.inertia == inertias[expected - 1]
    assert tried == [(count, {"seed": 7, "restarts": 2, "iterations": 5}) for count in range(1, expected + 1)]


def test_the_elbow_of_blobs_is_one_beyond_their_number(library):
    points, _ = blobs()
    assert len(elbow_clusters(points, elbow=0.85, restarts=10)) == 6


def test_no_more_clusters_are_tried_than_asked_for():
    points = vectors(1, 300, 2)
    assert len(elbow_clusters(points, elbow=1.0, most=4, restarts=1)) == 4
    assert len(elbow_clusters(points, elbow=1.0, most=1)) == 1


def test_the_elbow_stops_where_there_are_no_more_different_vectors():
    points = vectors(2, 3).repeat(5, 1)
    found = elbow_clusters(points, elbow=1.0)
    assert (len(found), found.inertia) == (3, 0.0)
    assert len(elbow_clusters(points[:1].repeat(4, 1))) == 1


# The nearest centre ---------------------------------------------------------------------------------------------------


@given(st.integers(0, 1000), st.integers(1, 12), st.integers(1, 40))
def test_the_nearest_centre_and_the_distances_are_scipys(seed, count, dim):
    points, centres = vectors(seed, 30, dim), vectors(seed + 1, count, dim)
    clusters = Clusters(centres, 0.0)
    expected = cdist(points.double(), centres.double(), "sqeuclidean")
    assert np.allclose(clusters.distances(points), expected, atol=1e-3)
    # Whichever is taken, none is nearer by more than rounding.
    taken = expected[np.arange(30), clusters.nearest(points).numpy()]
    assert np.allclose(taken, expected.min(1), atol=1e-3)


def test_of_equally_near_centres_the_first_is_taken():
    # Small whole numbers: nothing is rounded, so that equally near is equally near.
    centres = torch.tensor([[3.0, 0], [0, 1], [0, -1], [0, 1], [1, 0]])
    points = torch.tensor([[0.0, 0], [0, 2], [0, -5], [2, 0], [1, 1]])
    assert Clusters(centres, 0.0).nearest(points).tolist() == [1, 1, 2, 0, 1]
    distances = cdist(points, centres, "sqeuclidean")
    assert np.array_equal(Clusters(centres, 0.0).distances(points), distances)
    assert Clusters(centres, 0.0).nearest(points).tolist() == distances.argmin(1).tolist()


def test_vectors_far_from_all_centres_have_scipys_nearest():
    centres = vectors(1, 8, 4)
    points = 1000 * torch.nn.functional.normalize(vectors(2, 50, 4), dim=1)
    expected = cdist(points.double(), centres.double())
    assert np.array_equal(Clusters(centres, 0.0).nearest(points), expected.argmin(1))
    assert np.allclose(Clusters(centres, 0.0).distances(points), expected**2, rtol=1e-5)


def test_no_squared_distance_is_below_zero():
    centres = vectors(3, 20, 7) + 30
    assert Clusters(centres, 0.0).distances(centres).min() >= 0


def test_no_vectors_have_no_nearest_centres():
    assert Clusters(vectors(0, 3), 0.0).nearest(torch.zeros(0, 5)).shape == (0,)
