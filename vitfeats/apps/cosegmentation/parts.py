"""Parts of what a set of images shares: foreground tokens, clustered again."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vitfeats.apps.cosegmentation.clusters import Clusters, fit_clusters
from vitfeats.apps.cosegmentation.evidence import common
from vitfeats.apps.cosegmentation.foreground import Coarse, fitted
from vitfeats.apps.cosegmentation.reading import ReadSet
from vitfeats.configs import CosegmentConfig
from vitfeats.errors import ConfigError

_MORE = 3  # clusters tried at most, for each part that is asked for, until enough of them are everywhere
_RESTARTS = 5  # first guesses: there are few tokens and few parts


@dataclass(frozen=True, eq=False)
class Parts:
    """Parts on token grids.

    Attributes:
        labels: For each image (rows, cols), the part of each token, −1 for background.
        count: Number of parts.
    """

    labels: list[Int[Tensor, "_ _"]]
    count: int

    @property
    def front(self) -> list[Bool[Tensor, "_ _"]]:
        """Which tokens are foreground: those that have a part."""
        return [numbers >= 0 for numbers in self.labels]


def find_parts(read: ReadSet, coarse: Coarse, count: int, config: CosegmentConfig, seed: int = 0) -> Parts:
    """Cluster foreground tokens into parts that appear in all images that have a foreground.

    So many clusters are tried, then more, then fewer, until enough of them appear in all images (``part_share``).

    Returns:
        ``count`` parts, or the largest number that was found: at least one. Largest first.

    Raises:
        ConfigError: If no token is foreground.
    """
    front = [inside.flatten() for inside in coarse.front]
    if not any(bool(inside.any()) for inside in front):
        raise ConfigError("expected images that share a foreground, but no token is; try other settings or images")
    if config.stages == 3:
        front = _shared(read, front, config, seed)
    shown = [index for index, inside in enumerate(front) if bool(inside.any())]
    sample = read.tokens.sample(0, config.fit_tokens, [*front, *read.of_crops()])
    best = _parts_of(sample, read, front, shown, 1, config, seed)
    more = range(count, _MORE * count + 1, max(1, count // 4))
    for tried in [*more, *range(count - 1, 1, -1)]:
        if len(best) >= min(count, tried):
            break
        found = _parts_of(sample, read, front, shown, tried, config, seed)
        best = found if len(found) > len(best) else best
    return _numbered(read, coarse, front, shown, best)


def _parts_of(
    sample: Float[Tensor, "n dim"],
    read: ReadSet,
    front: list[Tensor],
    shown: list[int],
    tried: int,
    config: CosegmentConfig,
    seed: int,
) -> Clusters:
    """Return those of so many clusters that appear in all images."""
    restarts = max(_RESTARTS, config.restarts)
    clusters = fit_clusters(sample, tried, seed=seed, restarts=restarts, iterations=config.iterations)
    labels = [clusters.nearest(read.tokens[index][front[index]]) for index in shown]
    return Clusters(clusters.centres[common(labels, len(clusters), config.part_share)], 0.0)


def _numbered(read: ReadSet, coarse: Coarse, front: list[Tensor], shown: list[int], parts: Clusters) -> Parts:
    """Give each token of the foreground the nearest part; number parts by their tokens, most first."""
    labels = {index: parts.nearest(read.tokens[index][front[index]]) for index in shown}
    sizes = torch.stack([torch.bincount(numbers, minlength=len(parts)) for numbers in labels.values()]).sum(0)
    rank = sizes.argsort(descending=True, stable=True).argsort()
    found = []
    for index, inside in enumerate(coarse.front):
        numbers = torch.full((inside.numel(),), -1)
        if index in labels:
            numbers[front[index]] = rank[labels[index]]
        found.append(numbers.view(inside.shape))
    return Parts(found, len(parts))


def _shared(read: ReadSet, front: list[Tensor], config: CosegmentConfig, seed: int) -> list[Bool[Tensor, " _"]]:
    """Return the foreground without clusters of it that too few images have: the second of three stages."""
    sample = read.tokens.sample(0, config.fit_tokens, [*front, *read.of_crops()])
    clusters = fitted(sample, 0, config.part_elbow, config, seed)
    shown = [index for index, inside in enumerate(front) if bool(inside.any())]
    labels = {index: clusters.nearest(read.tokens[index][front[index]]) for index in shown}
    shared = common(list(labels.values()), len(clusters), config.votes)
    if not bool(shared.any()):
        return front
    found = [inside.clone() for inside in front]
    for index, numbers in labels.items():
        found[index][front[index]] = shared[numbers]
    return found
