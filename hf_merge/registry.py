"""The open table of merge methods: name -> (config class, method class).

Built-in methods register themselves when they are asked for; third parties call
[`register_merge_method`] with their own classes and need nothing else to be merged, planned, saved and listed like the
built-in ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from .errors import ConfigError, suggest
from .methods import BUILT_IN, load_methods


if TYPE_CHECKING:
    from .config import MergeConfig
    from .methods.base import MergeMethod


@dataclass(frozen=True)
class MergeMethodEntry:
    """One row of the table: the name, its config class and its method class."""

    name: str
    config_cls: type[MergeConfig]
    method_cls: type[MergeMethod]


_METHODS = load_methods.__module__
_REGISTRY: dict[str, MergeMethodEntry] = {}


def register_merge_method(*, name: str, config_cls: type[MergeConfig], method_cls: type[MergeMethod]) -> None:
    """Adds a merge method.

    Args:
        name (`str`): The `merge_type`, lower case, `[a-z0-9_]`.
        config_cls (`type[MergeConfig]`): A dataclass whose `merge_type` defaults to `name`.
        method_cls (`type[MergeMethod]`): The computation, a subclass of one of the contracts in `hf_merge.methods.base`.

    Raises:
        ConfigError: The name is taken by other classes, is not lower case, or the config's default says another name.
    """
    if not name or name != name.lower() or not name.replace("_", "").isalnum():
        raise ConfigError(f"Invalid merge method name '{name}': use lower-case letters, digits and '_'.")
    if config_cls.merge_type != name:
        raise ConfigError(
            f"{config_cls.__name__}.merge_type is '{config_cls.merge_type}' but is registered as '{name}': make them equal."
        )
    if name in BUILT_IN and not config_cls.__module__.startswith(f"{_METHODS}."):
        load_methods([name])  # the name is taken, whether it was asked for or not
    known = _REGISTRY.get(name)
    if known is not None and (known.config_cls, known.method_cls) != (config_cls, method_cls):
        raise ConfigError(f"The merge method '{name}' is registered already, by {known.method_cls.__module__}.")
    _REGISTRY[name] = MergeMethodEntry(name, config_cls, method_cls)


def get_merge_method(name: str) -> MergeMethodEntry:
    """Returns the entry of a method, or raises [`ConfigError`] with the nearest known name."""
    if isinstance(name, str) and name not in _REGISTRY and name in BUILT_IN:
        load_methods([name])
    if not isinstance(name, str) or name not in _REGISTRY:
        methods = available_merge_methods()
        raise ConfigError(
            f"Unknown merge method '{name}'.{suggest(name, methods)} Known methods: {', '.join(sorted(methods))}."
        )
    return _REGISTRY[name]


def available_merge_methods() -> dict[str, MergeMethodEntry]:
    """All registered methods by name, built-in ones included."""
    load_methods()
    return dict(_REGISTRY)
