"""Matching between two images, exact and in bounded memory: nearest, mutual, ratio test, transport, best buddies."""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from vitfeats.descriptor import Descriptor, Points
from vitfeats.errors import ConfigError, MissingDependencyError, ShapeError
from vitfeats.similarity import check_comparable, check_finite, check_single, rows_at_a_time, similarity_blocks, unit

Refine = Literal["nearest", "soft", "window"]
Backend = Literal["torch", "faiss"]

_PLAIN = 60.0  # exponents that far apart, and their sums, stay within float32: e⁻⁶⁰ is 9e-27


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
        chunk: Tokens of ``a`` compared at a time; None is blocks of 16 MiB. The result does not depend on it,
            but for rounding: which of several equally similar tokens is taken.

    Raises:
        ShapeError: If a descriptor holds more than one image, or the channels differ.
    """
    found = _nearest(a, b, chunk)
    return _matches(a, b, torch.arange(a.grid.tokens, device=a.device), found.nearest, found.scores)


def match_mutual(a: Descriptor, b: Descriptor, *, keep_unmatched: bool = False, chunk: int | None = None) -> Matches:
    """Match tokens that are each other's most similar one (best buddies; Dekel et al., CVPR 2015).

    Args:
        a: Descriptor of one image.
        b: Descriptor of one image, with as many channels.
        keep_unmatched: Return a row for every token of ``a``, with index −1 and NaN where it has no buddy.
        chunk: Tokens of ``a`` compared at a time; None is blocks of 16 MiB. The result does not depend on it,
            but for rounding: which of several equally similar tokens is taken.

    Raises:
        ShapeError: If a descriptor holds more than one image, or the channels differ.
    """
    found = _nearest(a, b, chunk)
    return _only(a, b, found.nearest, found.scores, _returns(found), keep_unmatched)


def match_ratio(
    a: Descriptor,
    b: Descriptor,
    *,
    ratio: float = 0.8,
    mutual: bool = False,
    keep_unmatched: bool = False,
    chunk: int | None = None,
) -> Matches:
    """Match tokens whose nearest token is much nearer than the second nearest (Lowe, IJCV 2004, section 7.1).

    Distances are Euclidean between unit vectors, √(2 − 2·cosine), 0..2. A token is matched if that to its nearest
    token is smaller than ``ratio`` times that to the second; not if both are 0, for then either may be the right one.

    Args:
        a: Descriptor of one image.
        b: Descriptor of one image of at least two tokens, with as many channels.
        ratio: Above 0, at most 1; 0.8 is Lowe's. With 1 only tokens with two equally near ones are left out.
        mutual: Whether the two must also be each other's most similar token, as in :func:`match_mutual`.
        keep_unmatched: Return a row for every token of ``a``, with index −1 and NaN where it has no match.
        chunk: Tokens of ``a`` compared at a time; None is blocks of 16 MiB.

    Raises:
        ShapeError: If a descriptor holds more than one image, the channels differ, or ``b`` has a single token.
        ConfigError: If the ratio is not in this range.
    """
    if not 0 < ratio <= 1:
        raise ConfigError(f"expected a ratio above 0 and at most 1, got {ratio}; try 0.8")
    if b.grid.tokens < 2:
        raise ShapeError("expected b of at least 2 tokens, as the second nearest is asked for; try match_nearest")
    found = _nearest(a, b, chunk, second=True)
    nearest, other = (_distances(a, b, index) for index in (found.nearest, found.second))
    passed = nearest < ratio * other
    if mutual:
        passed &= _returns(found)
    return _only(a, b, found.nearest, found.scores, passed, keep_unmatched)


def match_sinkhorn(
    a: Descriptor,
    b: Descriptor,
    *,
    epsilon: float = 0.05,
    iterations: int = 50,
    dustbin: float | None = None,
    threshold: float = 0.0,
    keep_unmatched: bool = False,
) -> Matches:
    """Match tokens that give each other most in the entropic optimal transport between the images.

    The plan is :func:`vitfeats.matching.transport_plan` of the cosine similarities. With ``dustbin`` a token may also
    go to nobody, and is unmatched where it gives most of all to the dustbin. Scores are cosine similarities, as those
    of every matcher. Memory is about four times tokens_a · tokens_b · 4 bytes, as a plan needs every pair at once; each
    iteration goes over all of them twice, so that this takes several times as long as :func:`match_mutual`.

    Args:
        a: Descriptor of one image.
        b: Descriptor of one image, with as many channels.
        epsilon: Strength of the entropy, in units of similarity; smaller is nearer to one-to-one, and needs more
            iterations.
        iterations: Sinkhorn iterations.
        dustbin: Similarity of every token to the dustbin; None is without.
        threshold: Least share of its mass, 0..1, that the token with less of it gives to the other; 0.2 is
            SuperGlue's.
        keep_unmatched: Return a row for every token of ``a``, with index −1 and NaN where it has no match.

    Raises:
        ShapeError: If a descriptor holds more than one image, or the channels differ.
        ConfigError: If a setting is out of its range.
    """
    if not 0 <= threshold < 1:
        raise ConfigError(f"expected a threshold of at least 0 and below 1, got {threshold}; 0.2 is SuperGlue's")
    left, right = _units(a, b)
    similarity = left @ right.T
    plan = transport_plan(similarity, epsilon=epsilon, iterations=iterations, dustbin=dustbin)
    n, m = similarity.shape
    mass, nearest = plan[:n].max(1)
    binned = nearest == m  # the dustbin is the last column
    nearest = nearest.clamp_max(m - 1)
    share = mass * (max(n, m) if dustbin is None else n + m)
    every = torch.arange(n, device=a.device)
    passed = ~binned & (plan[:, :m].argmax(0)[nearest] == every) & (share > threshold)
    scores = similarity.gather(1, nearest[:, None])[:, 0]
    return _only(a, b, nearest, scores, passed, keep_unmatched)


def transport_plan(
    similarity: Float[Tensor, "n m"], *, epsilon: float = 0.05, iterations: int = 50, dustbin: float | None = None
) -> Float[Tensor, "rows cols"]:
    """Return the plan P of largest ⟨P, similarity⟩ + ``epsilon`` · entropy(P) between tokens of equal mass, 1 in all.

    Cuturi, Sinkhorn Distances, NIPS 2013, algorithm 1, in the log domain, where a small ``epsilon`` underflows nothing.
    Rows of mass 1/n, columns of mass 1/m. With ``dustbin``, as in Sarlin et al., SuperGlue, CVPR 2020, section 3.2, a
    row and a column of that similarity are added; a token has mass 1/(n + m), and each dustbin could take all tokens
    of the other side. Differentiable. Takes about three times the memory of ``similarity``; where nothing underflows
    (similarities within 60 · ``epsilon`` of each other) the logarithms are left out, which is several times as fast.

    Args:
        similarity: Of every token of one image to every token of the other; minus a cost, if there is one.
        epsilon: Strength of the entropy, in the unit of ``similarity``; at least a 10,000th of the largest
            similarity, below which float32 rounds the masses.
        iterations: How often columns and rows are brought to their mass, at least 1. The rows have it at the end; the
            columns nearly, the better the more often.
        dustbin: Similarity of every token to nobody, finite; None is without.

    Returns:
        (n, m), or (n + 1, m + 1) with a dustbin, the last row and column. At least float32.

    Raises:
        ShapeError: If ``similarity`` is empty, or not finite.
        ConfigError: If a setting is not in its range.
    """
    if not epsilon > 0:
        raise ConfigError(f"expected epsilon above 0, got {epsilon}; try 0.05")
    if iterations < 1:
        raise ConfigError(f"expected iterations of at least 1, got {iterations}; try 50")
    if not similarity.numel():
        raise ShapeError(f"expected similarities of at least one token each, got {tuple(similarity.shape)}")
    if dustbin is not None and not math.isfinite(dustbin):
        raise ConfigError(f"expected a finite dustbin, got {dustbin}; None is without")
    largest = max(float(similarity.detach().abs().max()), abs(dustbin or 0.0))
    if not math.isfinite(largest):
        raise ShapeError("expected finite similarities, got NaN or infinity")
    if epsilon < 1e-4 * largest:
        raise ConfigError(
            f"expected epsilon of at least 1e-4 times the largest similarity ({largest:.3g}), got {epsilon}"
        )
    n, m = similarity.shape
    scores = similarity.to(torch.promote_types(similarity.dtype, torch.float32)) / epsilon
    log_a, log_b = scores.new_full((n,), 1 / n).log(), scores.new_full((m,), 1 / m).log()
    if dustbin is not None:
        scores = F.pad(scores, (0, 1, 0, 1), value=dustbin / epsilon)
        log_a = scores.new_tensor([1.0] * n + [m]).div(n + m).log()
        log_b = scores.new_tensor([1.0] * m + [n]).div(n + m).log()
    low, high = (float(value) for value in scores.detach().aminmax())
    if high - low < _PLAIN:
        return _scaled((scores - high).exp(), log_a.exp(), log_b.exp(), iterations)
    u = torch.zeros_like(log_a)
    v = torch.zeros_like(log_b)
    for _ in range(iterations):
        v = log_b - (scores + u[:, None]).logsumexp(0)
        u = log_a - (scores + v).logsumexp(1)
    return (scores + u[:, None]).add_(v).exp_()


def correspond(
    a: Descriptor,
    b: Descriptor,
    *,
    saliency_a: Shaped[Tensor, "*a rows_a cols_a"] | None = None,
    saliency_b: Shaped[Tensor, "*b rows_b cols_b"] | None = None,
    most: int = 10,
    threshold: float = 0.05,
    seed: int = 0,
) -> Matches:
    """Return a few good matches, spread over the parts of the object.

    As in Amir et al., Deep ViT Features as Dense Visual Descriptors, 2021, on point correspondences: best buddies of
    which both ends are foreground; k-means over the pairs' descriptors (the two end to end, brought to length 1
    together); of each cluster the pair of highest mean saliency.

    Args:
        a: Descriptor of one image.
        b: Descriptor of one image, with as many channels.
        saliency_a: (rows, cols) or (1, rows, cols) on the grid of ``a``, 0..1, as :func:`~vitfeats.saliency` returns
            it, or a mask of booleans; None takes every token for foreground. Without both, pairs are ranked by their
            cosine similarity.
        saliency_b: The same for ``b``.
        most: Number of clusters, and so of matches, where there are so many different pairs.
        threshold: A token is foreground if its saliency is above.
        seed: Of k-means (scikit-learn's, ten starts); the same seed gives the same matches.

    Returns:
        At most ``most`` matches, highest mean saliency first; none where no pair is left.

    Raises:
        ShapeError: If a descriptor holds more than one image, the channels differ, or a saliency map is on another
            grid.
        ConfigError: If ``most`` is below 1.
    """
    if not isinstance(most, int) or most < 1:
        raise ConfigError(f"expected most as a whole number of at least 1, got {most!r}; the paper shows 10")
    maps = _saliency_of(a, saliency_a, "a"), _saliency_of(b, saliency_b, "b")
    found = match_mutual(a, b)
    indices = found.index_a, found.index_b
    seen = [values[index] for values, index in zip(maps, indices, strict=True) if values is not None]
    rank = found.scores
    if seen:
        rank = torch.stack(seen).mean(0)
        foreground = (torch.stack(seen) > threshold).all(0)
        found, rank = found[foreground], rank[foreground]
    if not len(found):
        return found
    pairs = torch.cat([a.features[0, found.index_a], b.features[0, found.index_b]], 1)
    labels = _clusters(unit(pairs.detach().float()), most, seed)
    chosen: dict[int, int] = {}
    for row in rank.argsort(descending=True, stable=True).tolist():
        chosen.setdefault(labels[row], row)
    return found[torch.tensor(list(chosen.values()), device=a.device)]


def transfer_points(
    d1: Descriptor,
    d2: Descriptor,
    points: Points,
    *,
    refine: Refine = "nearest",
    temperature: float = 0.02,
    window: int = 7,
) -> Float[Tensor, "n 2"]:
    """Carry points of image 1 to image 2, each to where the most similar token is.

    Args:
        d1: Descriptor of one image; its features are interpolated at the points.
        d2: Descriptor of one image, with as many channels.
        points: (n, 2), (x, y) in source pixels of image 1.
        refine: "nearest" is the centre of the most similar token. "soft" is the mean of all centres, weighted by the
            softmax of similarity / ``temperature`` (soft-argmax). "window" is that over the (2 · window + 1)² tokens
            around the most similar one. What lies outside has weight 0; GeoAware-SC (Zhang et al., CVPR 2024)
            multiplies its similarity by 0 instead, which leaves it some weight. The last two are differentiable in
            the features of both images.
        temperature: Above 0, in units of cosine similarity; the smaller, the nearer to the most similar token.
        window: Tokens to each side, at least 0; for "window" only.

    Returns:
        (n, 2), (x, y) in source pixels of image 2. With "nearest" their resolution is that of its token grid; a
        smaller stride refines it.

    Raises:
        ShapeError: If a descriptor holds more than one image, the channels differ, or a point lies outside.
        ConfigError: If a setting is out of its range.
    """
    if refine not in get_args(Refine):
        raise ConfigError(f"expected refine 'nearest', 'soft' or 'window', got {refine!r}")
    if not temperature > 0:
        raise ConfigError(f"expected a temperature above 0, got {temperature}; try 0.02")
    if not isinstance(window, int) or window < 0:
        raise ConfigError(f"expected a window of whole tokens, at least 0, got {window!r}; try 7")
    check_single(d1, d2)
    check_comparable(d1, d2)
    asked, known = unit(d1.at(points)[0]), unit(d2.features[0])
    if refine == "nearest":
        nearest = [block.argmax(1) for _, block in similarity_blocks(asked, known)]
        return _centres(d2, torch.cat(nearest) if nearest else torch.zeros(0, dtype=torch.long, device=d2.device))
    reach = window if refine == "window" else max(d2.grid.rows, d2.grid.cols)
    rows = rows_at_a_time(known)
    parts = [_soft_argmax(part @ known.T, d2, temperature, reach) for part in asked.split(rows)]
    return torch.cat(parts)


def top_k(
    a: Descriptor, b: Descriptor, k: int, *, chunk: int | None = None, backend: Backend = "torch"
) -> tuple[Float[Tensor, "n k"], Int[Tensor, "n k"]]:
    """Return (scores, index) of the ``k`` most similar tokens of ``b`` to each token of ``a``, most similar first.

    Exact with either backend. Which of equally similar tokens come first is not defined. The result carries no graph.

    Args:
        a: Descriptor of one image.
        b: Descriptor of one image, with as many channels.
        k: How many, from 1 to the tokens of ``b``.
        chunk: Tokens of ``a`` compared at a time; None is blocks of 16 MiB. Not for faiss.
        backend: "torch", on the descriptors' device; or "faiss", an ``IndexFlatIP`` on the CPU, in float32.

    Raises:
        ShapeError: If a descriptor holds more than one image, the channels differ, or there are not ``k`` tokens.
        ConfigError: If there is no such backend.
        MissingDependencyError: If faiss is asked for and not installed.
    """
    left, right = _units(a, b)
    if not 1 <= k <= b.grid.tokens:
        raise ShapeError(f"expected k from 1 to the {b.grid.tokens} tokens of b, got {k}")
    if backend == "torch":
        found = [block.topk(k, 1) for _, block in similarity_blocks(left, right, chunk)]
        return torch.cat([scores for scores, _ in found]), torch.cat([index for _, index in found])
    if backend != "faiss":
        raise ConfigError(f"expected backend 'torch' or 'faiss', got {backend!r}")
    try:
        import faiss  # type: ignore[import-not-found] - an extra
    except ImportError as error:
        raise MissingDependencyError(
            "expected faiss for backend='faiss', but it is not installed; try: pip install \"vitfeats[index]\""
        ) from error
    index = faiss.IndexFlatIP(b.dim)
    index.add(right.float().cpu().numpy())
    scores, rows = index.search(left.float().cpu().numpy(), k)
    return torch.from_numpy(scores).to(a.device), torch.from_numpy(rows).to(a.device)


def _scaled(
    kernel: Float[Tensor, "n m"], a: Float[Tensor, " n"], b: Float[Tensor, " m"], iterations: int
) -> Float[Tensor, "n m"]:
    """Scale rows and columns of a positive matrix in turns until they have their mass."""
    u = torch.ones_like(a)
    v = b
    for _ in range(iterations):
        v = b / (u @ kernel)
        u = a / (kernel @ v)
    return u[:, None] * kernel * v


class _Nearest(NamedTuple):
    """What one pass over the blocks finds.

    Attributes:
        scores: Best similarity of each a.
        nearest: Its token of b.
        back: The best token of a for each b.
        second: The second-best token of b for each a; empty unless asked for.
    """

    scores: Float[Tensor, " n"]
    nearest: Int[Tensor, " n"]
    back: Int[Tensor, " m"]
    second: Int[Tensor, " n2"]


def _nearest(a: Descriptor, b: Descriptor, chunk: int | None, *, second: bool = False) -> _Nearest:
    """Compare every token of a with every token of b, seeing one block at a time."""
    left, right = _units(a, b)
    scores = left.new_empty(len(left))
    nearest = torch.empty(len(left), dtype=torch.long, device=left.device)
    others = nearest.new_empty(len(left) if second else 0)
    best = right.new_full((b.grid.tokens,), -torch.inf)
    back = torch.zeros(b.grid.tokens, dtype=torch.long, device=right.device)
    for start, block in similarity_blocks(left, right, chunk):
        here = slice(start, start + len(block))
        torch.max(block, 1, out=(scores[here], nearest[here]))
        column, row = block.max(0)
        better = column > best  # strictly: among equals the first token stays, whatever the chunk
        best = column.where(better, best)
        back = (row + start).where(better, back)
        if second:  # last, as it spoils the block
            others[here] = block.scatter_(1, nearest[here, None], -torch.inf).argmax(1)
    return _Nearest(scores, nearest, back, others)


def _units(a: Descriptor, b: Descriptor) -> tuple[Float[Tensor, "n dim"], Float[Tensor, "m dim"]]:
    """Return the tokens of two images as unit vectors without a graph; refuse NaN, to which nothing is nearest."""
    check_single(a, b)
    check_comparable(a, b)
    check_finite(a, b)
    return unit(a.features[0].detach()), unit(b.features[0].detach())


def _returns(found: _Nearest) -> Tensor:
    """Return which tokens of a are the best of their best: (n,) booleans."""
    return found.back[found.nearest] == torch.arange(len(found.nearest), device=found.nearest.device)


def _distances(a: Descriptor, b: Descriptor, index: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
    """Return the distances of a's tokens to chosen ones of b, as unit vectors."""
    left, right = _units(a, b)
    right = right[index]
    # From the difference and not from 2 − 2·cosine, which knows small distances badly; but a zero vector, which has
    # similarity 0 to everything, is √2 away from everything by that formula, and so it is here.
    nothing = (left == 0).all(1) | (right == 0).all(1)
    return (left - right).float().norm(dim=1).masked_fill(nothing, 2**0.5)


def _saliency_of(d: Descriptor, saliency: Tensor | None, name: str) -> Float[Tensor, " tokens"] | None:
    if saliency is None:
        return None
    shape = tuple(saliency.shape)
    grid = (d.grid.rows, d.grid.cols)
    if shape not in (grid, (1, *grid)):
        raise ShapeError(
            f"expected saliency_{name} on the grid of {name}, {grid[0]}×{grid[1]}, got {'×'.join(map(str, shape))}; "
            "extract both at one size and stride"
        )
    return saliency.detach().to(d.device, torch.float32).flatten()  # also a mask of booleans


def _clusters(vectors: Float[Tensor, "n dim"], most: int, seed: int) -> list[int]:
    """Return the number of the cluster of each vector."""
    from sklearn.cluster import KMeans

    # More clusters than different vectors cannot be found.
    count = min(most, len(vectors.unique(dim=0)))
    means = KMeans(count, random_state=seed, n_init=10)  # type: ignore[arg-type] - its stub knows "auto" only
    return means.fit_predict(vectors.cpu().numpy()).tolist()


def _soft_argmax(
    similarity: Float[Tensor, "n tokens"], d: Descriptor, temperature: float, reach: int
) -> Float[Tensor, "n 2"]:
    """Return the mean of the centres up to ``reach`` tokens from the best one, weighted by softmax."""
    similarity = similarity.to(torch.promote_types(similarity.dtype, torch.float32))
    every = torch.arange(d.grid.tokens, device=d.device)
    best = similarity.argmax(1, keepdim=True)
    down = every // d.grid.cols - best // d.grid.cols
    across = every % d.grid.cols - best % d.grid.cols
    outside = (down.abs() > reach) | (across.abs() > reach)
    weights = (similarity / temperature).masked_fill(outside, -torch.inf).softmax(1)
    return weights @ _centres(d, every).to(weights.dtype)


def _only(
    a: Descriptor, b: Descriptor, nearest: Tensor, scores: Tensor, passed: Tensor, keep_unmatched: bool
) -> Matches:
    """Return the rows that passed; with ``keep_unmatched`` all, the others without a match."""
    every = torch.arange(a.grid.tokens, device=a.device)
    if keep_unmatched:
        return _matches(a, b, every, nearest.where(passed, -1), scores)
    return _matches(a, b, every[passed], nearest[passed], scores[passed])


def _matches(a: Descriptor, b: Descriptor, index_a: Tensor, index_b: Tensor, scores: Tensor) -> Matches:
    found = index_b >= 0
    points_b = _centres(b, index_b.clamp_min(0))
    points_b = points_b.where(found[:, None], torch.nan)
    return Matches(_centres(a, index_a), points_b, scores.where(found, torch.nan).float(), index_a, index_b)


def _centres(d: Descriptor, index: Int[Tensor, " n"]) -> Float[Tensor, "n 2"]:
    return d.frames[0].to_source(d.grid.centres_of(index))
