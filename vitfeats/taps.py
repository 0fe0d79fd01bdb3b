"""Taps: which facet of which layer to read. A facet is data: where to hook, and how to read what the hook saw.

A tap is written ``facet@layer``: ``key@11``, ``key@-1``, ``cls@11``; ``out@relu4_1`` where a model names its layers,
``out@layer2+layer3`` for several of them together, and ``token@up1.res1#25`` where it runs in steps.
To add a facet, add a row to :data:`FACETS`.
"""

import operator
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from vitfeats.errors import TapError, UnknownFacetError, nearest_names
from vitfeats.grid import PatchGrid

Site = Literal["query", "key", "value", "block", "attention_output", "query_key", "residual"]
"""Places of a transformer block (the last: of a residual block) that a hook can read; each architecture says by which
module path it is reached."""

_TEXT = re.compile(r"^(?P<facet>[a-z_]+)@(?P<layer>-?\d+|[A-Za-z][\w.]*(?:\+[A-Za-z][\w.]*)*)(?:#(?P<step>\d+))?$")


@dataclass(frozen=True, order=False)
class Tap:
    """One facet of one layer (of one diffusion step).

    Attributes:
        facet: A name of :data:`FACETS`.
        layer: 0-based block index, negative ones counting from the end (transformers' ``hidden_states[i + 1]`` is
            block ``i``); or a layer's name where a model names its layers.
        step: Diffusion step, None elsewhere.

    Raises:
        UnknownFacetError: If there is no such facet.
    """

    facet: str
    layer: int | str
    step: int | None = None

    def __post_init__(self) -> None:
        """Refuse an unknown facet while its spelling is still at hand."""
        if self.facet not in FACETS:
            raise UnknownFacetError(f"expected a facet, got {self.facet!r}. {nearest_names(str(self.facet), FACETS)}")
        layer = self.layer
        if not isinstance(layer, str):
            object.__setattr__(self, "layer", operator.index(layer))  # NumPy's integers become plain ones
        elif layer.removeprefix("-").isdigit():
            object.__setattr__(self, "layer", int(layer))

    @classmethod
    def parse(cls, text: "str | Tap") -> "Tap":
        """Read a tap from its text; a Tap is returned as it is.

        Raises:
            TapError: If the text is not ``facet@layer`` or ``facet@layer#step``.
            UnknownFacetError: If there is no such facet.
        """
        if isinstance(text, Tap):
            return text
        found = _TEXT.match(text.strip()) if isinstance(text, str) else None
        if found is None:
            raise TapError(f"expected a tap written facet@layer, for example 'key@11' or 'key@-1', got {text!r}")
        layer, step = found["layer"], found["step"]
        is_index = layer.lstrip("-").isdigit()
        return cls(found["facet"], int(layer) if is_index else layer, None if step is None else int(step))

    def resolved(self, depth: int) -> "Tap":
        """Return the tap with a layer counted from the start, for a model of ``depth`` numbered blocks.

        Raises:
            TapError: If the layer is a name, or out of range.
        """
        if not isinstance(self.layer, int) or not -depth <= self.layer < depth:
            raise TapError(
                f"expected a layer from 0 to {depth - 1} (or {-depth} to -1, from the end), "
                f"got {self.layer!r} in '{self}'"
            )
        return replace(self, layer=self.layer % depth)

    def __str__(self) -> str:
        """Return the text that :meth:`parse` reads."""
        return f"{self.facet}@{self.layer}" + ("" if self.step is None else f"#{self.step}")


@dataclass(frozen=True)
class TokenLayout:
    """How a token axis is laid out: prefix tokens first (CLS, then registers), then patch tokens row by row.

    Attributes:
        prefix: Number of tokens before the patch tokens.
        has_cls: Whether the first of them is CLS.
    """

    prefix: int
    has_cls: bool


@dataclass(frozen=True, eq=False)
class Reading:
    """What a tap saw in one forward pass.

    Attributes:
        features: (batch, tokens, dim) of the patch tokens.
        cls: (batch, dim) of the CLS token, or None.
        registers: (batch, r, dim) of the register tokens, or None.
        grid: The grid that the features lie on; None is the grid of the image's patches.
    """

    features: Float[Tensor, "batch tokens dim"]
    cls: Float[Tensor, "batch dim"] | None = None
    registers: Float[Tensor, "batch r dim"] | None = None
    grid: PatchGrid | None = None


