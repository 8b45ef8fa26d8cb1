"""Values of mergekit's parameters: scalars, gradients over the layers and filters by name, as settings and rules of hf_merge.

mergekit looks a parameter up in several places, the most specific first (a model of a slice, the slice, the module, the
recipe), and for each tensor takes the first value whose filter matches. It interpolates a gradient over the layers of a slice.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...errors import ConfigError, suggest
from .methods import REQUIRED, Parameter


_WORDS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


@dataclass(frozen=True)
class Scope:
    """One place where parameters may stand.

    Args:
        where (`str`): What messages call it.
        parameters (`Mapping`): Names and raw values.
    """

    where: str
    parameters: Mapping[str, Any]


@dataclass(frozen=True)
class Conditional:
    """A value for the tensors whose name contains `filter`; for all when it is `None`. `value` is a scalar, or a tuple: a
    gradient."""

    filter: str | None
    value: Any


@dataclass(frozen=True)
class Resolved:
    """A setting of hf_merge: its value by filter, the first that matches wins, and the value for everything else."""

    filters: tuple[tuple[str, Any], ...]
    default: Any

    @property
    def is_plain(self) -> bool:
        """Whether it is one value for the whole model."""
        return not self.filters and not isinstance(self.default, Mapping)


def resolve(
    name: str, parameter: Parameter, slices: Sequence[Sequence[Scope]], lengths: Sequence[int] | None
) -> Resolved:
    """The value of one parameter over the whole model.

    Args:
        name (`str`): mergekit's name.
        parameter ([`Parameter`]): What it is.
        slices (`Sequence[Sequence[Scope]]`): For each slice the places where it may stand, the most specific first.
        lengths (`Sequence[int]`, *optional*): The number of layers of each slice; `None` for one slice of unknown length.

    Raises:
        ConfigError: A value is missing or malformed, or the slices use different filters.
    """
    found = [_first_matches(name, parameter, scopes) for scopes in slices]
    filters = {tuple(one.filter for one in conditionals[:-1]) for conditionals in found if len(conditionals) > 1}
    if len(filters) > 1:
        raise ConfigError(
            f"'{name}': the slices use different filters ({'; '.join(', '.join(one) for one in sorted(filters))}): give all "
            "slices the same filters in the same order."
        )
    ordered = filters.pop() if filters else ()
    columns = [
        [conditionals[index if len(conditionals) > 1 else -1].value for conditionals in found]
        for index in (*range(len(ordered)), -1)
    ]
    values = [_over_layers(name, parameter, column, lengths) for column in columns]
    return Resolved(tuple(zip(ordered, values[:-1], strict=True)), values[-1])


def _first_matches(name: str, parameter: Parameter, scopes: Sequence[Scope]) -> list[Conditional]:
    """The conditional values in order of precedence, up to the first one without a condition."""
    found: list[Conditional] = []
    for scope in scopes:
        if name not in scope.parameters:
            continue
        for one in _conditionals(f"{scope.where}.{name}", parameter, scope.parameters[name]):
            if one.filter is None:
                return [*found, one]
            if one.filter not in [earlier.filter for earlier in found]:
                found.append(one)
    if parameter.default is REQUIRED:
        for_what = f"parameters that match none of the filters {[one.filter for one in found]}" if found else "it"
        raise ConfigError(
            f"{scopes[0].where}: '{name}' is required, and there is no value for {for_what}: add one "
            "(in a list of filters an entry with 'value' only)."
        )
    return [*found, Conditional(None, parameter.default)]


def _conditionals(where: str, parameter: Parameter, raw: Any) -> list[Conditional]:
    if isinstance(raw, Mapping):
        raw = [raw]
    if not isinstance(raw, (list, tuple)) or not any(isinstance(one, Mapping) for one in raw):
        return [Conditional(None, _value(where, parameter, raw))]
    result = []
    for index, one in enumerate(raw):
        at = f"{where}[{index}]"
        if not isinstance(one, Mapping) or "value" not in one:
            raise ConfigError(f"{at} must be {{filter: text, value: value}}, got {one!r}.")
        unknown = next((key for key in one if key not in ("filter", "value")), None)
        if unknown is not None:
            raise ConfigError(f"{at}: unknown key '{unknown}'.{suggest(str(unknown), ('filter', 'value'))}")
        text = one.get("filter")
        if text is not None and not isinstance(text, str):
            raise ConfigError(f"{at}: 'filter' must be a part of a parameter's name, got {text!r}.")
        result.append(Conditional(None if text in (None, "", "*") else text, _value(at, parameter, one["value"])))
    return result


def _value(where: str, parameter: Parameter, raw: Any) -> Any:
    if not isinstance(raw, (list, tuple)):
        return _scalar(where, parameter.type, raw)
    if not raw:
        raise ConfigError(f"{where} is an empty list: give a value, or a gradient with at least one.")
    points = tuple(_scalar(f"{where}[{index}]", parameter.type, one) for index, one in enumerate(raw))
    return points[0] if len(set(points)) == 1 else points


def _scalar(where: str, type: type, raw: Any) -> Any:
    """A scalar as mergekit reads it: YAML takes `1e-5` for text, and `1` may stand for true."""
    if type is bool:
        value = _WORDS.get(raw.lower()) if isinstance(raw, str) else raw
        if value in (True, False):
            return bool(value)
    elif isinstance(raw, (bool, int, float, str)):
        try:
            number = float(raw)
        except (ValueError, OverflowError):
            number = math.nan
        if math.isfinite(number) and (type is float or number == int(number)):
            return type(number)
    words = {bool: "true or false", int: "an integer", float: "a number"}[type]
    raise ConfigError(f"{where} must be {words}, a list of such values, or a list of filters, got {raw!r}.")


def _over_layers(name: str, parameter: Parameter, values: Sequence[Any], lengths: Sequence[int] | None) -> Any:
    """One value for each slice as a setting: plain, or a gradient over the whole model.

    Several slices give a gradient with one point for each layer, which is exact.
    """
    if len(values) == 1 and (lengths is None or parameter.type is float and lengths[0] > 1):
        points = values[0] if isinstance(values[0], tuple) else (values[0],)
    else:
        points = [point for value, length in zip(values, lengths, strict=True) for point in _by_layer(value, length)]
    points = [parameter.convert(point) for point in points]
    if all(point == points[0] for point in points):
        return points[0]
    if not all(isinstance(point, (int, float)) and not isinstance(point, bool) for point in points):
        raise ConfigError(f"'{name}' cannot change over the layers: give one value.")
    return {"gradient": points}


def _by_layer(value: Any, length: int) -> list[Any]:
    """The value at each layer of a slice: numbers are interpolated, booleans picked. A single layer has the last one."""
    if not isinstance(value, tuple):
        return [value] * length
    positions = [index / (length - 1) if length > 1 else 1.0 for index in range(length)]
    return [_at(value, position * (len(value) - 1)) for position in positions]


def _at(points: Sequence[Any], position: float) -> Any:
    low = int(position)
    if isinstance(points[0], bool):
        return points[low]
    high = min(low + 1, len(points) - 1)
    return points[low] + (points[high] - points[low]) * (position - low)


def shared_setting(key: str, resolved: Resolved) -> tuple[Any, list[dict[str, Any]]]:
    """The field's value and the rules of a setting that is the same for all experts."""
    return resolved.default, [{"match": re.escape(text), key: value} for text, value in resolved.filters]


def expert_setting(key: str, resolved: Mapping[str, Resolved]) -> tuple[Any, list[dict[str, Any]]]:
    """The field's value and the rules of a setting with one value per expert.

    Experts with the same filters share rules; the others get rules of their own, which name only them.
    """
    groups: dict[tuple[str, ...], list[str]] = {}
    for expert, one in resolved.items():
        groups.setdefault(tuple(text for text, _ in one.filters), []).append(expert)
    rules = []
    for filters, experts in groups.items():
        for index, text in enumerate(filters):
            values = {expert: resolved[expert].filters[index][1] for expert in experts}
            rules.append({"match": re.escape(text), key: _collapse(values) if len(groups) == 1 else values})
    return _collapse({expert: one.default for expert, one in resolved.items()}), rules


def _collapse(values: dict[str, Any]) -> Any:
    """One value where all experts have the same."""
    first = next(iter(values.values()))
    return first if all(value == first for value in values.values()) else values
