"""The models of a mergekit recipe: `models`, `slices` and `modules` as one list of slices."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ...errors import ConfigError, suggest
from .checks import check_keys, check_list, warn_ignored
from .methods import PARAMETERS, Method
from .values import Scope


_MOST_LAYERS = 100_000
"""More than any model has: a recipe is laid out layer by layer."""


@dataclass(frozen=True)
class Reference:
    """A model as mergekit names it: a path or Hub id, and a revision."""

    path: str
    revision: str | None = None

    @classmethod
    def parse(cls, where: str, value: Any) -> Reference:
        """From `path`, `path@revision`, or mergekit's mapping."""
        if isinstance(value, Mapping):
            check_keys(where, value, ("model", "lora", "override_architecture", "path", "revision"))
            for key, remedy in (
                ("lora", "merge the adapter into its base model first"),
                ("override_architecture", "correct 'architectures' in the model's config.json"),
            ):
                if value.get(key) is not None:
                    raise ConfigError(f"{where}: '{key}' is not supported: {remedy}.")
            if "model" in value:
                return cls.parse(where, value["model"])
            parts = [part for part in (value.get("path"), value.get("revision")) if part]
            value = "@".join(parts) if all(isinstance(part, str) for part in parts) else value
        if not isinstance(value, str) or not value:
            raise ConfigError(f"{where} must be a path or a Hub id, got {value!r}.")
        if os.path.exists(value):  # a folder whose name has one of mergekit's separators
            return cls(value.rstrip("/") or value)
        if "+" in value:
            raise ConfigError(
                f"{where}: '{value}' is a model with an adapter: merge the adapter into its base model first."
            )
        path, _, revision = value.partition("@")
        return cls(path.rstrip("/") or path, revision or None)

    @property
    def entry(self) -> dict[str, str]:
        """How a recipe of hf_merge names the model."""
        return {"model": self.path} | ({"revision": self.revision} if self.revision else {})


@dataclass
class Source:
    """A model of a slice: its layers (all of them when `None`) and the parameters that are given beside it."""

    reference: Reference
    layers: tuple[int, int] | None
    scope: Scope


@dataclass
class Slice:
    """Models whose layers are merged: a slice of the recipe, or its `models`."""

    where: str
    sources: list[Source]
    base: Reference | None
    scopes: list[Scope] = field(default_factory=list)

    def take_base(self) -> Source | None:
        """Removes and returns the base model from the sources."""
        found = next((source for source in self.sources if source.reference == self.base), None)
        self.sources = [source for source in self.sources if source is not found]
        return found

    @property
    def length(self) -> int | None:
        layers = self.sources[0].layers
        return layers[1] - layers[0] if layers else None


