"""Search over a store: the images that look most like a query, and the patches that look most like a clicked one."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from vitfeats.apps.bulk.index import (
    Index,
    Of,
    build_index,
    open_index,
    place_told,
    rows_of_block,
    vectors_of,
)
from vitfeats.apps.bulk.shards import Rows
from vitfeats.apps.bulk.store import Store
from vitfeats.descriptor import Descriptor, Points
from vitfeats.errors import ConfigError, ShapeError
from vitfeats.grid import Frame, PatchGrid
from vitfeats.similarity import check_single, unit

__all__ = ["Hits", "Index", "build_index", "open_index", "search_images", "search_patches"]

# Scores are compared in steps of 2⁻²⁹, 2e-9, less than a float32 tells apart near 1 and more than float64 errs: so the
# same vectors have the same score in a block of any size, and a score and a place fit one whole number of 64 bits.
_STEPS = 2.0**29
_NEVER = -2.0  # the score of what is not finite: below any other


@dataclass(frozen=True, eq=False)
class Hits:
    """What was found for each query, best first.

    Attributes:
        ids: Of the images: for each query a list of k.
        scores: (queries, k) cosine similarity, −1..1.
        points: (queries, k, 2), (x, y) in source pixels of the image: the centre of the token; None for whole images.

    Raises:
        ShapeError: If they do not fit each other.
    """

    ids: list[list[str]]
    scores: Float[Tensor, "queries k"]
    points: Float[Tensor, "queries k 2"] | None = None

    def __post_init__(self) -> None:
        """Check that there are as many of each."""
        lengths = {len(names) for names in self.ids} or {self.scores.shape[1]}
        if len(self.ids) != len(self.scores) or lengths != {self.scores.shape[1]}:
            raise ShapeError(
                f"expected k ids for each of the queries, as scores has {tuple(self.scores.shape)}, got "
                f"{len(self.ids)} lists of {sorted(lengths)}"
            )

    def __len__(self) -> int:
        """Return the number of queries."""
        return len(self.ids)

    def __repr__(self) -> str:
        """Say how many there are."""
        return (
            f"Hits({len(self)} queries, {self.scores.shape[1]} {'images' if self.points is None else 'patches'} each)"
        )


def search_images(
    store: Store,
    queries: Descriptor | Sequence[Descriptor] | Tensor,
    *,
    tap: str | None = None,
    k: int = 10,
    index: Index | Path | str | None = None,
    probes: int = 64,
    chunk: int | None = None,
) -> Hits:
    """Find the images of a store that are most similar to each query, by cosine similarity.

    An image stands for itself by the mean of its tokens as they are, not brought to length 1 before (mean pooling); of
    a tap with one token, such as ``cls@11``, by that token. Without an index the search is exact: it reads one shard
    after the other, and its memory does not grow with the store.

    Args:
        store: All shards of it must be there. Images that could not be read, or whose mean is not finite, are no hits.
        queries: A Descriptor, each image of it a query; several Descriptors, of any grids; or vectors (n, dim). Made
            with the store's model and tap; descriptors are reduced as the store is.
        tap: Of the store; None is its first, or that of the index.
        k: How many, at least 1; where the store has fewer images, all of them are returned.
        index: From :func:`open_index`, or the path that :func:`build_index` returned, which is then read each time.
        probes: How many lists of an index to look into: the more, the fewer hits are missed and the longer it takes.
            More are taken where these have too few hits. An index without lists looks at everything.
        chunk: Vectors compared at a time; None is blocks of 16 MiB. The result does not depend on it. Not for an index.

    Returns:
        Hits without points, on the CPU. Of equal scores the image that stands first in the store comes first; with an
        index, which of them is found is not defined.

    Raises:
        ShapeError: If a query has other channels than the store, is not finite, or there is none.
        ConfigError: If a number is below 1, there is no such tap, or the index is of another tap or of patches.
        StoreError: If shards are missing or damaged, or the index is not of this store as it is now.
        MissingDependencyError: If there is an index and faiss is not installed.
    """
    return _search(store, _image_vectors(store, queries), "images", tap, k, None, index, probes, chunk)


def search_patches(
    store: Store,
    d: Descriptor,
    points: Points,
    *,
    tap: str | None = None,
    k: int = 10,
    per_image: int | None = 1,
    index: Index | Path | str | None = None,
    probes: int = 64,
    chunk: int | None = None,
) -> Hits:
    """Find the patches of a store that are most similar to clicked points of an image, by cosine similarity.

    Without an index the search is exact: one pass over the store for all points, one shard after the other, and its
    memory does not grow with the store.

    Args:
        store: All shards of it must be there. Tokens that are not finite are no hits.
        d: Descriptor of one image, made with the store's model and tap.
        points: (n, 2), (x, y) in source pixels; features are interpolated there, as ``d.at`` does.
        tap: As for :func:`search_images`.
        k: How many, at least 1; where the store has fewer, all of them are returned.
        per_image: Of each image at most so many, its best; None is without limit.
        index: As for :func:`search_images`; of patches.
        probes: As for :func:`search_images`.
        chunk: Tokens compared at a time, but those of one image always together; None is blocks of 16 MiB. The result
            does not depend on it. Not for an index.

    Returns:
        Hits with the centre of each token, on the CPU. Of equal scores that which stands first in the store comes
        first; with an index, which of them is found is not defined.

    Raises:
        ShapeError: If ``d`` holds more than one image, has other channels than the store or is not finite, a point
            lies outside, or there is none.
        ConfigError: If a number is below 1, there is no such tap, or the index is of another tap or of images.
        StoreError: If shards are missing or damaged, or the index is not of this store as it is now.
        MissingDependencyError: If there is an index and faiss is not installed.
    """
    check_single(d)
    return _search(store, _reduced(store, d).at(points)[0], "patches", tap, k, per_image, index, probes, chunk)


def _search(
    store: Store,
    vectors: Float[Tensor, "queries dim"],
    of: Of,
    tap: str | None,
    k: int,
    per_image: int | None,
    index: Index | Path | str | None,
    probes: int,
    chunk: int | None,
) -> Hits:
    for name, value in {"k": k, "per_image": per_image, "probes": probes, "chunk": chunk}.items():
        if value is not None and value < 1:
            raise ConfigError(f"expected {name} of at least 1, got {value}")
    if not len(vectors):
        raise ShapeError("expected at least one query, got none")
    asked = unit(vectors.detach().cpu().double())
    if not bool(asked.isfinite().all()):
        raise ShapeError("expected finite queries, got NaN or infinity")
    if index is None:
        store.check_whole()
        return _exact(store, asked, of, store.taps[0] if tap is None else tap, k, per_image, chunk)
    opened = index if isinstance(index, Index) else open_index(store, index)
    if opened.store != place_told(store) or opened.of != of or tap not in (None, opened.tap):
        wanted = f"{of}, {opened.tap if tap is None else tap} of '{store.path}'"
        raise ConfigError(f"expected an index of {wanted}, got {opened}; build_index makes one")
    return _indexed(store, asked, opened, k, per_image, probes)


def _image_vectors(store: Store, queries: Descriptor | Sequence[Descriptor] | Tensor) -> Float[Tensor, "queries dim"]:
    if isinstance(queries, Tensor):
        if queries.ndim != 2:
            raise ShapeError(f"expected vectors (n, dim), one a query, got shape {tuple(queries.shape)}")
        return queries
    several = [queries] if isinstance(queries, Descriptor) else queries
    means = [_reduced(store, d).features.detach().cpu().mean(1, dtype=torch.float64) for d in several]
    if len({part.shape[1] for part in means}) > 1:
        raise ShapeError(f"expected queries with as many channels, got {sorted({part.shape[1] for part in means})}")
    return torch.cat(means) if means else torch.zeros(0, 0)


def _reduced(store: Store, d: Descriptor) -> Descriptor:
    """Return a descriptor with the channels of the store; one that is out of it has them already."""
    known = store.reduction
    return d if known is None or d.dim == known.dims else known(d)


def _exact(
    store: Store,
    asked: Float[Tensor, "queries dim"],
    of: Of,
    tap: str,
    k: int,
    per_image: int | None,
    chunk: int | None,
) -> Hits:
    """Compare with every row of a store, keeping the best k and what there is to say of them."""
    most = rows_of_block(asked.shape[1], len(asked)) if chunk is None else chunk
    scores = places = torch.zeros(len(asked), 0, dtype=torch.long)
    told: dict[int, tuple[str, list[float]]] = {}
    seen = 0
    for number in range(store.shards):
        rows = store.rows(number, tap)
        vectors, counts = vectors_of(rows, of)
        _check_channels(store, tap, asked, vectors)
        for start, sizes in _blocks(counts, most):
            found = _steps(asked, vectors[start : start + sum(sizes)])
            chosen = _best_of_each(found, sizes, per_image)
            scores = torch.cat([scores, found.gather(1, chosen)], 1)
            places = torch.cat([places, chosen + (seen + start)], 1)
            best = _best(scores, k)
            scores, places = scores.gather(1, best), places.gather(1, best)
        kept = set(places.flatten().tolist())
        fresh = sorted(place for place in kept if place >= seen)
        told = {place: what for place, what in told.items() if place in kept}
        told |= zip(fresh, _tell(rows, counts, [place - seen for place in fresh]), strict=True)
        seen += len(vectors)
        del rows, vectors  # before the next shard is read
    values = scores / _STEPS
    real = (values > _NEVER).all(0)  # what is not finite comes last, as often for one query as for another
    hits = [[told[place] for place in row] for row in places[:, real].tolist()]
    return _hits(hits, values[:, real].float(), of)


def _indexed(
    store: Store, asked: Float[Tensor, "queries dim"], index: Index, k: int, per_image: int | None, probes: int
) -> Hits:
    """Ask an index for more and more rows, until k of them are hits or it has no more."""
    import faiss  # type: ignore[import-not-found] - an extra, which made the index

    _check_channels(store, index.tap, asked, torch.zeros(1, index.faiss.d))
    lists = getattr(faiss.try_extract_index_ivf(index.faiss), "nlist", 1)
    total = index.faiss.ntotal
    fetched = k if per_image is None else 4 * k
    while True:
        fetched, probes = min(fetched, total), min(probes, lists)
        if lists > 1:
            faiss.ParameterSpace().set_index_parameter(index.faiss, "nprobe", probes)
        found = index.faiss.search(asked.float().numpy(), fetched)
        best = [_allowed(index, scores, places, k, per_image) for scores, places in zip(*found, strict=True)]
        if min(map(len, best)) == k or (fetched == total and probes == lists):
            break
        fetched, probes = 4 * fetched, 4 * probes
    k = min(map(len, best))
    geometry: dict[str, tuple[PatchGrid, Frame]] = {}
    hits = []
    for row in best:
        images = [int(np.searchsorted(index.offsets, place, "right")) - 1 for _, place in row[:k]]
        names = [store.ids[index.images[image]] for image in images]
        points = [[0.0, 0.0]] * k
        if index.of == "patches":
            for name in set(names) - set(geometry):
                d = store[name][index.tap]
                geometry[name] = (d.grid, d.frames[0])
            tokens = [place - int(index.offsets[image]) for (_, place), image in zip(row, images, strict=False)]
            points = [_centre(*geometry[name], token) for name, token in zip(names, tokens, strict=True)]
        hits.append(list(zip(names, points, strict=True)))
    return _hits(hits, torch.tensor([[score for score, _ in row[:k]] for row in best]).reshape(len(best), k), index.of)


def _allowed(
    index: Index, scores: np.ndarray, places: np.ndarray, k: int, per_image: int | None
) -> list[tuple[float, int]]:
    """Return the first k of what faiss found that are hits: finite, and not too many of one image."""
    found: list[tuple[float, int]] = []
    taken: dict[int, int] = {}
    order = np.lexsort((places, -scores))
    order = order[(places[order] >= 0) & ~np.isin(places[order], index.skipped)]  # −1 is what faiss fills up with
    images = np.searchsorted(index.offsets, places[order], "right") - 1
    for at, image in zip(order.tolist(), images.tolist(), strict=True):
        taken[image] = taken.get(image, 0) + 1
        if per_image is None or taken[image] <= per_image:
            found.append((float(scores[at]), int(places[at])))
        if len(found) == k:
            break
    return found


def _blocks(counts: list[int], most: int) -> Iterator[tuple[int, list[int]]]:
    """Yield (first row, rows of each image) of blocks of whole images, of ``most`` rows unless one image has more."""
    start = total = 0
    sizes: list[int] = []
    for count in counts:
        if sizes and total + count > most:
            yield start, sizes
            start, total, sizes = start + total, 0, []
        sizes.append(count)
        total += count
    if sizes:
        yield start, sizes


def _steps(asked: Float[Tensor, "queries dim"], vectors: Float[Tensor, "rows dim"]) -> Int[Tensor, "queries rows"]:
    """Return cosine similarities as whole steps."""
    scores = asked @ unit(vectors.double()).T
    return scores.nan_to_num_(nan=_NEVER).mul_(_STEPS).round_().long()


def _best(steps: Int[Tensor, "queries rows"], k: int) -> Int[Tensor, "queries best"]:
    """Return the places of the ``k`` largest of each query, largest first; of equal ones the first."""
    places = torch.arange(steps.shape[1])
    return (steps * 2**32 - places).topk(min(k, len(places)), 1).indices


def _best_of_each(
    steps: Int[Tensor, "queries rows"], sizes: list[int], per_image: int | None
) -> Int[Tensor, "queries some"]:
    """Return the places of the best of each image."""
    if per_image is None or max(sizes) <= per_image:
        return torch.arange(steps.shape[1]).expand(len(steps), -1)
    starts = np.cumsum([0, *sizes[:-1]]).tolist()
    parts = zip(starts, steps.split(sizes, 1), strict=True)
    return torch.cat([start + _best(part, per_image) for start, part in parts], 1)


def _tell(rows: Rows, counts: list[int], places: list[int]) -> Iterator[tuple[str, list[float]]]:
    """Yield the image and the centre of rows of a shard."""
    ends = np.cumsum(counts)
    for place in places:
        image = int(np.searchsorted(ends, place, "right"))
        token = place - int(ends[image]) + counts[image]
        yield rows.ids[image], _centre(rows.grids[image], rows.frames[image], token)


def _centre(grid: PatchGrid, frame: Frame, token: int) -> list[float]:
    return frame.to_source(grid.centres_of(torch.tensor([token])))[0].tolist()


def _hits(found: list[list[tuple[str, list[float]]]], scores: Float[Tensor, "queries k"], of: Of) -> Hits:
    ids = [[name for name, _ in row] for row in found]
    points = torch.tensor([[point for _, point in row] for row in found]).reshape(*scores.shape, 2)
    return Hits(ids, scores, points if of == "patches" else None)


def _check_channels(
    store: Store, tap: str, asked: Float[Tensor, "queries dim"], vectors: Float[Tensor, "rows dim2"]
) -> None:
    if len(vectors) and asked.shape[1] != vectors.shape[1]:
        raise ShapeError(
            f"expected queries of {vectors.shape[1]} channels, as {tap} of the store has, got {asked.shape[1]}; make "
            f"them with its model ({store.settings['model']}), tap and settings"
        )
