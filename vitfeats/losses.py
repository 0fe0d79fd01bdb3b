"""Losses made from descriptors: of structure and appearance, of token sets, and of style transfer.

The first three are those of Tumanyan et al., Splicing ViT Features, CVPR 2022. Each is a pure function of descriptors
of one tap, and means over elements, as the published code does (the paper of the first three writes un-squared norms:
``reduction="norm"``). Gradients flow into whatever required them; targets need none. Where several taps count, add up
the losses of each.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from vitfeats.descriptor import Descriptor
from vitfeats.errors import ConfigError, ShapeError
from vitfeats.matching import transport_plan
from vitfeats.nets.adaattn import attend_moments, key_of, moments, normalised, sampled
from vitfeats.similarity import unit

Reduction = Literal["mean", "norm"]
Form = Literal["auto", "matrix", "factored"]


def structure_loss(
    out: Descriptor, target: Descriptor, *, reduction: Reduction = "mean", form: Form = "auto"
) -> Float[Tensor, ""]:
    """Return the mean squared difference of two images' self-similarity matrices (eq. 5 of the paper).

    CLS counts as one more token where both have it, as in the published code; registers do not. The images of a batch
    are compared one to one and averaged.

    Args:
        out: Usually keys of the last block, of the image being made.
        target: The same tap of the image whose structure is wanted, on the same grid.
        reduction: "mean" is ‖S(out) − S(target)‖²/n², "norm" is the un-squared norm ‖S(out) − S(target)‖.
        form: "matrix" makes the (n, n) matrices. "factored" gives the same number without any: with row-normalised
            K and T, D = K − T and S = K + T, ‖KKᵀ − TTᵀ‖² = ½(⟨DᵀD, SᵀS⟩ + ⟨SᵀD, (SᵀD)ᵀ⟩), exact also where both are
            nearly equal (expanding the square instead loses every digit there). "auto" takes "factored" where there
            are more tokens than channels.

    Raises:
        ConfigError: If the descriptors are of different taps or models.
        ShapeError: If batches, tokens or channels differ.
    """
    _check_pair(out, target)
    made, wanted = _with_cls(out, target)
    tokens, dim = made.shape[1:]
    if form not in ("auto", "matrix", "factored"):
        raise ConfigError(f"expected form 'auto', 'matrix' or 'factored', got {form!r}")
    squared = _squared_factored if form == "factored" or (form == "auto" and tokens > dim) else _squared_matrix
    return _reduced(squared(unit(made), unit(wanted)), tokens * tokens, reduction)


def appearance_loss(out: Descriptor, target: Descriptor, *, reduction: Reduction = "mean") -> Float[Tensor, ""]:
    """Return the mean squared difference of two images' CLS tokens (eq. 3 of the paper).

    Args:
        out: A ``cls`` or ``token`` tap, usually of the last block, of the image being made.
        target: The same tap of the image whose appearance is wanted; the grids may differ.
        reduction: "mean", or "norm" for the un-squared norm.

    Raises:
        ConfigError: If the taps are neither ``cls`` nor ``token``, or the models differ.
        ShapeError: If there is no CLS token, or the batches differ.
    """
    for d in (out, target):
        if d.tap.facet not in ("cls", "token"):
            raise ConfigError(f"expected taps 'cls' or 'token' for appearance_loss, got '{d.tap}'; extract 'cls@11'")
        if d.cls is None:
            raise ShapeError(f"expected descriptors with a CLS token, but {d.model} has none")
    if (out.model, out.tap.layer) != (target.model, target.tap.layer):
        raise ConfigError(
            f"expected one model and layer, got {out.tap} of {out.model} and {target.tap} of {target.model}"
        )
    assert out.cls is not None
    assert target.cls is not None
    if out.cls.shape != target.cls.shape:
        raise ShapeError(f"expected as many images in both, got {len(out)} and {len(target)}")
    squared = (out.cls - target.cls).square().sum(1)
    return _reduced(squared, out.dim, reduction)


def identity_loss(out: Descriptor, target: Descriptor, *, reduction: Reduction = "mean") -> Float[Tensor, ""]:
    """Return the mean squared difference of two images' keys, CLS included where both have it (eq. 6 of the paper).

    Args:
        out: Usually keys of the last block, of the generator's output for the target image.
        target: The same tap of the target image itself, on the same grid.
        reduction: "mean", or "norm" for the un-squared norm.

    Raises:
        ConfigError: If the descriptors are of different taps or models.
        ShapeError: If batches, tokens or channels differ.
    """
    _check_pair(out, target)
    made, wanted = _with_cls(out, target)
    squared = (made - wanted).square().sum((1, 2))
    return _reduced(squared, made.shape[1] * made.shape[2], reduction)


def moments_loss(out: Descriptor, target: Descriptor) -> Float[Tensor, ""]:
    """Return how far the tokens of two images are apart in mean and covariance, relative to the target's.

    ‖mean(out) − mean(target)‖² / ‖mean(target)‖² + ‖cov(out) − cov(target)‖² / ‖cov(target)‖², the second-order
    statistics of Gatys et al., CVPR 2016, with the mean apart. Where a token lies does not count, and no CLS is needed:
    shallow tokens bring colours and textures. The images of a batch are compared one to one and averaged.

    Args:
        out: Any tap, usually shallow tokens, of the image being made.
        target: The same tap of the image whose appearance is wanted; the grids may differ.

    Raises:
        ConfigError: If the descriptors are of different taps or models.
        ShapeError: If batches or channels differ, or an image has a single token, which has no covariance.
    """
    _check_tap(out, target)
    if (len(out), out.dim) != (len(target), target.dim) or min(out.grid.tokens, target.grid.tokens) < 2:
        raise ShapeError(
            f"expected as many images and channels in both, and at least 2 tokens, got {tuple(out.features.shape)} and "
            f"{tuple(target.features.shape)}"
        )
    made, wanted = _moments(out.features), _moments(target.features)
    distances = [
        (m - w).square().sum(1) / w.square().sum(1).clamp_min(1e-12) for m, w in zip(made, wanted, strict=True)
    ]
    return torch.stack(distances).sum(0).mean()


def transport_loss(
    out: Descriptor, target: Descriptor, *, place: float = 4.0, epsilon: float = 0.05
) -> Float[Tensor, ""]:
    """Return the mean squared distance over which tokens of one image are carried to those of another, at the least.

    The entropic optimal transport of :func:`~vitfeats.matching.transport_plan` gives every token of ``out`` its share
    of ``target``, all of which is used: a large region takes the look of a large region, and the more so of one that
    lies at the same place. Each token is then drawn to its share. After the relaxed transport of Kolkin et al.,
    STROTSS, CVPR 2019, with a plan that is balanced on both sides. The plan itself has no gradient. The images of a
    batch are compared one to one and averaged.

    Args:
        out: Any tap, usually shallow tokens, of the image being made.
        target: The same tap of the image whose appearance is wanted; the grids may differ.
        place: How much the squared distance of places (x and y in 0..1 of each image) counts in the plan, against the
            mean squared distance of tokens; 0 ignores where tokens lie.
        epsilon: Strength of the entropy in the plan; the smaller, the sharper.

    Returns:
        In units of the variance of the target's tokens.

    Raises:
        ConfigError: If the descriptors are of different taps or models, or a setting is out of range.
        ShapeError: If batches or channels differ.
    """
    _check_tap(out, target)
    _check_channels(out, target)
    if not place >= 0:
        raise ConfigError(f"expected place of at least 0, got {place}")
    apart = torch.cdist(_places(out), _places(target)).square() * place
    carried = [_carried(m, w, apart, epsilon) for m, w in zip(out.features, target.features, strict=True)]
    return torch.stack(carried).mean()


def content_loss(out: Descriptor, target: Descriptor, *, normalise: bool = True) -> Float[Tensor, ""]:
    """Return the mean squared difference of two images' tokens, place by place.

    The content loss of style transfer, from Gatys et al., CVPR 2016. The images of a batch are compared one to one and
    averaged. CLS does not count.

    Args:
        out: Any tap, usually of a middle layer, of the image being made.
        target: The same tap of the image whose content is wanted, on the same grid.
        normalise: Bring every channel of each image to mean 0 and standard deviation 1 over the tokens first, as in
            Park and Lee, SANet, CVPR 2019: the style, which lies in these two, is then free. False compares the tokens
            as they are, as Huang and Belongie, AdaIN, ICCV 2017, do.

    Raises:
        ConfigError: If the descriptors are of different taps or models.
        ShapeError: If batches, tokens or channels differ.
    """
    _check_pair(out, target)
    made, wanted = (normalised(d.features.mT) if normalise else d.features.mT for d in (out, target))
    return (made - wanted).square().mean()


def global_style_loss(out: Descriptor, style: Descriptor) -> Float[Tensor, ""]:
    """Return the mean squared difference of the channels' means, plus that of their standard deviations.

    Both are taken over the tokens of an image, so where a token lies does not count. The style loss of Huang and
    Belongie, AdaIN, ICCV 2017, and the global one of Liu et al., AdaAttN, ICCV 2021, for one layer; the deviations are
    roots of the unbiased variance + 1e-5, so that a channel which is the same everywhere has a gradient. The images of
    a batch are compared one to one and averaged.

    Args:
        out: Any tap, of the image being made.
        style: The same tap of the image whose style is wanted; the grids may differ.

    Raises:
        ConfigError: If the descriptors are of different taps or models.
        ShapeError: If batches or channels differ.
    """
    _check_tap(out, style)
    _check_channels(out, style)
    pairs = zip(moments(out.features.mT), moments(style.features.mT), strict=True)
    return torch.stack([(made - wanted).square().mean() for made, wanted in pairs]).sum()


def local_style_loss(
    out: Descriptor,
    content: Descriptor,
    style: Descriptor,
    *,
    shallower: Sequence[tuple[Descriptor, Descriptor]] = (),
    most: int | None = 4096,
    seed: int = 0,
) -> Float[Tensor, ""]:
    """Return how far tokens are from those of the content, recoloured by the tokens of the style most like them.

    The local feature loss of Liu et al., AdaAttN, ICCV 2021, for one tap: each token of the content attends to those of
    the style, softmax(normalised content · normalised style) without a scale, which gives a weighted mean and standard
    deviation of the style's tokens for each channel; the target is deviation · normalised content + mean, and the loss
    the mean squared difference to it. Normalised is to mean 0 and standard deviation 1 of each channel over the image's
    tokens. The paper compares the features of all shallower layers, too: ``shallower``. The target has no gradient. The
    images of a batch are compared one to one and averaged.

    Args:
        out: Any tap, of the image being made.
        content: The same tap of the content image, on the same grid.
        style: The same tap of the style image; the grids may differ.
        shallower: Content and style at taps before this one, the shallowest first, whose normalised features stand
            beside those of this tap where attention compares them; each token has the nearest of theirs.
        most: At most this many tokens of the style take part, drawn at random; None takes all. Time grows with it, and
            memory does not grow with the product of both numbers of tokens.
        seed: Of that draw.

    Raises:
        ConfigError: If the descriptors are of different taps or models, or ``most`` is below 1.
        ShapeError: If batches or channels differ, or the tokens of ``out`` and ``content``.
    """
    _check_pair(out, content)
    _check_tap(out, style)
    _check_channels(out, style)
    with torch.no_grad():
        values = style.features.mT
        query, key = (
            key_of([pair[side].map for pair in (*shallower, (content, style))], len(shallower)).flatten(2)
            for side in (0, 1)
        )
        kept = sampled(values.shape[2], most, torch.Generator().manual_seed(seed))
        if kept is not None:
            key, values = (tokens[..., kept.to(tokens.device)] for tokens in (key, values))
        mean, deviation = attend_moments(query, key, values)
        target = (deviation * normalised(content.features.mT) + mean).mT
    return (out.features - target).square().mean()


def _carried(
    made: Float[Tensor, "n dim"], wanted: Float[Tensor, "m dim"], apart: Float[Tensor, "n m"], epsilon: float
) -> Float[Tensor, ""]:
    centre, spread = wanted.mean(0), wanted.std(0, correction=0).square().mean().clamp_min(1e-12).sqrt()
    made, wanted = (made - centre) / spread, (wanted - centre) / spread
    # Expanded: cdist's gradient is not finite where two tokens are the same.
    squared = made.square().sum(1)[:, None] + wanted.square().sum(1)[None] - 2 * made @ wanted.T
    cost = squared.clamp_min(0) / made.shape[1]
    with torch.no_grad():
        plan = transport_plan(-(cost / cost.mean().clamp_min(1e-12) + apart), epsilon=epsilon)
    return (plan * cost).sum()


def _places(d: Descriptor) -> Float[Tensor, "tokens 2"]:
    """Return the tokens' centres, (x, y) in 0..1 of the image."""
    height, width = d.grid.network_size
    return d.grid.centres().to(d.device) / torch.tensor([width, height], device=d.device)


