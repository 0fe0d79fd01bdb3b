"""Descriptors made by hand, so that a test knows every number in them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jaxtyping
import torch
from torch import Tensor

from vitfeats.descriptor import Descriptor
from vitfeats.grid import Frame, PatchGrid
from vitfeats.taps import Tap


def describe(
    features: Tensor,
    rows: int,
    cols: int,
    *,
    patch: int = 8,
    stride: int | None = None,
    source: tuple[int, int] | None = None,
    tap: str = "key@1",
    cls: Tensor | None = None,
    registers: Tensor | None = None,
    heads: int | None = None,
) -> Descriptor:
    """Return a descriptor of (batch, rows · cols, dim) features; the source is the network image unless given."""
    grid = PatchGrid(rows, cols, patch, patch if stride is None else stride)
    frame = Frame(grid.network_size if source is None else source, grid.network_size)
    return Descriptor(features, grid, (frame,) * len(features), Tap.parse(tap), "synthetic", cls, registers, heads)


def random_descriptor(seed: int, rows: int = 4, cols: int = 5, dim: int = 8, batch: int = 1, **facts) -> Descriptor:
    """Return a descriptor of normally distributed features."""
    generator = torch.Generator().manual_seed(seed)
    return describe(torch.randn(batch, rows * cols, dim, generator=generator), rows, cols, **facts)


@contextmanager
def as_users_run() -> Iterator[None]:
    """Switch the run-time type checks off: users run without them, and must meet the library's own errors."""
    before, decorator = jaxtyping.config.jaxtyping_disable, jaxtyping.jaxtyped

    def jaxtyped(**settings: Any) -> Callable[[Any], Any]:
        # A function inside another is decorated anew at every call, which takes longer than a small network.
        return lambda made: made if "<locals>" in made.__qualname__ else decorator(**settings)(made)

    jaxtyping.config.update("jaxtyping_disable", True)
    jaxtyping.jaxtyped = jaxtyped
    try:
        yield
    finally:
        jaxtyping.jaxtyped = decorator
        jaxtyping.config.update("jaxtyping_disable", before)
