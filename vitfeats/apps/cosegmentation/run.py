"""Co-segmentation: what a set of images shares, as masks; and its parts."""

import operator
import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int, UInt8
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from vitfeats.api import load_extractor
from vitfeats.apps.cosegmentation.foreground import Coarse, find_foreground
from vitfeats.apps.cosegmentation.parts import Parts, find_parts
from vitfeats.apps.cosegmentation.reading import Read, ReadSet, read_images
from vitfeats.apps.cosegmentation.refine import Method, guided, method_of, refine_mask
from vitfeats.apps.cosegmentation.segments import Cosegmentation, Segment, name_of
from vitfeats.configs import CosegmentConfig
from vitfeats.errors import ConfigError
from vitfeats.extractors.base import Extractor
from vitfeats.pictures import picture_files
from vitfeats.preprocess import ImageLike, load_image
from vitfeats.resize import resize_images, spread_map


def cosegment(
    images: ImageLike | Iterable[ImageLike],
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
    model once. Of each image a mask is kept in memory (of the image as it is refined, a byte a pixel), and a few
    numbers a token; features beyond 64 MiB go to a temporary file. One image alone is split by its own saliency, or
    principal component.

    Args:
        images: Images of any sizes, or a folder of them (and the folders in it). Paths for choice: they are opened when
            they are needed, to be ordered, for features, for edges, and to be drawn.
        model: A name, a module, or an :class:`~vitfeats.Extractor`, which keeps its own size and stride unless
            ``config`` has others. None is the default model. The paper uses ``dino_vits8``.
        config: Settings; None is the preset "default". ``CosegmentConfig.preset("reference")`` is the published recipe.
        seed: Of k-means and crops. The same seed and images, in any order, give the same result on one machine.
        batch_size: Most images in one forward pass.
        skip_broken: Leave out images that cannot be read, or are too long for the model's size, and note them in
            ``failed``, rather than raise.
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
    images: ImageLike | Iterable[ImageLike],
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
    all images (``config.part_share``), more clusters are tried, then fewer, and those that do are taken.

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
    count = _whole("num_parts", num_parts, 1, 100)
    read, coarse, job = _begun(images, model, config, seed, batch_size, skip_broken, progress, device)
    return job.finished(read, coarse, find_parts(read, coarse, count, job.config, job.seed))


def _begun(
    images: ImageLike | Iterable[ImageLike],
    model: Any,
    config: CosegmentConfig | None,
    seed: int,
    batch_size: int,
    skip_broken: bool,
    progress: bool,
    device: str | torch.device,
) -> tuple[ReadSet, Coarse, "_Job"]:
    """Read the images, and find the foreground of their tokens."""
    given = _listed(images)
    seed, batch_size = _whole("seed", seed, 0, 2**31 - 1), _whole("batch_size", batch_size, 1, 2**31 - 1)
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
        if parts is not None:  # the third stage may have left out some of the foreground
            left = [had & ~has for had, has in zip(coarse.front, parts.front, strict=True)]
            score = [values * ~out for values, out in zip(coarse.score, left, strict=True)]
            coarse = replace(coarse, front=parts.front, score=score)
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

    def _part_map(self, one: Read, numbers: Tensor, count: int, image: Tensor) -> UInt8[np.ndarray, "height width"]:
        """Return the part of each pixel, were it foreground: that of the tokens around it, with the image's edges."""
        size = (image.shape[1], image.shape[2])
        maps = torch.stack([(numbers == part).float() for part in range(count)])[None]
        fine = spread_map(maps, one.grid, size)[0]
        if self.method != "none":
            fine = guided(fine, image)
        nearest = _nearest_part(numbers, one, size)
        # Where no part's map is above 0, a mask that grew beyond its tokens has the part of the nearest one.
        return torch.where(fine.amax(0) > 1e-3, fine.argmax(0), nearest).to(torch.uint8).numpy()


def _nearest_part(numbers: Int[Tensor, "rows cols"], one: Read, size: tuple[int, int]) -> Int[Tensor, "height width"]:
    """Return for each pixel the part of the nearest token that has one; 0 where none has."""
    from scipy.ndimage import distance_transform_edt

    if not bool((numbers >= 0).any()):
        return torch.zeros(size, dtype=torch.long)
    where: Any = distance_transform_edt((numbers < 0).numpy(), return_distances=False, return_indices=True)
    filled = torch.from_numpy(numbers.numpy()[tuple(where)])
    return spread_map(filled[None, None].float(), one.grid, size, "nearest")[0, 0].round().long()


def _listed(images: ImageLike | Iterable[ImageLike]) -> list[ImageLike]:
    if isinstance(images, np.ndarray | Tensor):
        return list(images) if images.ndim == 4 else [images]
    if isinstance(images, str | os.PathLike):
        folder = Path(images)
        return list(picture_files(folder)) if folder.is_dir() else [images]
    if isinstance(images, Image.Image):
        return [images]
    if not isinstance(images, Iterable):
        raise ConfigError(f"expected images, or a folder of them, got {type(images).__name__}")
    return list(images)


def _whole(name: str, value: Any, least: int, most: int) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        number = least - 1
    if isinstance(value, bool) or not least <= number <= most:
        raise ConfigError(f"expected {name} as a whole number from {least} to {most}, got {value!r}")
    return number


def halved(extractor: Extractor) -> Extractor:
    """Return an extractor whose tokens are half a patch apart, where they can overlap."""
    patch = extractor.card.patch
    return extractor.resized(stride=patch // 2) if extractor.overlaps and patch % 2 == 0 else extractor


def _extractor(model: Any, config: CosegmentConfig, device: str | torch.device) -> Extractor:
    if isinstance(model, Extractor):
        return model.resized(size=config.size, stride=config.stride)
    extractor = load_extractor(model, size=config.size, stride=config.stride, device=device)
    return halved(extractor) if config.stride is None else extractor
