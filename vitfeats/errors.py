"""Every error that vitfeats raises on purpose.

::

    VitFeatsError
    ├── ImageError              (ValueError)   an image cannot be read, or is not what it claims to be
    ├── ShapeError              (ValueError)   a size, stride, grid or array shape that does not fit
    ├── UnknownModelError       (LookupError)  no model of that name
    ├── UnknownFacetError       (LookupError)  no facet of that name, or the model does not have it
    ├── TapError                               a tap that does not exist, never fired, or fired twice
    ├── WeightsUnavailableError (OSError)      weights neither cached, reachable, nor safe to read
    ├── MissingDependencyError  (ImportError)  an optional package is not installed
    ├── StoreError              (OSError)      a saved file is missing, broken or foreign
    └── ConfigError             (ValueError)   settings that contradict each other or the model

A message says what was expected, what was got, and what to try.
"""

from collections.abc import Iterable
from difflib import get_close_matches


class VitFeatsError(Exception):
    """The base of every error that vitfeats raises on purpose."""


class ImageError(VitFeatsError, ValueError):
    """An image cannot be read, or its values, type or channels are not those of an image."""


class ShapeError(VitFeatsError, ValueError):
    """A size, stride, grid or array shape that does not fit."""


class UnknownModelError(VitFeatsError, LookupError):
    """No model of that name; the message lists the nearest names."""


class UnknownFacetError(VitFeatsError, LookupError):
    """No facet of that name, or the model has no such facet; the message lists the nearest names."""


class TapError(VitFeatsError):
    """A tap that cannot be placed, never fired, or fired more than once in a forward pass."""


class WeightsUnavailableError(VitFeatsError, OSError):
    """Weights that are neither cached nor reachable, or a weight file that cannot be read safely."""


class MissingDependencyError(VitFeatsError, ImportError):
    """An optional package is missing; the message has the exact ``pip install`` line."""


class StoreError(VitFeatsError, OSError):
    """A saved file that is missing, broken, or was not written by vitfeats."""


class ConfigError(VitFeatsError, ValueError):
    """Settings that contradict each other or the model they are meant for."""


def nearest_names(name: str, known: Iterable[str], *, most: int = 3) -> str:
    """Return a sentence that offers the known names nearest to ``name`` (all of them where none is near)."""
    names = list(known)
    near = get_close_matches(name, names, n=most, cutoff=0.5)
    if near:
        return f"Did you mean {' or '.join(repr(n) for n in near)}?"
    return f"Known: {', '.join(sorted(names))}."
