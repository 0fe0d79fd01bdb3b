"""Which tokens of a set of images are foreground: outliers, clusters, votes or weights, and a threshold."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vitfeats.apps.cosegmentation.clusters import Clusters, elbow_clusters, fit_clusters
from vitfeats.apps.cosegmentation.evidence import cluster_saliency, cluster_weights, count_votes, elect, inliers
from vitfeats.apps.cosegmentation.reading import ReadSet
from vitfeats.apps.evaluation import foreground_mask
from vitfeats.configs import CosegmentConfig
from vitfeats.descriptor import Descriptor
from vitfeats.pca import two_means


@dataclass(frozen=True, eq=False)
class Coarse:
    """Foreground on token grids, an entry an image in the order of the :class:`ReadSet`.

    Attributes:
        labels: (rows, cols), the cluster of each token.
        front: (rows, cols), which tokens are foreground.
        score: (rows, cols), 0..1, what speaks for it.
        threshold: Above which a score is foreground; None where clusters decide.
        kept: Whether the image was kept, or is an outlier.
        votes: (clusters,), salient (clusters,) and weights (clusters,), as :class:`Cosegmentation` has them.
    """

    labels: list[Int[Tensor, "_ _"]]
    front: list[Bool[Tensor, "_ _"]]
    score: list[Float[Tensor, "_ _"]]
    threshold: float | None
    kept: list[bool]
    votes: Int[Tensor, " clusters"]
    salient: Bool[Tensor, " clusters"]
    weights: Float[Tensor, " clusters"]


def find_foreground(read: ReadSet, config: CosegmentConfig, seed: int = 0) -> Coarse:
    """Decide which tokens of a set of images are foreground.

    Raises:
        ConfigError: If all images are outliers.
    """
    saliency = [one.saliency for one in read.images]
    kept = [True] * len(saliency)
    if config.outliers is not None:
        kept = inliers(torch.stack([one.cls for one in read.images if one.cls is not None]), config.outliers).tolist()
    if len(saliency) == 1:
        return _alone(read, config)
    shapes = [tuple(values.shape) for values in saliency]
    sample = read.tokens.sample(config.every, config.fit_tokens, read.fitted(kept))
    voting = [index for index, keep in enumerate(kept) if keep]

    def clustered(run: int) -> tuple[list[Tensor], Tensor]:
        """Return the cluster of each token, and the mean saliency of each cluster in each image that votes."""
        clusters = fitted(sample, config.clusters, config.elbow, config, _seed_of(seed, run))
        labels = [clusters.nearest(read.tokens[index]) for index in range(len(saliency))]
        heard = [labels[index] for index in voting], [saliency[index].flatten() for index in voting]
        return labels, cluster_saliency(*heard, len(clusters))

    labels, means = clustered(0)
    votes, weights = count_votes(means, config.threshold), cluster_weights(means)
    salient = elect(votes, len(voting), config.votes)
    threshold = None
    if config.foreground == "votes":
        score, front = saliency, [salient[numbers] for numbers in labels]
    else:
        shared = [weights[numbers] / config.clusterings for numbers in labels]
        for run in range(1, config.clusterings):
            again, means = clustered(run)
            other = cluster_weights(means) / config.clusterings
            shared = [total + other[numbers] for total, numbers in zip(shared, again, strict=True)]
        score = [values * weight.view_as(values) for values, weight in zip(saliency, shared, strict=True)]
        threshold = _threshold([score[index] for index in voting])
        front = [values.flatten() > threshold for values in score]
    return Coarse(
        [numbers.view(shape) for numbers, shape in zip(labels, shapes, strict=True)],
        [inside.view(shape) & keep for inside, shape, keep in zip(front, shapes, kept, strict=True)],
        score,
        threshold,
        kept,
        votes,
        salient,
        weights,
    )


def fitted(sample: Float[Tensor, "n dim"], count: int, elbow: float, config: CosegmentConfig, seed: int) -> Clusters:
    """Return clusters of a sample: so many, or by the elbow rule for 0."""
    how = {"seed": seed, "restarts": config.restarts, "iterations": config.iterations}
    if count:
        return fit_clusters(sample, count, **how)
    return elbow_clusters(sample, elbow=elbow, most=config.most_clusters, **how)


def _seed_of(seed: int, run: int) -> int:
    """Return the seed of one of several clusterings; those of two seeds have none in common."""
    return seed if run == 0 else int(np.random.SeedSequence([seed, run]).generate_state(1)[0]) % 2**31


def _alone(read: ReadSet, config: CosegmentConfig) -> Coarse:
    """Split one image without others."""
    (one,) = read.images
    shape = one.saliency.shape
    if config.alone == "pca" and one.grid.tokens > 1:
        tokens = Descriptor(read.tokens[0][None], one.grid, (one.frame,), read.tap, "")
        front, threshold = foreground_mask(tokens), None
    else:
        threshold = _threshold([one.saliency])
        front = one.saliency > threshold
    nothing = torch.zeros(0)
    labels = torch.zeros(shape, dtype=torch.long)
    return Coarse([labels], [front], [one.saliency], threshold, [True], nothing.long(), nothing.bool(), nothing)


def _threshold(scores: Sequence[Float[Tensor, "_ _"]]) -> float:
    values = torch.cat([score.flatten() for score in scores])
    return two_means(values) if len(values) > 1 else float(values)