class InputReader:
    """Reads and checks the models of one document.

    Args:
        data (`Mapping`): The document.
        where (`str`): What messages call it.
        method ([`Method`]): Its merge method.
    """

    def __init__(self, data: Mapping[str, Any], where: str, method: Method):
        self.data = data
        self.where = where
        self.method = method

    def slices(self) -> list[Slice]:
        """The slices in order; whole models are one slice without layers."""
        given = [key for key in ("models", "slices", "modules") if self.data.get(key)]
        if len(given) != 1:
            raise ConfigError(
                f"{self.where} must have exactly one of 'models', 'slices' and 'modules', it has "
                f"{' and '.join(given) or 'none'}."
            )
        base = self.data.get("base_model")
        base = Reference.parse(f"{self.where}: base_model", base) if base is not None else None
        where, part, scopes = self.where, self.data, [self._scope(self.where, self.data)]
        if given == ["modules"]:
            where, part = self._only_module()
            scopes = [self._scope(where, part), *scopes]
        if part.get("models"):
            return [self._models_as_slice(f"{where}: models", part["models"], base, scopes)]
        return [
            self._slice(f"{where}: slices[{index}]", one, base, scopes)
            for index, one in enumerate(check_list(f"{where}: slices", part["slices"]))
        ]

    def _only_module(self) -> tuple[str, Mapping[str, Any]]:
        """The one module, or what all modules have in common when they say the same."""
        modules = self.data["modules"]
        if not isinstance(modules, Mapping):
            raise ConfigError(f"{self.where}: modules must be a mapping from names to modules, got {modules!r}.")
        for name, module in modules.items():
            where = f"{self.where}: modules.{name}"
            check_keys(where, module, ("models", "slices", "parameters"))
            if bool(module.get("models")) == bool(module.get("slices")):
                raise ConfigError(f"{where} must have one of 'models' and 'slices'.")
        name, first = next(iter(modules.items()))
        if any(module != first for module in modules.values()):
            raise ConfigError(
                f"{self.where}: modules {', '.join(map(str, modules))} are merged differently, which cannot be expressed: give "
                "all of them the same models and parameters, or use 'models' with filters by name."
            )
        if len(modules) > 1 and first.get("slices"):
            raise ConfigError(f"{self.where}: modules: only a model with one stack of layers can be made of slices.")
        return f"{self.where}: modules.{name}", first

    def _models_as_slice(self, where: str, models: Any, base: Reference | None, scopes: list[Scope]) -> Slice:
        sources = []
        for index, model in enumerate(check_list(where, models)):
            at = f"{where}[{index}]"
            check_keys(at, model, ("model", "parameters"))
            sources.append(Source(self._reference(at, model), None, self._scope(at, model)))
        if base is not None and base not in [source.reference for source in sources]:
            sources.append(Source(base, None, Scope(f"{self.where}: base_model", {})))
        return _distinct(Slice(where, sources, base, scopes))

    def _slice(self, where: str, data: Any, base: Reference | None, scopes: list[Scope]) -> Slice:
        check_keys(where, data, ("sources", "base_model", "residual_weight", "parameters"))
        if data.get("residual_weight") is not None:
            warn_ignored(where, "residual_weight", "has no effect")
        if data.get("base_model") is not None:
            base = Reference.parse(f"{where}: base_model", data["base_model"])
        sources = []
        for index, source in enumerate(check_list(f"{where}: sources", data.get("sources"))):
            at = f"{where}: sources[{index}]"
            check_keys(at, source, ("model", "layer_range", "parameters"))
            sources.append(Source(self._reference(at, source), _layer_range(at, source), self._scope(at, source)))
        found = _distinct(Slice(where, sources, base, [self._scope(where, data), *scopes]))
        if len({layers[1] - layers[0] for layers in (source.layers for source in sources)}) != 1:
            raise ConfigError(f"{where}: all sources of a slice must have the same number of layers.")
        return found

    def _reference(self, where: str, data: Mapping[str, Any]) -> Reference:
        return Reference.parse(f"{where}: model", data.get("model"))

    def _scope(self, where: str, data: Mapping[str, Any]) -> Scope:
        """The parameters of one place, with every name checked."""
        parameters = data.get("parameters") or {}
        if not isinstance(parameters, Mapping):
            raise ConfigError(f"{where}: parameters must be a mapping from names to values, got {parameters!r}.")
        known = self.method.parameters
        for name in parameters:
            if name not in PARAMETERS:
                raise ConfigError(
                    f"{where}: unknown parameter '{name}'.{suggest(str(name), PARAMETERS)} "
                    f"'{self.data['merge_method']}' has: {', '.join(known) or 'none'}."
                )
            if name not in known or known[name].setting is None:
                warn_ignored(where, name, f"has no effect on '{self.data['merge_method']}'")
        return Scope(where, parameters)


def _layer_range(where: str, source: Mapping[str, Any]) -> tuple[int, int]:
    bounds = source.get("layer_range")
    if not isinstance(bounds, (list, tuple)) or [type(bound) for bound in bounds] != [int, int]:
        raise ConfigError(
            f"{where}: layer_range must be two integers, the first layer and the one after the last, got {bounds!r}."
        )
    if not 0 <= bounds[0] < bounds[1] <= _MOST_LAYERS:
        raise ConfigError(f"{where}: layer_range {bounds!r} is no range of a model's layers, such as [0, 16].")
    return bounds[0], bounds[1]


def _distinct(one: Slice) -> Slice:
    references = [source.reference for source in one.sources]
    for index, reference in enumerate(references):
        if reference in references[:index]:
            raise ConfigError(f"{one.where}: the model '{reference.path}' is listed twice.")
    return one