def _moments(tokens: Float[Tensor, "batch n dim"]) -> tuple[Float[Tensor, "batch dim"], Float[Tensor, "batch d2"]]:
    mean = tokens.mean(1)
    centred = tokens - mean[:, None]
    return mean, (centred.mT @ centred / (tokens.shape[1] - 1)).flatten(1)


def _check_tap(out: Descriptor, target: Descriptor) -> None:
    if (out.tap, out.model) != (target.tap, target.model):
        raise ConfigError(
            f"expected one tap of one model in both, got {out.tap} of {out.model} and {target.tap} of {target.model}"
        )


def _check_channels(out: Descriptor, target: Descriptor) -> None:
    if (len(out), out.dim) != (len(target), target.dim):
        raise ShapeError(
            f"expected as many images and channels in both, got {tuple(out.features.shape)} and "
            f"{tuple(target.features.shape)}"
        )


def _check_pair(out: Descriptor, target: Descriptor) -> None:
    _check_tap(out, target)
    if out.features.shape != target.features.shape:
        raise ShapeError(
            f"expected descriptors of one shape (batch, tokens, dim), got {tuple(out.features.shape)} and "
            f"{tuple(target.features.shape)}; resize one image to the other's size"
        )


def _with_cls(a: Descriptor, b: Descriptor) -> tuple[Tensor, Tensor]:
    """Return both feature arrays, CLS in front where both have it."""
    if a.cls is None or b.cls is None:
        return a.features, b.features
    return torch.cat([a.cls[:, None], a.features], 1), torch.cat([b.cls[:, None], b.features], 1)


def _squared_matrix(k: Float[Tensor, "batch n dim"], t: Float[Tensor, "batch n dim"]) -> Float[Tensor, " batch"]:
    return (k @ k.mT - t @ t.mT).square().sum((1, 2))


def _squared_factored(k: Float[Tensor, "batch n dim"], t: Float[Tensor, "batch n dim"]) -> Float[Tensor, " batch"]:
    difference, total = k - t, k + t
    crossed = total.mT @ difference
    both = (difference.mT @ difference * (total.mT @ total)).sum((1, 2))
    return 0.5 * (both + (crossed * crossed.mT).sum((1, 2)))


def _reduced(squared: Float[Tensor, " batch"], elements: int, reduction: Reduction) -> Float[Tensor, ""]:
    if reduction == "mean":
        return squared.mean() / elements
    if reduction == "norm":
        # The root has no slope at 0; a floor below what float32 resolves keeps the gradient finite at equality.
        return squared.clamp_min(torch.finfo(squared.dtype).tiny).sqrt().mean()
    raise ConfigError(f"expected reduction 'mean' or 'norm', got {reduction!r}")
