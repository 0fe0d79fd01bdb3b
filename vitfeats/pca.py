"""One PCA over the tokens of many images, and its first three components as colours."""

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from vitfeats.attention_maps import saliency
from vitfeats.descriptor import Descriptor
from vitfeats.errors import ConfigError, ShapeError
from vitfeats.grid import Size, as_size
from vitfeats.resize import spread_map

Foreground = Literal["border"] | Descriptor | Sequence[Descriptor] | None

_TAIL = 0.01  # share of tokens beyond each end of the colour range, so that one odd token does not grey the rest


class PCA:
    """Principal components of tokens, shared by all images they were fitted on.

    The covariance (dim × dim) is decomposed exactly (``torch.linalg.eigh`` in float64); each component's sign is fixed
    so that its largest loading is positive, so the same features always give the same colours.

    Attributes:
        n_components: How many components are kept.
        mean_: (dim,) mean of the fitted tokens.
        components_: (n_components, dim), orthonormal rows, largest variance first.
        explained_variance_: (n_components,), variance along each.
        explained_variance_ratio_: (n_components,), its share of the total.
        low_, high_: (n_components,), the range that :meth:`to_rgb` stretches to 0..1.

    Example:
        >>> import vitfeats as vf
        >>> d = vf.extract(vf.samples.cat(), device="cpu")
        >>> vf.PCA(3).fit(d).to_rgb(d).shape
        torch.Size([1, 3, 14, 21])
    """

    def __init__(self, n_components: int = 3) -> None:
        """Keep ``n_components`` of at least 1.

        Raises:
            ConfigError: If it is smaller.
        """
        if not isinstance(n_components, int) or n_components < 1:
            raise ConfigError(f"expected n_components of at least 1, got {n_components!r}; pass a whole number")
        self.n_components = n_components

    def fit(self, descriptors: Descriptor | Sequence[Descriptor], *, foreground: Foreground = None) -> "PCA":
        """Fit on all tokens of all images together; return self.

        Args:
            descriptors: One descriptor or several, of any grids, with as many channels.
            foreground: None fits on every token. "border" takes the images' borders for background: tokens are split
                in two along the first component, and the side that holds most border tokens is left out. A descriptor
                of the facet ``attention`` (or one for each in ``descriptors``) keeps tokens of more than its mean
                saliency. :meth:`to_rgb` then paints the background black.

        Raises:
            ShapeError: If the channels differ, or there are fewer tokens than components.
            ConfigError: If ``foreground`` is none of these.
        """
        group = _as_list(descriptors)
        tokens = torch.cat([d.features.detach().flatten(0, 1) for d in group]).double()
        self._check_enough(tokens)
        masks = self._fit_foreground(group, tokens, foreground)
        if masks is not None:
            tokens = tokens[torch.cat([mask.flatten() for mask in masks])]
        self._fit_tokens(tokens)
        return self

    def transform(self, d: Descriptor) -> Float[Tensor, "batch tokens n_components"]:
        """Return the coordinates of each token along the components."""
        self._check_fitted(d)
        return (d.features - self.mean_.to(d.features)) @ self.components_.to(d.features).T

    def foreground(self, d: Descriptor) -> Bool[Tensor, "batch rows cols"]:
        """Return which tokens are foreground; all are, unless fitted with ``foreground=``.

        With a saliency descriptor only the fitted descriptors themselves can be asked for.

        Raises:
            ConfigError: If fitted with saliency and ``d`` was not among the fitted ones.
        """
        self._check_fitted(d)
        if self._split is not None:
            return _beyond(d, *self._split)
        if not self._masks:
            return torch.ones(len(d), d.grid.rows, d.grid.cols, dtype=torch.bool, device=d.device)
        for fitted, mask in self._masks:
            if fitted is d or fitted.features is d.features:
                return mask
        raise ConfigError("expected one of the fitted descriptors: the foreground came from their saliency")

    def to_rgb(self, d: Descriptor, *, size: Size | Literal["source"] | None = None) -> Float[Tensor, "batch 3 h w"]:
        """Return the first three components as colours in 0..1, background black.

        Args:
            d: Any descriptor with the fitted channels; colours mean the same in all images.
            size: None is the token grid; (height, width) or "source" (the images' own size) resamples bilinearly.

        Raises:
            ConfigError: If fewer than three components are kept.
            ShapeError: If ``size="source"`` and the images of the batch differ in size.
        """
        if self.n_components < 3:
            raise ConfigError(f"expected n_components of at least 3 for colours, got {self.n_components}; fit PCA(3)")
        self._check_fitted(d)
        d = d.to(torch.float32) if d.dtype != torch.float32 and not self._masks else d
        low, high = self.low_[:3].to(d.device, torch.float32), self.high_[:3].to(d.device, torch.float32)
        colours = ((self.transform(d)[..., :3].float() - low) / (high - low).clamp_min(1e-12)).clamp(0, 1)
        kept = self.foreground(d)
        rgb = colours.transpose(1, 2).unflatten(2, (d.grid.rows, d.grid.cols)) * kept[:, None]
        if size is None:
            return rgb
        return spread_map(rgb, d.grid, _pixels(d, size))

    def _fit_tokens(self, tokens: Float[Tensor, "n dim"]) -> None:
        self._check_enough(tokens)
        self.mean_, self.components_, variance, total = _principal(tokens, self.n_components)
        self.explained_variance_ = variance
        self.explained_variance_ratio_ = variance / total.clamp_min(1e-30)
        along = (tokens - self.mean_) @ self.components_.T
        self.low_, self.high_ = _tails(along)

    def _check_enough(self, tokens: Float[Tensor, "n dim"]) -> None:
        if tokens.shape[0] < max(2, self.n_components) or tokens.shape[1] < self.n_components:
            raise ShapeError(
                f"expected at least {max(2, self.n_components)} tokens and {self.n_components} channels for "
                f"{self.n_components} components, got {tokens.shape[0]} tokens of {tokens.shape[1]}"
            )

    def _fit_foreground(
        self, group: list[Descriptor], tokens: Float[Tensor, "n dim"], foreground: Foreground
    ) -> list[Bool[Tensor, "batch rows cols"]] | None:
        self._split: tuple[Tensor, float] | None = None
        self._masks: list[tuple[Descriptor, Tensor]] = []
        if foreground is None:
            return None
        if isinstance(foreground, str):
            if foreground != "border":
                raise ConfigError(f"expected foreground None, 'border' or an attention descriptor, got {foreground!r}")
            self._split = _border_split(group, tokens)
            masks = [_beyond(d, *self._split) for d in group]
        else:
            masks = _salient(group, _as_list(foreground))
            self._masks = list(zip(group, masks, strict=True))
        return masks

    def _check_fitted(self, d: Descriptor) -> None:
        if not hasattr(self, "components_"):
            raise ConfigError("expected a fitted PCA; call fit first")
        if d.dim != self.components_.shape[1]:
            raise ShapeError(f"expected descriptors of {self.components_.shape[1]} channels, as fitted, got {d.dim}")


