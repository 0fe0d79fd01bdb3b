"""Settings by name."""

import dataclasses
from typing import Any, Literal, TypeVar

from vitfeats.errors import ConfigError, nearest_names

C = TypeVar("C")

Preset = Literal["reference", "fast", "draft"]


def preset(kind: type[C], presets: dict[str, dict[str, Any]], name: str, changes: dict[str, Any]) -> C:
    """Return settings by name, with some of them changed; names that do not exist are refused."""
    if not isinstance(name, str) or name not in presets:
        raise ConfigError(f"expected a preset, got {name!r}. {nearest_names(str(name), presets)}")
    known = [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type] - a dataclass
    for key in changes:
        if key not in known:
            raise ConfigError(f"expected a setting of {kind.__name__}, got {key!r}. {nearest_names(key, known)}")
    return kind(**(presets[name] | changes))
