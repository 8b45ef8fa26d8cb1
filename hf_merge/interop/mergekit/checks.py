"""What the readers of a mergekit recipe share: checks of keys and lists, and the warning of what has no effect."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from ...errors import ConfigError, suggest


def check_keys(where: str, data: Any, known: Sequence[str]) -> None:
    """Raises [`ConfigError`] unless `data` is a mapping with known keys only."""
    if not isinstance(data, Mapping):
        raise ConfigError(f"{where} must be a mapping with the keys {', '.join(known)}, got {data!r}.")
    for key in data:
        if key not in known:
            raise ConfigError(
                f"{where}: unknown key '{key}'.{suggest(str(key), known)} Known keys: {', '.join(known)}."
            )


def warn_ignored(where: str, name: str, why: str) -> None:
    """Warns that something in a recipe has no effect."""
    warnings.warn(f"{where}: '{name}' {why}; it is ignored, as in mergekit.", stacklevel=3)


def check_list(where: str, value: Any) -> Sequence[Any]:
    """Returns a list that is not empty, or raises [`ConfigError`]."""
    if not isinstance(value, (list, tuple)) or not value:
        raise ConfigError(f"{where} must be a list with at least one entry, got {value!r}.")
    return value
