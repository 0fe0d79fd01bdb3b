"""The objective: terms, each a loss between a picture that is made and an image that exists."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

from torch import Tensor

from vitfeats.configs import SpliceConfig
from vitfeats.descriptor import Descriptor
from vitfeats.errors import ConfigError, UnknownFacetError
from vitfeats.extractors.base import Extractor
from vitfeats.losses import appearance_loss, identity_loss, structure_loss, transport_loss
from vitfeats.taps import Tap

Which = Literal["structure", "appearance"]


@dataclass(frozen=True)
class Term:
    """One term of the objective: a loss between a picture that the generator makes and an image that exists.

    Attributes:
        name: In the history.
        weight: Factor; 0 leaves the term out.
        loss: ``loss(made, wanted)`` of two descriptors, a scalar tensor: one of :mod:`vitfeats.losses`, or your own.
            It is computed from ``made`` by torch, so that it has a gradient, at its first step at least.
        tap: What is read of both.
        made: Which image the generator is given.
        wanted: Which image the result is held against.
        whole: Compare the whole made image, every ``whole_every`` steps, instead of a crop at every step. What is
            wanted is then whole too where it is the same image, and this step's crop where it is the other.
        start: First step.
    """

    name: str
    weight: float
    loss: Callable[[Descriptor, Descriptor], Tensor]
    tap: str | Tap
    made: Which
    wanted: Which
    whole: bool = False
    start: int = 0


def default_terms(config: SpliceConfig) -> list[Term]:
    """Return the objective that ``config`` describes: the five published terms (eq. 1 to 6), and transport's.

    Terms of weight 0 are in it; they cost nothing.
    """
    keys, cls = config.structure_tap, config.appearance_tap
    carried = partial(transport_loss, place=config.place)
    return [
        Term("appearance", config.appearance, appearance_loss, cls, "structure", "appearance"),
        Term("structure", config.structure, structure_loss, keys, "structure", "structure", start=config.warmup),
        Term("identity", config.identity, identity_loss, keys, "appearance", "appearance", start=config.warmup),
        Term("whole_appearance", config.whole_appearance, appearance_loss, cls, "structure", "appearance", whole=True),
        Term("whole_structure", config.whole_structure, structure_loss, keys, "structure", "structure", whole=True),
        *(
            Term(f"transport {tap}", config.transport, carried, tap, "structure", "appearance")
            for tap in config.transport_taps
        ),
    ]


def checked_terms(terms: Sequence[Term], extractor: Extractor) -> list[Term]:
    """Return the terms that count, with resolved taps."""
    checked: list[Term] = []
    for term in terms:
        if not term.weight >= 0 or not math.isfinite(term.weight):
            raise ConfigError(f"expected a weight of at least 0 for the term '{term.name}', got {term.weight}")
        if term.name in ("loss", "step"):
            raise ConfigError(
                f"expected another name than 'loss' and 'step', which the history uses, got '{term.name}'"
            )
        if term.name in [other.name for other in checked]:
            raise ConfigError(f"expected terms of different names, got '{term.name}' twice")
        if not {term.made, term.wanted} <= {"structure", "appearance"}:
            raise ConfigError(
                f"expected made and wanted to be 'structure' or 'appearance' for the term '{term.name}', got "
                f"{term.made!r} and {term.wanted!r}"
            )
        if not term.weight:
            continue
        try:
            checked.append(replace(term, tap=extractor.resolve(Tap.parse(term.tap))))
        except UnknownFacetError as error:
            if Tap.parse(term.tap).facet != "cls":
                raise
            raise ConfigError(
                f"expected a model with a CLS token for the term '{term.name}', but {extractor.card.name} has none; "
                "take one that has (mini, dino_vits8), or set appearance=0, whole_appearance=0: transport needs no CLS"
            ) from error
    if not checked:
        raise ConfigError("expected at least one term with a weight above 0, got none")
    return checked
