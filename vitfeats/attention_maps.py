"""Attention maps: what CLS looks at, as a picture of the foreground."""

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

from vitfeats.descriptor import Descriptor
from vitfeats.errors import ShapeError, UnknownFacetError


def saliency(d: Descriptor, heads: Sequence[int] | None = None) -> Float[Tensor, "batch rows cols"]:
    """Return the mean attention of CLS to each patch, stretched to 0..1 for each image.

    As in Amir et al., Deep ViT Features as Dense Visual Descriptors, 2021, who take heads (0, 2, 4, 5) of block 11 of
    ``dino_vits8``.

    Args:
        d: A descriptor of the facet ``attention``.
        heads: Which heads to average; None is all.

    Raises:
        UnknownFacetError: If ``d`` is of another facet.
        ShapeError: If there is no such head.
    """
    if d.tap.facet != "attention":
        raise UnknownFacetError(
            f"expected a descriptor of the facet 'attention', got '{d.tap}'; extract 'attention@11'"
        )
    if heads is not None and not isinstance(heads, Sequence):
        raise ShapeError(f"expected a sequence of heads, got {heads!r}; one head: heads=(0,)")
    chosen = list(range(d.dim)) if heads is None else list(heads)
    if not chosen or not all(-d.dim <= head < d.dim for head in chosen):
        raise ShapeError(f"expected heads from 0 to {d.dim - 1} of {d.model}, got {heads}")
    mean = d.map[:, chosen].float().mean(1)
    low, high = mean.amin((1, 2), keepdim=True), mean.amax((1, 2), keepdim=True)
    return (mean - low) / (high - low).clamp_min(1e-12)
