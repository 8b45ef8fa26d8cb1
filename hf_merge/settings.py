"""Values of a recipe: how a field is declared, checked, and resolved for one parameter.

A *setting* is a field of a [`MergeConfig`]. Where its scope allows, its value may be given in four forms:

- a number: the same for every parameter and expert;
- a list, one number per expert, or a dictionary `{expert name: number}`;
- `{"gradient": [first, ..., last]}`: interpolated linearly over the depth of the model.

This file knows nothing about models; [`Setting.resolve`] is given the depth and the names of the experts.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from .errors import ConfigError, suggest


Scope = Literal["merge", "parameter", "expert"]
_KEY = "hf_merge_setting"


@dataclass(frozen=True)
class Setting:
    """What a field accepts.

    Args:
        type (`type`): `float`, `int`, `bool` or `str`.
        minimum, maximum (`float`, *optional*): The closed range of a number.
        above, below (`float`, *optional*): The open ends of the range.
        choices (`tuple`, *optional*): The allowed words.
        optional (`bool`): Whether `None` is allowed.
        scope (`str`): `"merge"`: one value for the whole merge. `"parameter"`: may differ between parameters (rules and
            gradients). `"expert"`: may differ between parameters and between experts, and is resolved to one value per expert.
    """

    type: type
    minimum: float | None = None
    maximum: float | None = None
    above: float | None = None
    below: float | None = None
    choices: tuple[str, ...] | None = None
    optional: bool = False
    scope: Scope = "parameter"

    def describe(self) -> str:
        """The allowed values in words, for error messages and the command line's help."""
        if self.choices is not None:
            words = "one of " + ", ".join(f"'{choice}'" for choice in self.choices)
        elif self.type is bool:
            words = "true or false"
        elif self.type is str:
            words = "a string"
        else:
            words = "an integer" if self.type is int else "a number"
            low, high = self._lower(), self._upper()
            if low or high:
                words += " with " + " and ".join(bound for bound in (low, high) if bound)
        return words + (" or null" if self.optional else "")

    def _lower(self) -> str:
        if self.minimum is not None:
            return f"value >= {self.minimum:g}"
        return f"value > {self.above:g}" if self.above is not None else ""

    def _upper(self) -> str:
        if self.maximum is not None:
            return f"value <= {self.maximum:g}"
        return f"value < {self.below:g}" if self.below is not None else ""

    def accepts(self, value: Any) -> bool:
        """Whether one plain value is allowed."""
        if value is None:
            return self.optional
        if self.choices is not None:
            return value in self.choices
        if self.type in (bool, str):
            return isinstance(value, self.type)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not _is_finite(value):
            return False
        if self.type is int and value != int(value):
            return False
        return (
            (self.minimum is None or value >= self.minimum)
            and (self.maximum is None or value <= self.maximum)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
        )

    def check(self, where: str, value: Any) -> None:
        """Raises [`ConfigError`] unless `value`, in any of the forms that the scope allows, is valid."""
        if isinstance(value, Mapping) and "gradient" in value:
            self._check_gradient(where, value)
        elif isinstance(value, Mapping):
            self._require_expert_scope(where, value)
            for name, one in value.items():
                self._for_one_expert.check(f"{where}[{name!r}]", one)
        elif isinstance(value, (list, tuple)):
            self._require_expert_scope(where, value)
            if not value:
                raise ConfigError(f"{where} is an empty list: give one value per expert.")
            for index, one in enumerate(value):
                self._for_one_expert.check(f"{where}[{index}]", one)
        elif not self.accepts(value):
            raise ConfigError(f"Invalid value for {where}: {value!r}. It must be {self.describe()}.")

    @property
    def _for_one_expert(self) -> Setting:
        return dataclasses.replace(self, scope="parameter")

    def _check_gradient(self, where: str, value: Mapping) -> None:
        if self.scope == "merge":
            raise ConfigError(f"{where} is one value for the whole merge; a gradient over depth is not possible.")
        if set(value) != {"gradient"}:
            raise ConfigError(f"{where}: a gradient has the single key 'gradient', got {sorted(map(str, value))}.")
        if self.type not in (float, int) or self.choices is not None:
            raise ConfigError(f"{where} must be {self.describe()}; a gradient needs numbers.")
        points = value["gradient"]
        if not isinstance(points, (list, tuple)) or not points:
            raise ConfigError(f"{where}: 'gradient' must be a list with at least one value, got {points!r}.")
        for index, one in enumerate(points):
            self.check(f"{where}.gradient[{index}]", one)

    def _require_expert_scope(self, where: str, value: Any) -> None:
        if self.scope != "expert":
            raise ConfigError(
                f"Invalid value for {where}: {value!r}. It must be {self.describe()}, the same for every expert."
            )

    def resolve(self, where: str, value: Any, depth: float, experts: Sequence[str]) -> Any:
        """The value for one parameter: a plain value, or a list with one value per expert when the scope is `"expert"`.

        Args:
            where (`str`): The field's name, for messages.
            value: The value as given in the recipe, already checked.
            depth (`float`): The position of the parameter, 0 at the input and 1 at the output of the model.
            experts (`Sequence[str]`): The names of the experts.
        """
        if self.scope == "expert":
            if isinstance(value, Mapping) and "gradient" not in value:
                value = [value[name] for name in _exact_names(where, value, experts)]
            if isinstance(value, (list, tuple)):
                if len(value) != len(experts):
                    raise ConfigError(
                        f"{where} has {len(value)} values for {len(experts)} experts ({', '.join(experts)})."
                    )
                return [self._scalar(where, one, depth) for one in value]
            if isinstance(value, Mapping):
                points = [self.resolve(where, point, depth, experts) for point in value["gradient"]]
                return [self._interpolate([point[i] for point in points], depth) for i in range(len(experts))]
            return [value] * len(experts)
        return self._scalar(where, value, depth)

    def resolve_first(
        self, where: str, values: Sequence[Any], fallback: Any, depth: float, experts: Sequence[str]
    ) -> Any:
        """The value for one parameter from the values of several rules, the first of which wins.

        A dictionary in `values` may name some experts only: the others take theirs from the next value.

        Args:
            where (`str`): The field's name, for messages.
            values (`Sequence`): In order of precedence.
            fallback: Where no value is left; complete.
            depth (`float`), experts (`Sequence[str]`): As in [`~Setting.resolve`].
        """
        if self.scope != "expert":
            return self.resolve(where, values[0] if values else fallback, depth, experts)
        found: dict[str, Any] = {}
        for value in values:
            if isinstance(value, Mapping) and "gradient" not in value:
                _known_names(where, value, experts)
                found = {name: self._scalar(where, one, depth) for name, one in value.items()} | found
            else:
                fallback = value
                break
        if len(found) == len(experts):
            return [found[name] for name in experts]
        rest = self.resolve(where, fallback, depth, experts)
        return [found.get(name, value) for name, value in zip(experts, rest, strict=True)]

    def _scalar(self, where: str, value: Any, depth: float) -> Any:
        if isinstance(value, Mapping):
            return self._interpolate([self._scalar(where, point, depth) for point in value["gradient"]], depth)
        return int(value) if self.type is int and isinstance(value, float) else value

    def _interpolate(self, points: Sequence[float], depth: float) -> float:
        position = depth * (len(points) - 1)
        low = min(int(position), len(points) - 1)
        high = min(low + 1, len(points) - 1)
        value = points[low] + (points[high] - points[low]) * (position - low)
        return round(value) if self.type is int else value


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond all floating-point numbers
        return False


