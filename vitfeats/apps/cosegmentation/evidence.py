"""What speaks for foreground: saliency of tokens, and what clusters, votes and CLS make of it over a set of images."""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vitfeats.descriptor import Descriptor
from vitfeats.errors import ConfigError
from vitfeats.similarity import check_single, unit

_FLAT = 1e-6  # a range of saliency that only rounding makes


def border_saliency(d: Descriptor, neighbours: int = 5) -> Float[Tensor, "rows cols"]:
    """Return how little each token is like those at the border of its image, stretched to 0..1.

    1 − the mean cosine similarity to the ``neighbours`` most similar tokens of the outermost rows and columns. What
    reaches the border is mostly background (Wei et al., Geodesic Saliency Using Background Priors, ECCV 2012), and a
    token need not be like all of it, only like some. It needs no CLS, and looks at features that were not trained to
    attend to objects.

    Args:
        d: A descriptor of one image.
        neighbours: At least 1; all of them where the border has fewer.

    Returns:
        On the token grid; 0 everywhere where no token differs from the border.

    Raises:
        ShapeError: If there is more than one image.
        ConfigError: If ``neighbours`` is below 1.
    """
    check_single(d)
    if neighbours < 1:
        raise ConfigError(f"expected neighbours of at least 1, got {neighbours}")
    tokens = unit(d.features[0].detach().float())
    border = torch.ones(d.grid.rows, d.grid.cols, dtype=torch.bool, device=d.device)
    border[1:-1, 1:-1] = False
    alike = tokens @ tokens[border.flatten()].T
    near = alike.topk(min(neighbours, alike.shape[1]), 1).values.mean(1)
    return stretched(1 - near).view(d.grid.rows, d.grid.cols)


def stretched(values: Float[Tensor, " *shape"]) -> Float[Tensor, " *shape"]:
    """Return values stretched to 0..1; zeros where all are the same."""
    low, high = values.min(), values.max()
    return torch.zeros_like(values) if float(high - low) < _FLAT else (values - low) / (high - low)


def cluster_saliency(
    labels: Sequence[Int[Tensor, " _"]], saliency: Sequence[Float[Tensor, " _"]], count: int
) -> Float[Tensor, "images count"]:
    """Return the mean saliency of each cluster's tokens in each image; NaN where an image has none of them.

    Args:
        labels: Of each image (tokens,), the cluster of each token, 0..count − 1.
        saliency: Of each image (tokens,), that of each token.
        count: Number of clusters.
    """
    rows = []
    for numbers, values in zip(labels, saliency, strict=True):
        total = torch.zeros(count, dtype=torch.float64).index_add_(0, numbers, values.double())
        rows.append(total / torch.bincount(numbers, minlength=count))
    return torch.stack(rows).float()


def count_votes(means: Float[Tensor, "images count"], threshold: float) -> Int[Tensor, " count"]:
    """Return in how many images each cluster is salient: its mean saliency is above the threshold."""
    return (means > threshold).sum(0)


def elect(votes: Int[Tensor, " count"], images: int, share: float) -> Bool[Tensor, " count"]:
    """Return which clusters have the votes of ``share`` of the images, rounded up; at least one vote."""
    # Rounded first: 0.7 of 10 images are 7, and not 7.000000000000001, rounded up.
    return votes >= max(1, math.ceil(round(share * images, 9)))


def cluster_weights(means: Float[Tensor, "images count"]) -> Float[Tensor, " count"]:
    """Return the mean saliency of each cluster over all images, stretched to 0..1; 0 in images without it.

    A cluster that is salient in one image alone is weak, and one at the borders of all images, too: a soft vote. Of a
    single cluster the weight is 1.
    """
    mean = means.nan_to_num(0).mean(0)
    return torch.ones_like(mean) if len(mean) == 1 else stretched(mean)


def inliers(cls: Float[Tensor, "images dim"], least: float) -> Bool[Tensor, " images"]:
    """Return which images' CLS has a cosine of at least ``least`` to the mean CLS (Amir et al., 2021).

    Raises:
        ConfigError: If none has.
    """
    cosine = unit(cls) @ unit(cls.mean(0))
    kept = cosine >= least - _FLAT  # of one image the cosine is 1, but for rounding
    if not bool(kept.any()):
        raise ConfigError(
            f"expected outliers= that some image passes, got {least}; the cosines go up to {float(cosine.max()):.3f}"
        )
    return kept


def common(labels: Sequence[Int[Tensor, " _"]], count: int, share: float) -> Bool[Tensor, " count"]:
    """Return which clusters appear in ``share`` of the images, rounded up.

    Args:
        labels: Of each image (tokens,), the clusters of its tokens.
        count: Number of clusters.
        share: 0..1.
    """
    present = torch.stack([torch.bincount(numbers, minlength=count) > 0 for numbers in labels])
    return elect(present.sum(0), len(labels), share)