@dataclass(frozen=True, eq=False)
class QueryKey:
    """Queries and keys as attention uses them: after q/k norm and rotation, (batch, heads, n, d) each.

    Attributes:
        query: (batch, heads, n, d).
        key: (batch, heads, n, d).
        scale: Factor of the dot product before the softmax, usually 1/√d.
        mask: What is added to the scores, such as relative position biases; or booleans, True where a key counts; or
            None. Broadcast to (batch, heads, n, n).
    """

    query: Float[Tensor, "batch heads n d"]
    key: Float[Tensor, "batch heads n d"]
    scale: float
    mask: Tensor | None = None

    def attention(self, rows: slice = slice(None)) -> Float[Tensor, "batch heads rows n"]:
        """Return softmax(q·kᵀ·scale + mask) in float32, for these query rows only, whatever autocast is on."""
        with torch.autocast(self.query.device.type, enabled=False):
            scores = self.query[:, :, rows].float() @ self.key.float().transpose(-2, -1) * self.scale
            if self.mask is not None and self.mask.dtype == torch.bool:
                scores = scores.masked_fill(~self.mask[..., rows, :], -torch.inf)
            elif self.mask is not None:
                scores = scores + self.mask[..., rows, :].float()
            return scores.softmax(-1)


def _own(seen: Tensor) -> Tensor:
    # A copy, because later in-place operations of the model must not reach what was read; and because a view would
    # keep the whole tensor alive (all of q, k and v for one key).
    return seen.to(torch.float32, copy=True, memory_format=torch.contiguous_format)


def read_tokens(seen: Float[Tensor, "batch n dim"], layout: TokenLayout) -> Reading:
    """Split (batch, n, dim) into patch tokens, CLS and registers, copied to float32."""
    after_cls = 1 if layout.has_cls else 0
    return Reading(
        _own(seen[:, layout.prefix :]),
        _own(seen[:, 0]) if layout.has_cls else None,
        _own(seen[:, after_cls : layout.prefix]) if layout.prefix > after_cls else None,
    )


def read_cls(seen: Float[Tensor, "batch n dim"], layout: TokenLayout) -> Reading:
    """Read the CLS token of (batch, n, dim) as a grid of one token."""
    cls = _own(seen[:, 0])
    return Reading(cls[:, None], cls)


def read_attention(seen: QueryKey, layout: TokenLayout) -> Reading:
    """Read how CLS attends: (batch, tokens, heads) to the patch tokens, (batch, heads) to itself."""
    row = seen.attention(slice(0, 1))[:, :, 0].transpose(1, 2)  # (batch, n, heads)
    return read_tokens(row, layout)


@dataclass(frozen=True)
class Facet:
    """One kind of feature, as data.

    Attributes:
        name: What a tap calls it.
        site: Where to hook.
        read: A pure function from what the hook saw and the token layout to a :class:`Reading`.
        meaning: One line for people.
        needs_cls: Whether the model must have a CLS token.
        of_block: Whether it is a block's output, to which the model's final norm may be applied.
    """

    name: str
    site: Site
    read: Callable[..., Reading]
    meaning: str
    needs_cls: bool = False
    of_block: bool = False


FACETS: dict[str, Facet] = {
    facet.name: facet
    for facet in (
        Facet("key", "key", read_tokens, "keys of the block's attention, heads concatenated"),
        Facet("query", "query", read_tokens, "queries of the block's attention, heads concatenated"),
        Facet("value", "value", read_tokens, "values of the block's attention, heads concatenated"),
        Facet("token", "block", read_tokens, "the block's output", of_block=True),
        Facet("cls", "block", read_cls, "the CLS token of the block's output", needs_cls=True, of_block=True),
        Facet("attention", "query_key", read_attention, "attention of CLS to every token, per head", needs_cls=True),
        Facet("residual", "residual", read_tokens, "of a diffusion model: a residual block before the skip is added"),
        Facet(
            "out", "attention_output", read_tokens, "the attention's output before the residual add; a layer's output"
        ),
    )
}
"""Every facet by name."""