def _as_list(descriptors: Descriptor | Sequence[Descriptor]) -> list[Descriptor]:
    group = [descriptors] if isinstance(descriptors, Descriptor) else descriptors
    if not isinstance(group, list | tuple) or not all(isinstance(d, Descriptor) for d in group):
        raise ConfigError(f"expected a Descriptor or a list of them, got {type(descriptors).__name__}")
    if not group:
        raise ShapeError("expected at least one descriptor, got none")
    if len({d.dim for d in group}) > 1:
        raise ShapeError(f"expected descriptors with as many channels, got {sorted({d.dim for d in group})}")
    return list(group)


def _principal(tokens: Float[Tensor, "n dim"], count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (mean, components, their variances, total variance), signs fixed."""
    mean = tokens.mean(0)
    centred = tokens - mean
    return mean, *principal_axes(centred.T @ centred / max(1, tokens.shape[0] - 1), count)


def principal_axes(
    covariance: Float[Tensor, "dim dim"], count: int
) -> tuple[Float[Tensor, "count dim"], Float[Tensor, " count"], Float[Tensor, ""]]:
    """Return (components, their variances, total variance) of a covariance matrix, largest variance first.

    Components are orthonormal rows, the sign of each such that its largest loading is positive.
    """
    variance, vectors = torch.linalg.eigh(covariance)
    components = vectors.flip(1)[:, :count].T.contiguous()
    largest = components.gather(1, components.abs().argmax(1, keepdim=True))
    return components * largest.sign(), variance.flip(0)[:count].clamp_min(0), variance.clamp_min(0).sum()


def _tails(along: Float[Tensor, "n k"]) -> tuple[Float[Tensor, " k"], Float[Tensor, " k"]]:
    ordered = along.sort(0).values
    skipped = int(_TAIL * ordered.shape[0])
    return ordered[skipped], ordered[-1 - skipped]


def _border_split(group: list[Descriptor], tokens: Float[Tensor, "n dim"]) -> tuple[Float[Tensor, " dim"], float]:
    """Return (direction, threshold): a token is foreground where its product with the direction is larger."""
    mean, components, _, _ = _principal(tokens, 1)
    direction = components[0]
    along = (tokens - mean) @ direction
    threshold = two_means(along)
    border = torch.cat([_is_border(d).repeat(len(d)) for d in group]).to(along.device)
    if (along[border] > threshold).double().mean() > 0.5:
        direction, threshold = -direction, -threshold
    return direction, float(threshold + mean @ direction)


def _beyond(d: Descriptor, direction: Float[Tensor, " dim"], threshold: float) -> Bool[Tensor, "batch rows cols"]:
    along = d.features.detach().double() @ direction.to(d.device)
    return (along > threshold).view(len(d), d.grid.rows, d.grid.cols)


def two_means(values: Float[Tensor, " n"]) -> float:
    """Return the threshold that splits values into the two groups of least squared error (Otsu, 1979).

    Halfway between the largest of one group and the smallest of the other; the value itself where all are the same.

    Args:
        values: Two or more.
    """
    ordered = values.sort().values
    count = torch.arange(1, len(ordered) + 1, device=values.device, dtype=values.dtype)
    total, running = ordered.sum(), ordered.cumsum(0)
    below, above = running[:-1] / count[:-1], (total - running[:-1]) / (len(ordered) - count[:-1])
    between = count[:-1] * (len(ordered) - count[:-1]) * (above - below).square()
    cut = int(between.argmax())
    return float((ordered[cut] + ordered[cut + 1]) / 2)


def _is_border(d: Descriptor) -> Bool[Tensor, " tokens"]:
    border = torch.ones(d.grid.rows, d.grid.cols, dtype=torch.bool)
    border[1:-1, 1:-1] = False
    return border.flatten()


def _salient(group: list[Descriptor], attention: list[Descriptor]) -> list[Bool[Tensor, "batch rows cols"]]:
    if len(attention) != len(group):
        raise ConfigError(f"expected one attention descriptor for each fitted one ({len(group)}), got {len(attention)}")
    masks = []
    for d, looks in zip(group, attention, strict=True):
        if (len(looks), looks.grid) != (len(d), d.grid):
            raise ShapeError(
                f"expected attention on the same images and grid, "
                f"got {len(looks)} of {looks.grid} for {len(d)} of {d.grid}"
            )
        salient = saliency(looks)
        masks.append(salient > salient.mean((1, 2), keepdim=True))
    return masks


def _pixels(d: Descriptor, size: object) -> Size:
    if size == "source":
        return _source_size(d)
    pair = as_size(size)
    if isinstance(pair, int):
        raise ShapeError(f"expected size None, 'source' or (height, width), got {size!r}")
    return pair


def _source_size(d: Descriptor) -> Size:
    sizes = {frame.source_size for frame in d.frames}
    if len(sizes) > 1:
        raise ShapeError(
            f"expected images of one source size for size='source', got {sorted(sizes)}; pass d[0], d[1], …"
        )
    return sizes.pop()
