"""What settings refuse, in the same words everywhere."""

from numbers import Integral
from typing import Any

from vitfeats.errors import ConfigError


def one_of(config: Any, name: str, *known: str) -> None:
    """Refuse a value that is not among those known."""
    if getattr(config, name) not in known:
        *others, last = map(repr, known)
        raise ConfigError(f"expected {name} {', '.join(others)} or {last}, got {getattr(config, name)!r}")


def whole(config: Any, *names: str) -> None:
    """Refuse what is not a whole number; True and False are none."""
    for name in names:
        value = getattr(config, name)
        if isinstance(value, bool) or not isinstance(value, Integral):
            raise ConfigError(f"expected {name} as a whole number, got {value!r}")


def require(config: Any, least: float, *names: str, most: float = float("inf")) -> None:
    """Refuse numbers below the least value or above the most."""
    for name in names:
        value = getattr(config, name)
        if not least <= value <= most:  # a NaN, too
            upper = f" and at most {most:g}" if most < float("inf") else ""
            raise ConfigError(f"expected {name} of at least {least:g}{upper}, got {value}")
