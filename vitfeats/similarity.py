"""Cosine similarity within and between images. A zero vector has similarity 0 to everything, never NaN."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from vitfeats.descriptor import Descriptor, Descriptors, Points, as_points
from vitfeats.errors import ShapeError

CHUNK_BYTES = 16 * 2**20
"""Memory of one block of a chunked similarity: small enough for the maxima over it not to wait for memory, and large
enough for threads not to wait for each other at the end of each block.
"""


def cosine_similarity(a: Descriptor, b: Descriptor) -> Float[Tensor, "batch tokens_a tokens_b"]:
    """Return the cosine similarity of every token of ``a`` to every token of ``b``, image by image, in −1..1.

    The result has batch · tokens_a · tokens_b · 4 bytes. Matching and :func:`similarity_map` do not need it whole.

    Args:
        a: A descriptor.
        b: One with as many channels, and as many images (or one image, or ``a`` has one).

    Raises:
        ShapeError: If channels or batches do not fit.
    """
    check_comparable(a, b)
    if 1 not in (len(a), len(b)) and len(a) != len(b):
        raise ShapeError(f"expected two batches of one size, or one of them of 1, got {len(a)} and {len(b)} images")
    return unit(a.features) @ unit(b.features).transpose(1, 2)


def self_similarity(d: Descriptor) -> Float[Tensor, "batch tokens tokens"]:
    """Return the cosine similarity of every patch token to every other of its image, in −1..1.

    This is the structure representation of Tumanyan et al., Splicing ViT Features, CVPR 2022, eq. 4, over the patch
    tokens. CLS is left out; :func:`~vitfeats.structure_loss` has it, as the published loss does.
    """
    return cosine_similarity(d, d)


def similarity_map(d1: Descriptor, points: Points, d2: Descriptor) -> Float[Tensor, "n rows cols"]:
    """Where does each point of image 1 look like in image 2? Cosine similarity, in −1..1 up to rounding.

    Args:
        d1: Descriptor of one image.
        points: (n, 2), (x, y) in source pixels of image 1; features are interpolated there.
        d2: Descriptor of one image; the result lies on its grid.

    Raises:
        ShapeError: If a descriptor holds more than one image, the channels differ, or a point lies outside.
    """
    check_single(d1, d2)
    check_comparable(d1, d2)
    asked = unit(d1.at(points)[0])
    return (asked @ unit(d2.features[0]).T).unflatten(1, (d2.grid.rows, d2.grid.cols))


def away_from(
    point: tuple[float, float], similar: Float[Tensor, "rows cols"], d: Descriptor
) -> Float[Tensor, "rows cols"]:
    """Return similarities of one image to a point of its own, −∞ at the point's token and at those that touch it.

    A point is most alike to itself; this leaves what is alike elsewhere. On a small grid nothing may be left.

    Args:
        point: (x, y) in source pixels.
        similar: One map of :func:`similarity_map`.
        d: The image's descriptor, on whose grid they lie.
    """
    own = int(d.grid.index_of(d.frames[0].to_network(as_points([point], similar))))
    row, col = divmod(own, d.grid.cols)
    left = similar.clone()
    left[max(0, row - 1) : row + 2, max(0, col - 1) : col + 2] = -torch.inf
    return left


def similarity_blocks(
    a: Float[Tensor, "n dim"], b: Float[Tensor, "m dim"], chunk: int | None = None
) -> Iterator[tuple[int, Float[Tensor, "rows m"]]]:
    """Yield ``(first row, block of a @ b.T)`` with at most ``chunk`` rows (None: :func:`rows_at_a_time`).

    Each block overwrites the one before, so that there is only one in memory, and carries no graph.

    Raises:
        ShapeError: If ``chunk`` is below 1.
    """
    if chunk is not None and chunk < 1:
        raise ShapeError(f"expected chunk of at least 1, got {chunk}")
    a, b = a.detach(), b.detach()
    rows = min(a.shape[0], rows_at_a_time(b) if chunk is None else chunk)
    buffer = a.new_empty(rows, b.shape[0])
    for start in range(0, a.shape[0], max(1, rows)):
        part = a[start : start + rows]
        yield start, torch.mm(part, b.T, out=buffer[: len(part)])


def rows_at_a_time(b: Float[Tensor, "m dim"]) -> int:
    """Return how many rows of similarities to ``b`` fit ``CHUNK_BYTES``; at least 1."""
    return max(1, CHUNK_BYTES // (b.shape[0] * b.element_size()))


def unit(features: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
    """Divide vectors by their length; zero vectors stay zero."""
    # At least float32: in half precision the sum of squares leaves the range long before the vector does.
    precise = features.to(torch.promote_types(features.dtype, torch.float32))
    return F.normalize(precise, dim=-1, eps=1e-12).to(features.dtype)


def check_comparable(a: Descriptor, b: Descriptor) -> None:
    """Raise ``ShapeError`` unless both have as many channels."""
    if a.dim != b.dim:
        raise ShapeError(
            f"expected descriptors with as many channels, got {a.dim} ({a.tap} of {a.model}) and {b.dim} "
            f"({b.tap} of {b.model}); extract both with one model and facet"
        )


def check_finite(a: Descriptor, b: Descriptor) -> None:
    """Raise ``ShapeError`` if one has NaN or infinity, to which nothing is nearest."""
    for name, d in (("a", a), ("b", b)):
        if not bool(d.features.detach().sum(dtype=torch.float64).isfinite()):
            raise ShapeError(f"expected finite features, got NaN or infinity in {name} ({d.tap} of {d.model})")


def check_single(*descriptors: Descriptor) -> None:
    """Raise ``ShapeError`` unless each descriptor holds one image, and is one and not several taps."""
    for d in descriptors:
        if isinstance(d, Descriptors):  # without a type checker it comes this far, and its length is that of its taps
            taps = ", ".join(map(str, d))
            raise ShapeError(f"expected the descriptor of one tap, got those of {taps}; pass one: d['{next(iter(d))}']")
        if len(d) != 1:
            raise ShapeError(
                f"expected a descriptor of one image, got a batch of {len(d)}; pass d[0], d[1], … one by one"
            )
