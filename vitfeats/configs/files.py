"""Settings as YAML.

A run's settings are written to YAML and read from it. Unknown keys are refused: a setting with a typing error in its
name would otherwise do nothing, without a word.
"""

import dataclasses
from pathlib import Path
from typing import Any, TypeVar

from vitfeats.errors import ConfigError, nearest_names

C = TypeVar("C")


def read_config(path: Path | str, kind: type[C], *, base: C | None = None) -> C:
    """Return settings from a YAML file.

    Args:
        path: The file: setting: value, one a line; `preset: NAME` begins from a preset.
        kind: The class of the settings.
        base: Values of what the file does not set; None takes the class's defaults.

    Raises:
        ConfigError: If the file cannot be read, a key is unknown or a value is of the wrong type or range.
    """
    import yaml
    from pydantic import TypeAdapter, ValidationError

    try:
        found = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"expected settings in YAML at '{path}', but: {error}") from error
    if not isinstance(found, dict):
        raise ConfigError(f"expected settings, 'name: value', one a line, in '{path}', got {type(found).__name__}")
    name = found.pop("preset", None)
    known = [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type] - a dataclass, by contract
    for key in found:
        if key not in known:
            raise ConfigError(
                f"expected settings of {kind.__name__} in '{path}', got {key!r}. {nearest_names(str(key), known)}"
            )
    if name is not None:
        base = kind.preset(name)  # type: ignore[attr-defined]
    values = {} if base is None else {key: getattr(base, key) for key in known}
    try:
        return TypeAdapter(kind).validate_python(values | found)
    except ValidationError as error:
        told = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'settings'}: {e['msg']}" for e in error.errors())
        raise ConfigError(f"expected settings of {kind.__name__} in '{path}', but: {told}") from error


def write_config(config: Any) -> str:
    """Return settings as YAML, one a line, as :func:`read_config` reads them."""
    import yaml

    return yaml.safe_dump(plain_config(config), sort_keys=False)


def plain_config(config: Any) -> dict[str, Any]:
    """Return settings as plain values by name: numbers, texts and lists."""
    from pydantic import TypeAdapter

    return TypeAdapter(type(config)).dump_python(config, mode="json")
