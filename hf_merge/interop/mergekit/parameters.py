"""The parameters of a mergekit recipe as fields and rules of a config."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from ...errors import ConfigError
from .checks import warn_ignored
from .inputs import Slice
from .methods import Method
from .values import Resolved, expert_setting, resolve, shared_setting


class Settings:
    """The fields and rules that a document's parameters become.

    Args:
        method ([`Method`]): mergekit's.
        where (`str`): What messages call the document.
        slices (`list[Slice]`): Without the base model.
        experts (`list[str]`): The name of each position of the sources.

    **Attributes**:
        - **fields** (`dict`) -- Values by setting.
        - **rules** (`list[dict]`) -- What filters by name become.
    """

    def __init__(self, method: Method, where: str, slices: list[Slice], experts: list[str]):
        self.method = method
        self.where = where
        self.slices = slices
        self.experts = experts
        lengths = [one.length for one in slices]
        self.lengths = None if lengths[0] is None else lengths
        self.fields: dict[str, Any] = {}
        self.rules: list[dict[str, Any]] = []
        plain: dict[str, Resolved] = {}
        for name, parameter in method.parameters.items():
            if parameter.setting in ("flatten", "row_wise"):
                plain[name] = self._resolve(name, None)
            elif parameter.setting is not None:
                self._add(name)
        if plain:
            self.fields["granularity"] = granularity(where, plain)
        self._check_negative_weights()

    def _add(self, name: str) -> None:
        parameter = self.method.parameters[name]
        if parameter.per_model:
            found = {expert: self._resolve(name, k) for k, expert in enumerate(self.experts)}
            value, rules = expert_setting(parameter.setting, found)
        else:
            self._warn_of_misplaced(name)
            value, rules = shared_setting(parameter.setting, self._resolve(name, None))
        self.fields[parameter.setting] = value
        self.rules += rules

    def _resolve(self, name: str, expert: int | None) -> Resolved:
        scopes = [[*([one.sources[expert].scope] if expert is not None else []), *one.scopes] for one in self.slices]
        return resolve(name, self.method.parameters[name], scopes, self.lengths)

    def _warn_of_misplaced(self, name: str) -> None:
        for one in self.slices:
            for source in one.sources:
                if name in source.scope.parameters:
                    warn_ignored(
                        source.scope.where, name, "is given for one model, and is a parameter of the whole merge"
                    )

    def _check_negative_weights(self) -> None:
        divides = self.fields.get("merge") == "mean" or (
            self.method.fixed.get("combination") == "ties" and self.fields.get("normalize") is True
        )
        if divides and any(number < 0 for number in _numbers(self.fields["weights"])):
            warnings.warn(
                f"{self.where}: negative weights are normalised by the sum of |w|, where mergekit divides by the sum of "
                "w, which may vanish or change the sign.",
                stacklevel=2,
            )


def granularity(where: str, resolved: Mapping[str, Resolved]) -> str:
    """What one vector of NuSLERP is, from mergekit's two switches."""
    for name, one in resolved.items():
        if not one.is_plain:
            raise ConfigError(f"{where}: '{name}' must be one value for the whole model.")
    if resolved["nuslerp_flatten"].default:
        return "tensor"
    # mergekit's row-wise form normalises along the first dimension, the other one along the last.
    return "column" if resolved["nuslerp_row_wise"].default else "row"


def _numbers(value: Any) -> list[float]:
    if isinstance(value, Mapping):
        return [number for one in value.values() for number in _numbers(one)]
    return list(value) if isinstance(value, (list, tuple)) else [value]
