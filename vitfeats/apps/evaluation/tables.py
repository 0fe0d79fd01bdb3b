"""Small tables that need no data set: how well descriptors match a stereo pair and warped photographs.

Each carries the rows that a fool would get: the same place in the other image, raw colours, an untrained network.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vitfeats.apps.evaluation.datasets import Pair, StereoPair
from vitfeats.apps.evaluation.describing import Describe
from vitfeats.apps.evaluation.pck import pck
from vitfeats.descriptor import Descriptor
from vitfeats.matching import Matches, match_mutual, transfer_points
from vitfeats.preprocess import ImageLike, Preprocess, load_image
from vitfeats.taps import Tap


@dataclass(frozen=True)
class Row:
    """One row of a table.

    Attributes:
        name: What was measured.
        matches: How many matches or points were counted.
        shares: What share of them lies within each threshold, 0..1, by threshold.
    """

    name: str
    matches: int
    shares: Mapping[float, float]


def stereo_table(
    methods: Mapping[str, Describe], pair: StereoPair | None = None, *, within: Sequence[float] = (8, 16, 32)
) -> list[Row]:
    """Measure mutual matches of the stereo pair against its disparity.

    Args:
        methods: Descriptors to compare, by name.
        pair: The pair; None reads it.
        within: Thresholds in source pixels.

    Returns:
        A row "identity" (each left token matched to the same place on the right), then one a method. Matches whose
        true place is not known are not counted.
    """
    pair = StereoPair() if pair is None else pair
    rows: list[Row] = []
    for name, describe in methods.items():
        left, right = describe(pair.left), describe(pair.right)
        if not rows:
            rows.append(_stereo_row("identity", _same_place(left, right), pair, within))
        rows.append(_stereo_row(name, match_mutual(left, right), pair, within))
    return rows


def warp_table(methods: Mapping[str, Describe], pairs: Sequence[Pair], *, alpha: float = 0.1) -> list[Row]:
    """Measure PCK of points carried to warped images, the mean over images.

    Args:
        methods: Descriptors to compare, by name.
        pairs: Image pairs, for example :class:`~vitfeats.apps.evaluation.WarpedImages`.
        alpha: Fraction of the target image's longer side that counts as correct.

    Returns:
        A row "identity" (the answer "the same place"), then one a method.
    """
    names = ["identity", *methods]
    scores: dict[str, list[float]] = {name: [] for name in names}
    points = 0
    for pair in pairs:
        image_a, image_b = load_image(pair.image_a), load_image(pair.image_b)
        size = (float(image_b.shape[1]), float(image_b.shape[2]))
        points += len(pair.points_a)
        scores["identity"].append(pck(pair.points_a, pair.points_b, size, alpha=alpha))
        for name, describe in methods.items():
            carried = transfer_points(describe(image_a), describe(image_b), pair.points_a)
            scores[name].append(pck(carried, pair.points_b, size, alpha=alpha))
    return [Row(name, points, {alpha: sum(scores[name]) / max(1, len(scores[name]))}) for name in names]


def raw_patches(image: ImageLike, preprocess: Preprocess) -> Descriptor:
    """Return a descriptor of the patches' own pixels, on the grid of a model: what matching without a model gets."""
    batch = preprocess(image)
    patches = F.unfold(batch.pixels, preprocess.patch, stride=preprocess.stride).transpose(1, 2).contiguous()
    return Descriptor(patches, batch.grid, batch.frames, Tap("token", 0), "raw RGB patches")


def _stereo_row(name: str, matches: Matches, pair: StereoPair, within: Sequence[float]) -> Row:
    truth, known = pair.truth(matches.points_a)
    distance = (matches.points_b.cpu() - truth).norm(dim=1)[known]
    return Row(name, int(known.sum()), {limit: _share(distance <= limit) for limit in within})


def _share(hits: Tensor) -> float:
    return float(hits.float().mean()) if len(hits) else float("nan")


def _same_place(a: Descriptor, b: Descriptor) -> Matches:
    index = torch.arange(a.grid.tokens)
    return Matches(
        a.frames[0].to_source(a.grid.centres_of(index)),
        b.frames[0].to_source(b.grid.centres_of(index)),
        torch.ones(len(index)),
        index,
        index,
    )