def _known_names(where: str, value: Mapping, experts: Sequence[str]) -> None:
    for name in value:
        if name not in experts:
            raise ConfigError(
                f"{where} names the expert '{name}', which is not one of {', '.join(experts)}.{suggest(name, experts)}"
            )


def _exact_names(where: str, value: Mapping, experts: Sequence[str]) -> Sequence[str]:
    _known_names(where, value, experts)
    missing = [name for name in experts if name not in value]
    if missing:
        raise ConfigError(f"{where} gives no value for the expert(s) {', '.join(missing)}: name every expert.")
    return experts


def setting(
    default: Any,
    help: str,
    *,
    type: type | None = None,
    minimum: float | None = None,
    maximum: float | None = None,
    above: float | None = None,
    below: float | None = None,
    choices: Sequence[str] | None = None,
    scope: Scope = "parameter",
) -> Any:
    """Declares a dataclass field with its help text and its [`Setting`]. The type is that of the default when not given."""
    if type is None:
        if default is None:
            raise TypeError("setting(None, ...) needs an explicit type")
        type = default.__class__
    spec = Setting(
        type=type,
        minimum=minimum,
        maximum=maximum,
        above=above,
        below=below,
        choices=tuple(choices) if choices is not None else None,
        optional=default is None,
        scope=scope,
    )
    return dataclasses.field(default=default, metadata={"help": help, _KEY: spec})


def settings_of(config: Any) -> dict[str, Setting]:
    """The settings of a config class or instance, by field name."""
    return {field.name: field.metadata[_KEY] for field in dataclasses.fields(config) if _KEY in field.metadata}
