"""Principal components that the features of a store are reduced to, one set for each tap, kept beside the shards."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from vitfeats.apps.bulk.files import Place, joined, read_bytes
from vitfeats.descriptor import Descriptor, Descriptors
from vitfeats.errors import ConfigError, ShapeError, StoreError
from vitfeats.pca import principal_axes

PCA_FILE = "pca.safetensors"


@dataclass(frozen=True, eq=False)
class Reduction:
    """A projection of the features of each tap: (x − mean) · componentsᵀ. CLS and register tokens go through it too.

    Attributes:
        means: (dim,) by tap.
        components: (dims, dim) by tap, orthonormal rows, that of largest variance first.
        kept: Share of the variance that they have, by tap, 0..1.
    """

    means: Mapping[str, Tensor]
    components: Mapping[str, Tensor]
    kept: Mapping[str, float]

    @classmethod
    def fit(cls, sample: Iterable[Descriptors], dims: int) -> "Reduction":
        """Fit on all tokens of a sample of images; they are read one after the other, and not kept.

        Raises:
            ConfigError: If there is no image, or a tap does not have more channels and tokens than ``dims``.
        """
        sums: dict[str, _Sums] = {}
        for descriptors in sample:
            for tap, d in descriptors.items():
                sums.setdefault(str(tap), _Sums(d.dim)).add(d.features.flatten(0, 1).cpu().double())
        if not sums:
            raise ConfigError("expected images to fit principal components on, got none that can be read")
        means, components, kept = {}, {}, {}
        for tap, found in sums.items():
            dim = len(found.total)
            if not 1 <= dims < min(dim, found.count):
                raise ConfigError(
                    f"expected pca of at least 1, and fewer than the {dim} channels of '{tap}' and the {found.count} "
                    f"tokens of the sample, got {dims}"
                )
            rows, variance, whole = principal_axes(found.covariance(), dims)
            means[tap], components[tap] = found.mean().float(), rows.float().contiguous()
            kept[tap] = float(variance.sum() / whole.clamp_min(1e-30))
        return cls(means, components, kept)

    def __call__(self, d: Descriptor) -> Descriptor:
        """Return a descriptor of fewer channels, in float32; which head a channel was of is lost.

        Raises:
            ConfigError: If nothing was fitted for its tap.
            ShapeError: If it has other channels than was fitted on.
        """
        if str(d.tap) not in self.means:
            raise ConfigError(f"expected a tap of the store ({', '.join(self.means)}), got '{d.tap}'")
        mean, rows = (facts[str(d.tap)].to(d.device) for facts in (self.means, self.components))
        if d.dim != len(mean):
            raise ShapeError(f"expected {len(mean)} channels at '{d.tap}', got {d.dim}; was it read by the same model?")

        def reduced(value: Tensor | None) -> Tensor | None:
            return None if value is None else (value.float() - mean) @ rows.T

        features = reduced(d.features)
        assert features is not None
        return replace(d, features=features, cls=reduced(d.cls), registers=reduced(d.registers), heads=None)

    @property
    def dims(self) -> int:
        """Number of components."""
        return len(next(iter(self.components.values())))

    def facts(self) -> dict[str, Any]:
        """Return what settings say of it: components, and a digest of all numbers."""
        return {"dims": len(next(iter(self.components.values()))), "digest": _digest(self.to_bytes())}

    def to_bytes(self) -> bytes:
        """Return it as a safetensors file."""
        from safetensors.torch import save

        tensors = {f"{tap}/mean": value for tap, value in self.means.items()}
        tensors |= {f"{tap}/components": value for tap, value in self.components.items()}
        tensors |= {f"{tap}/kept": torch.tensor(value, dtype=torch.float64) for tap, value in self.kept.items()}
        return save(tensors)


class _Sums:
    """Mean and covariance of many rows, a few at a time, in float64."""

    def __init__(self, dim: int) -> None:
        self.count, self.first = 0, torch.zeros(dim, dtype=torch.float64)
        self.total, self.outer = torch.zeros_like(self.first), torch.zeros(dim, dim, dtype=torch.float64)

    def add(self, rows: Float[Tensor, "n dim"]) -> None:
        if self.count == 0:
            self.first = rows.mean(0)  # what is near the mean loses no digits in the sums of squares
        centred = rows - self.first
        self.count += len(rows)
        self.total += centred.sum(0)
        self.outer += centred.T @ centred

    def mean(self) -> Float[Tensor, " dim"]:
        return self.first + self.total / self.count

    def covariance(self) -> Float[Tensor, "dim dim"]:
        shift = self.total / self.count
        return (self.outer - self.count * torch.outer(shift, shift)) / max(1, self.count - 1)


def read_reduction(folder: Place, wanted: Mapping[str, Any] | None) -> Reduction | None:
    """Return the reduction of a store by what its settings say of it; None if they say nothing.

    Raises:
        StoreError: If it is missing, or not the one that the settings are of.
    """
    if wanted is None:
        return None
    from safetensors.torch import load

    place = joined(folder, PCA_FILE)
    try:
        data = read_bytes(place)
    except OSError as error:
        raise StoreError(f"expected the principal components of a store at '{place}', but: {error}") from error
    if _digest(data) != wanted.get("digest"):
        raise StoreError(f"expected '{place}' as it was written, but it was changed or is of another store")
    read = load(data)
    taps = [name.removesuffix("/mean") for name in read if name.endswith("/mean")]
    return Reduction(
        {tap: read[f"{tap}/mean"] for tap in taps},
        {tap: read[f"{tap}/components"] for tap in taps},
        {tap: float(read[f"{tap}/kept"]) for tap in taps},
    )


def _digest(data: bytes) -> str:
    return blake2b(data, digest_size=16).hexdigest()
