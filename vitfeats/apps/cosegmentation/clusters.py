"""Clusters of tokens: k-means, by faiss where it is installed, and the elbow rule for their number."""

from dataclasses import dataclass
from importlib.util import find_spec

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from vitfeats.errors import ConfigError, ShapeError


@dataclass(frozen=True, eq=False)
class Clusters:
    """What k-means found.

    Attributes:
        centres: (count, dim).
        inertia: Sum of the squared distances of the fitted vectors to the centres nearest to them.
    """

    centres: Float[Tensor, "count dim"]
    inertia: float

    def __len__(self) -> int:
        """Return the number of clusters."""
        return len(self.centres)

    def nearest(self, vectors: Float[Tensor, "n dim"]) -> Int[Tensor, " n"]:
        """Return the number of the centre nearest to each vector; the first of equally near ones."""
        return self.distances(vectors).argmin(1)

    def distances(self, vectors: Float[Tensor, "n dim"]) -> Float[Tensor, "n count"]:
        """Return squared distances to the centres, at least 0."""
        squares = vectors.square().sum(1, keepdim=True) + self.centres.square().sum(1)
        return torch.addmm(squares, vectors, self.centres.T, alpha=-2).clamp_min_(0)


def fit_clusters(
    vectors: Float[Tensor, "n dim"], count: int, *, seed: int = 0, restarts: int = 1, iterations: int = 100
) -> Clusters:
    """Find ``count`` clusters by k-means, or fewer where there are not so many different vectors.

    Args:
        vectors: On the CPU.
        count: At least 1.
        seed: The same seed and vectors give the same clusters, with one library and number of threads.
        restarts: First guesses; the one of the smallest inertia is kept.
        iterations: Most iterations for each.

    Raises:
        ConfigError: If ``count`` is below 1.
        ShapeError: If there is no vector, or NaN or infinity among them.
    """
    if count < 1:
        raise ConfigError(f"expected at least 1 cluster, got {count}")
    if not len(vectors):
        raise ShapeError("expected at least one vector to cluster, got none")
    if not bool(vectors.sum(dtype=torch.float64).isfinite()):
        raise ShapeError("expected finite vectors to cluster, got NaN or infinity")
    # Most often the first few tell that there are enough.
    if len(vectors[: 4 * count].unique(dim=0)) <= count:
        different = vectors.unique(dim=0)
        if count >= len(different):  # each is a centre, and no library needs to be asked
            return Clusters(different, 0.0)
    if count == 1:
        centre = vectors.double().mean(0, keepdim=True).to(vectors.dtype)
        return _measured(centre, vectors)
    found = (_by_faiss if find_spec("faiss") else _by_sklearn)(vectors.numpy(), count, seed, restarts, iterations)
    return _measured(torch.from_numpy(found), vectors)


def elbow_clusters(
    vectors: Float[Tensor, "n dim"],
    *,
    elbow: float = 0.975,
    most: int = 14,
    seed: int = 0,
    restarts: int = 10,
    iterations: int = 300,
) -> Clusters:
    """Find clusters whose number one more hardly improves (Amir et al., 2021, appendix).

    k-means with 1, 2, … clusters, until the inertia is more than ``elbow`` times that of one cluster less; the clusters
    of that step are returned.

    Args:
        vectors: On the CPU.
        elbow: 0..1.
        most: Largest number that is tried.
        seed: As for :func:`fit_clusters`; so are restarts and iterations.
        restarts: First guesses.
        iterations: Most iterations for each.

    Raises:
        ShapeError: If there is no vector, or NaN or infinity among them.
    """
    found = fit_clusters(vectors, 1, seed=seed, restarts=restarts, iterations=iterations)
    for count in range(2, most + 1):
        before, found = found, fit_clusters(vectors, count, seed=seed, restarts=restarts, iterations=iterations)
        if found.inertia > elbow * before.inertia or len(found) < count:
            break
    return found


def _measured(centres: Float[Tensor, "count dim"], vectors: Float[Tensor, "n dim"]) -> Clusters:
    exact = Clusters(centres.double(), 0.0)  # a distance is a difference of squares, which may be large
    total = sum(float(exact.distances(part.double()).amin(1).sum()) for part in vectors.split(8192))
    return Clusters(centres, total)


def _by_sklearn(vectors: np.ndarray, count: int, seed: int, restarts: int, iterations: int) -> np.ndarray:
    from sklearn.cluster import KMeans

    means = KMeans(count, random_state=seed, n_init=restarts, max_iter=iterations)  # type: ignore[arg-type] - stub
    return means.fit(vectors).cluster_centers_.astype(vectors.dtype)


def _by_faiss(vectors: np.ndarray, count: int, seed: int, restarts: int, iterations: int) -> np.ndarray:
    import faiss  # type: ignore[import-not-found] - an extra

    means = faiss.Kmeans(
        vectors.shape[1],
        count,
        niter=iterations,
        nredo=restarts,
        seed=seed,
        min_points_per_centroid=1,
        max_points_per_centroid=len(vectors),  # otherwise faiss fits on a sample of its own
    )
    means.train(vectors.astype(np.float32))
    return np.array(means.centroids, dtype=vectors.dtype)
