"""Co-segmentation: what a set of images shares, as masks; and its parts."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm import tqdm

from vitfeats.api import load_extractor
from vitfeats.apps.cosegmentation.clusters import Clusters, elbow_clusters, fit_clusters
from vitfeats.apps.cosegmentation.evidence import cluster_saliency, cluster_weights, common, count_votes, elect, inliers
from vitfeats.apps.cosegmentation.reading import Read, ReadSet, read_images
from vitfeats.apps.cosegmentation.refine import Method, guided, method_of, refine_mask
from vitfeats.apps.cosegmentation.segments import Cosegmentation, Segment, name_of
from vitfeats.apps.evaluation import foreground_mask
from vitfeats.configs import CosegmentConfig
from vitfeats.descriptor import Descriptor
from vitfeats.errors import ConfigError
from vitfeats.extractors.base import Extractor
from vitfeats.pca import two_means
from vitfeats.preprocess import ImageLike, load_image
from vitfeats.resize import resize_images, spread_map

_MORE_PARTS = 3  # clusters tried at most, for each part that is asked for, until enough of them are everywhere


def cosegment(
    images: ImageLike | Sequence[ImageLike],
    *,
    model: Any = None,
    config: CosegmentConfig | None = None,
    seed: int = 0,
    batch_size: int = 8,
    skip_broken: bool = False,
    progress: bool = False,
    device: str | torch.device = "auto",
) -> Cosegmentation:
    """Find the foreground that a set of images shares: tokens are clustered, and saliency says which clusters.

    After Amir et al., Deep ViT Features as Dense Visual Descriptors, 2021, section 5.1. Each image goes through the
    model once. Memory does not grow with the number of images, but for their masks (on the image as it is refined, a
    byte a pixel): tokens go to a temporary file. One image alone is split by its own saliency, or principal component.

    Args:
        images: A sequence of images of any sizes, paths for choice: they are read twice, for features and for edges.
        model: A name, a module, or an :class:`~vitfeats.Extractor`, which keeps its own size and stride unless
            ``config`` has others. None is the default model. The paper uses ``dino_vits8``.
        config: Settings; None is the preset "default". ``CosegmentConfig.preset("reference")`` is the published recipe.
        seed: Of k-means and crops. The same seed and images, in any order, give the same result on one machine.
        batch_size: Most images in one forward pass.
        skip_broken: Leave out images that cannot be read, and note them in ``failed``, rather than raise.
        progress: Show progress bars on standard error.
        device: Where a model that is loaded by name goes.

    Returns:
        A sequence with a :class:`~vitfeats.apps.cosegmentation.Segment` for each image, and the clusters' votes.

    Raises:
        ImageError: If an image cannot be read, unless ``skip_broken``.
        ConfigError: If there is no image, or settings do not fit the model or the images.
        UnknownFacetError: If ``saliency="attention"``, and the model has none of CLS.
        ShapeError: If an image is too long for the size, features are not finite, or there is no such head.
        MissingDependencyError: If ``refine="grabcut"``, and OpenCV is not installed.
        UnknownModelError, WeightsUnavailableError: As for :func:`~vitfeats.load_extractor`.

    Example:
        >>> import vitfeats as vf
        >>> found = vf.cosegment(list(vf.samples.portrait_pair()), device="cpu")
        >>> found
        Cosegmentation(2 images, 40 clusters, key@11 of mini)
        >>> found[1].mask.shape, found[1].cutout().mode
        ((600, 512), 'RGBA')
    """
    read, coarse, job = _begun(images, model, config, seed, batch_size, skip_broken, progress, device)
    return job.finished(read, coarse, None)


def part_cosegment(
    images: ImageLike | Sequence[ImageLike],
    num_parts: int = 4,
    *,
    model: Any = None,
    config: CosegmentConfig | None = None,
    seed: int = 0,
    batch_size: int = 8,
    skip_broken: bool = False,
    progress: bool = False,
    device: str | torch.device = "auto",
) -> Cosegmentation:
    """Find the parts of what a set of images shares: the same part has the same number in all images.

    After Amir et al., 2021, section 5.2: tokens of the foreground are clustered again. Where a part does not appear in
    all images (``config.part_share``), more clusters are tried, and those that do are taken.

    Args:
        images: As for :func:`cosegment`; so are the others.
        num_parts: 1 to 100. There are fewer where no number of clusters gives as many that appear in all images.
        model: Which reads.
        config: Settings.
        seed: Of k-means and crops.
        batch_size: Most images in one forward pass.
        skip_broken: Leave out images that cannot be read.
        progress: Show progress bars.
        device: Where a model that is loaded by name goes.

    Returns:
        As :func:`cosegment` does; segments have ``parts``, numbered by their size over all images, largest first.

    Raises:
        ConfigError: If ``num_parts`` is out of its range, or no image has a foreground.
        ImageError, ShapeError, UnknownFacetError, MissingDependencyError, UnknownModelError, WeightsUnavailableError:
            As :func:`cosegment` does.
    """
    if not isinstance(num_parts, int) or not 1 <= num_parts <= 100:
        raise ConfigError(f"expected num_parts from 1 to 100, got {num_parts!r}")
    read, coarse, job = _begun(images, model, config, seed, batch_size, skip_broken, progress, device)
    return job.finished(read, coarse, find_parts(read, coarse, num_parts, job.config, seed))


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


@dataclass(frozen=True, eq=False)
class Parts:
    """Parts on token grids: ``labels`` (rows, cols) an image, −1 for background, and their number."""

    labels: list[Int[Tensor, "_ _"]]
    count: int


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
        clusters = _fitted(sample, config.clusters, config.elbow, config, _seed_of(seed, run))
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


def find_parts(read: ReadSet, coarse: Coarse, count: int, config: CosegmentConfig, seed: int = 0) -> Parts:
    """Cluster foreground tokens into parts that appear in all images.

    Raises:
        ConfigError: If no token is foreground.
    """
    front = [inside.flatten() for inside in coarse.front]
    with_object = [index for index, inside in enumerate(front) if bool(inside.any())]
    if not with_object:
        raise ConfigError("expected images that share a foreground, but no token is; try other settings or images")
    if config.stages == 3:
        front = _shared(read, front, with_object, config, seed)
        with_object = [index for index, inside in enumerate(front) if bool(inside.any())]
    sample = read.tokens.sample(
        config.every if len(with_object) > 50 else 0, config.fit_tokens, [*front, *read.of_crops()]
    )
    best: tuple[Clusters, Tensor] | None = None
    for tried in range(count, _MORE_PARTS * count + 1):
        clusters = fit_clusters(
            sample, tried, seed=seed, restarts=max(5, config.restarts), iterations=config.iterations
        )
        labels = [clusters.nearest(read.tokens[index][front[index]]) for index in with_object]
        everywhere = common(labels, len(clusters), config.part_share)
        if best is None or int(everywhere.sum()) > int(best[1].sum()):
            best = clusters, everywhere
        if int(everywhere.sum()) >= count or len(clusters) < tried:
            break
    assert best is not None
    clusters, everywhere = best
    sizes = torch.zeros(len(clusters), dtype=torch.long)
    for index in with_object:
        sizes += torch.bincount(clusters.nearest(read.tokens[index][front[index]]), minlength=len(clusters))
    # Largest first; where none is in all images, the largest one stands for all.
    ranked = (sizes * everywhere if bool(everywhere.any()) else sizes).argsort(descending=True, stable=True)
    chosen = Clusters(clusters.centres[ranked[: max(1, min(count, int(everywhere.sum())))]], 0.0)
    found = []
    for index, inside in enumerate(coarse.front):
        numbers = torch.full((inside.numel(),), -1)
        numbers[front[index]] = chosen.nearest(read.tokens[index][front[index]])
        found.append(numbers.view(inside.shape))
    return Parts(found, len(chosen))


def _shared(
    read: ReadSet, front: list[Tensor], with_object: list[int], config: CosegmentConfig, seed: int
) -> list[Bool[Tensor, " _"]]:
    """Return the foreground without clusters of it that too few images have: the second of three stages."""
    sample = read.tokens.sample(0, config.fit_tokens, [*front, *read.of_crops()])
    clusters = _fitted(sample, 0, config.part_elbow, config, seed)
    labels = {index: clusters.nearest(read.tokens[index][front[index]]) for index in with_object}
    shared = common(list(labels.values()), len(clusters), config.votes)
    if not bool(shared.any()):
        return front
    found = [inside.clone() for inside in front]
    for index, numbers in labels.items():
        found[index][front[index]] = shared[numbers]
    return found


def _fitted(sample: Tensor, count: int, elbow: float, config: CosegmentConfig, seed: int) -> Clusters:
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


def _begun(
    images: ImageLike | Sequence[ImageLike],
    model: Any,
    config: CosegmentConfig | None,
    seed: int,
    batch_size: int,
    skip_broken: bool,
    progress: bool,
    device: str | torch.device,
) -> tuple[ReadSet, Coarse, "_Job"]:
    """Read the images, and find the foreground of their tokens."""
    given: list[ImageLike] = list(images) if isinstance(images, list | tuple) else [images]  # type: ignore[list-item]
    if isinstance(images, np.ndarray | Tensor) and images.ndim == 4:
        given = list(images)
    if not isinstance(seed, int) or not 0 <= seed < 2**31:
        raise ConfigError(f"expected a seed from 0 to {2**31 - 1}, got {seed!r}")
    settings = config or CosegmentConfig()
    method = method_of(settings.refine)  # before the work begins
    extractor = _extractor(model, settings, device)
    failed: dict[int, str] = {}
    read = read_images(
        given,
        extractor,
        settings,
        seed=seed,
        batch_size=batch_size,
        broken=failed if skip_broken else None,
        progress=progress,
    )
    coarse = find_foreground(read, settings, seed)
    return read, coarse, _Job(given, settings, extractor.card.name, method, seed, failed, progress)


@dataclass(frozen=True, eq=False)
class _Job:
    """What is needed to bring tokens to pixels."""

    images: list[ImageLike]
    config: CosegmentConfig
    model: str
    method: Method
    seed: int
    failed: dict[int, str]
    progress: bool

    def finished(self, read: ReadSet, coarse: Coarse, parts: Parts | None) -> Cosegmentation:
        """Refine the masks; return all that was found, in the order in which the images were given."""
        made: dict[int, Segment] = {}
        with tqdm(total=len(read.images), unit="image", desc="masks", disable=not self.progress) as bar:
            for index, one in enumerate(read.images):
                made[one.place] = self._segment(one, coarse, parts, index)
                bar.update()
        return Cosegmentation(
            tuple(made[place] for place in sorted(made)),
            coarse.votes,
            coarse.salient,
            coarse.weights,
            self.config,
            self.model,
            str(read.tap),
            self.method,
            self.seed,
            0 if parts is None else parts.count,
            self.failed,
        )

    def _segment(self, one: Read, coarse: Coarse, parts: Parts | None, index: int) -> Segment:
        image = load_image(self.images[one.place])
        scale = min(1.0, self.config.refine_size / min(image.shape[1:]))
        size = (max(1, round(image.shape[1] * scale)), max(1, round(image.shape[2] * scale)))
        small = resize_images(image[None].cpu(), size)[0].detach()
        score = spread_map(coarse.score[index][None, None], one.grid, size)[0, 0]
        inside = coarse.front[index].float()
        if coarse.threshold is None or not coarse.kept[index]:
            front = spread_map(inside[None, None], one.grid, size)[0, 0] > 0.5
        else:  # the score tells where, between two tokens, the edge is
            front = score > coarse.threshold
        alpha = refine_mask(small, front, score, self.method, seed=self.seed)
        found = Segment(
            self.images[one.place],
            name_of(self.images[one.place], one.place),
            alpha,
            coarse.labels[index],
            coarse.score[index],
            one.grid,
            one.frame,
            not coarse.kept[index],
        )
        if parts is None:
            return found
        numbers = parts.labels[index]
        return replace(found, labels=numbers, part_map=self._part_map(one, numbers, parts.count, small))

    def _part_map(self, one: Read, numbers: Tensor, count: int, image: Tensor) -> Int[np.ndarray, "height width"]:
        """Return the part of each pixel, were it foreground: that of the tokens around it, with the image's edges."""
        size = (image.shape[1], image.shape[2])
        maps = torch.stack([(numbers == part).float() for part in range(count)])[None]
        fine = spread_map(maps, one.grid, size)[0]
        if self.method != "none":
            fine = guided(fine, image)
        nearest = _nearest_part(numbers, one, size)
        # Where no part's map is above 0, a mask that grew beyond its tokens has the part of the nearest one.
        return torch.where(fine.amax(0) > 1e-3, fine.argmax(0), nearest).numpy()


def _nearest_part(numbers: Int[Tensor, "rows cols"], one: Read, size: tuple[int, int]) -> Int[Tensor, "height width"]:
    """Return for each pixel the part of the nearest token that has one; 0 where none has."""
    from scipy.ndimage import distance_transform_edt

    if not bool((numbers >= 0).any()):
        return torch.zeros(size, dtype=torch.long)
    where: Any = distance_transform_edt((numbers < 0).numpy(), return_distances=False, return_indices=True)
    filled = torch.from_numpy(numbers.numpy()[tuple(where)])
    return spread_map(filled[None, None].float(), one.grid, size, "nearest")[0, 0].round().long()


def halved(extractor: Extractor) -> Extractor:
    """Return an extractor whose tokens are half a patch apart, where they can overlap."""
    patch = extractor.card.patch
    return extractor.resized(stride=patch // 2) if extractor.overlaps and patch % 2 == 0 else extractor


def _extractor(model: Any, config: CosegmentConfig, device: str | torch.device) -> Extractor:
    if isinstance(model, Extractor):
        return model.resized(size=config.size, stride=config.stride)
    extractor = load_extractor(model, size=config.size, stride=config.stride, device=device)
    return halved(extractor) if config.stride is None else extractor
