"""Nearest-neighbour matching between two images, exact and in bounded memory."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vitfeats.descriptor import Descriptor, Points
from vitfeats.errors import ShapeError
from vitfeats.similarity import check_comparable, check_single, similarity_blocks, unit


@dataclass(frozen=True, eq=False)
class Matches:
    """Matched tokens of one pair of images, one row a match.

    Attributes:
        points_a: (n, 2), (x, y) centres in source pixels of image a.
        points_b: (n, 2), (x, y) centres in source pixels of image b; NaN where a row has no match.
        scores: (n,) cosine similarity, −1..1; NaN where a row has no match.
        index_a: (n,) row-major token index in image a.
        index_b: (n,) row-major token index in image b; −1 where a row has no match (only with ``keep_unmatched``).

    Raises:
        ShapeError: If the rows do not fit each other.
    """

    points_a: Float[Tensor, "n 2"]
    points_b: Float[Tensor, "n 2"]
    scores: Float[Tensor, " n"]
    index_a: Int[Tensor, " n"]
    index_b: Int[Tensor, " n"]

    def __post_init__(self) -> None:
        """Check that there are as many rows of each."""
        rows = {len(value) for value in (self.points_a, self.points_b, self.scores, self.index_a, self.index_b)}
        if len(rows) != 1 or self.points_a.shape[1:] != (2,) or self.points_b.shape[1:] != (2,):
            raise ShapeError(
                f"expected n rows of points (n, 2), scores and indices, got {self.points_a.shape} and others"
            )

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.index_a)

    def __repr__(self) -> str:
        """Say how many there are."""
        return f"Matches({len(self)} rows, {int((self.index_b >= 0).sum())} matched)"

    def best(self, count: int) -> "Matches":
        """Return the ``count`` matched rows with the highest scores, best first."""
        matched = (self.index_b >= 0).nonzero()[:, 0]
        return self[matched[self.scores[matched].argsort(descending=True, stable=True)[:count]]]

    def __getitem__(self, rows: Tensor | slice) -> "Matches":
        """Return some of the rows: a slice, indices, or a mask."""
        return Matches(
            self.points_a[rows], self.points_b[rows], self.scores[rows], self.index_a[rows], self.index_b[rows]
        )


def match_nearest(a: Descriptor, b: Descriptor, *, chunk: int | None = None) -> Matches:
    """Match every token of image ``a`` to its most similar token of image ``b``.

    Args:
        a: Descriptor of one image.
        b: Descriptor of one image, with as many channels.
        chunk: Tokens of ``a`` compared at a time; None is what fits 64 MiB. The result does not depend on
            it, but for rounding: which of several equally similar tokens is taken.

    Raises:
        ShapeError: If a descriptor holds more than one image, or the channels differ.
    """
    scores, nearest, _ = _nearest(a, b, chunk)
    return _matches(a, b, torch.arange(a.grid.tokens, device=a.device), nearest, scores)


def match_mutual(a: Descriptor, b: Descriptor, *, keep_unmatched: bool = False, chunk: int | None = None) -> Matches:
    """Match tokens that are each other's most similar one (best buddies; Dekel et al., CVPR 2015).

    Args:
        a: Descriptor of one image.
        b: Descriptor of one image, with as many channels.
        keep_unmatched: Return a row for every token of ``a``, with index −1 and NaN where it has no buddy.
        chunk: Tokens of ``a`` compared at a time; None is what fits 64 MiB. The result does not depend on
            it, but for rounding: which of several equally similar tokens is taken.

    Raises:
        ShapeError: If a descriptor holds more than one image, or the channels differ.
    """
    scores, nearest, back = _nearest(a, b, chunk)
    every = torch.arange(a.grid.tokens, device=a.device)
    mutual = back[nearest] == every
    if keep_unmatched:
        return _matches(a, b, every, nearest.where(mutual, -1), scores)
    return _matches(a, b, every[mutual], nearest[mutual], scores[mutual])


def transfer_points(d1: Descriptor, d2: Descriptor, points: Points) -> Float[Tensor, "n 2"]:
    """Carry points of image 1 to image 2: the centre of the most similar token, for each point.

    Args:
        d1: Descriptor of one image; its features are interpolated at the points.
        d2: Descriptor of one image, with as many channels.
        points: (n, 2), (x, y) in source pixels of image 1.

    Returns:
        (n, 2), (x, y) in source pixels of image 2. Resolution is that of its token grid; a smaller stride refines it.

    Raises:
        ShapeError: If a descriptor holds more than one image, the channels differ, or a point lies outside.
    """
    check_single(d1, d2)
    check_comparable(d1, d2)
    asked, known = unit(d1.at(points)[0]), unit(d2.features[0])
    nearest = [block.argmax(1) for _, block in similarity_blocks(asked, known)]
    return _centres(d2, torch.cat(nearest) if nearest else torch.zeros(0, dtype=torch.long, device=d2.device))


def _nearest(
    a: Descriptor, b: Descriptor, chunk: int | None
) -> tuple[Float[Tensor, " n"], Int[Tensor, " n"], Int[Tensor, " m"]]:
    """Return (best score of each a, its token of b, best token of a for each b), seeing one block at a time."""
    check_single(a, b)
    check_comparable(a, b)
    if chunk is not None and chunk < 1:
        raise ShapeError(f"expected chunk of at least 1, got {chunk}")
    left, right = unit(a.features[0]).detach(), unit(b.features[0]).detach()
    scores, nearest = [], []
    best = right.new_full((b.grid.tokens,), -torch.inf)
    back = torch.zeros(b.grid.tokens, dtype=torch.long, device=right.device)
    for start, block in similarity_blocks(left, right, chunk):
        score, index = block.max(1)
        scores.append(score)
        nearest.append(index)
        column, row = block.max(0)
        better = column > best  # strictly: among equals the first token stays, whatever the chunk
        best = column.where(better, best)
        back = (row + start).where(better, back)
    return torch.cat(scores), torch.cat(nearest), back


def _matches(a: Descriptor, b: Descriptor, index_a: Tensor, index_b: Tensor, scores: Tensor) -> Matches:
    found = index_b >= 0
    points_b = _centres(b, index_b.clamp_min(0))
    points_b = points_b.where(found[:, None], torch.nan)
    return Matches(_centres(a, index_a), points_b, scores.where(found, torch.nan).float(), index_a, index_b)


def _centres(d: Descriptor, index: Int[Tensor, " n"]) -> Float[Tensor, "n 2"]:
    return d.frames[0].to_source(d.grid.centres_of(index))
