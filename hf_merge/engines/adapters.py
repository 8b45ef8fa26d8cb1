"""The engine of experts that are adapters: task vectors are merged as factors, or one dense change at a time, and the base model
is added at the end or not at all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..checkpoints.source import ModelSource
from ..config import MergeConfig
from ..errors import NonFiniteError
from ..kinds import ParameterKind
from ..low_rank import Factors, stacked
from ..methods.base import LinearMethod, LowRankGroup, TensorGroup, TensorMethod
from ..registry import get_merge_method
from .pipeline import Loaded, Written
from .placement import Placement
from .plan import MergePlan, PlannedParameter
from .streaming import StreamingEngine


if TYPE_CHECKING:
    from ..adapters.source import AdapterSource


_TRANSPOSED = (ParameterKind.TRANSPOSED_LINEAR, ParameterKind.TRANSPOSED_EXPERT_LINEAR)
_STACKED = (ParameterKind.EXPERT_LINEAR, ParameterKind.TRANSPOSED_EXPERT_LINEAR)


def needs_base_values(config: MergeConfig) -> bool:
    """Whether a recipe reads weights of the base model even if all experts are factors and the result is an adapter."""
    if config.output != "adapter":
        return True
    recipes = [config, *config.next_recipes()]
    recipes += [
        get_merge_method(rule["merge_type"]).config_cls(
            **{key: value for key, value in rule.items() if key not in ("match", "merge_type")}
        )
        for rule in config.rules
        if "merge_type" in rule
    ]
    methods = [(get_merge_method(recipe.merge_type).method_cls, recipe) for recipe in recipes]
    return not all(issubclass(method, TensorMethod) and method.works_on_changes(recipe) for method, recipe in methods)


def all_adapters(experts: Sequence[ModelSource]) -> bool:
    """Whether every expert is an adapter."""
    return all(source.is_adapter for source in experts)


def merges_changes(parameter: PlannedParameter) -> bool:
    """Whether a parameter's method, and the recipes that follow it, need the changes of the base model and not its value."""
    if parameter.action != "merge" or parameter.base is None:
        return False
    for settings in (parameter.settings, *parameter.then):
        method = get_merge_method(settings.merge_type).method_cls
        if not issubclass(method, TensorMethod) or not method.works_on_changes(settings):
            return False
    return True


def factor_problems(plan: MergePlan) -> list[str]:
    """The parameters that settings need the experts' changes of as factors, where they are not: one sentence for each method."""
    found: dict[str, str] = {}
    for parameter in plan.parameters:
        for settings in (parameter.settings, *parameter.then):
            method = get_merge_method(settings.merge_type).method_cls
            needs = (
                issubclass(method, LinearMethod) and method.needs_factors(settings) and parameter.kind in method.kinds
            )
            if parameter.action == "merge" and needs and not _holds_factors(plan, parameter):
                found.setdefault(
                    settings.merge_type,
                    f"'{settings.merge_type}' has no rank to take from the experts at '{parameter.name}', whose changes are no "
                    "factors there: set rank=...",
                )
    return list(found.values())


def _holds_factors(plan: MergePlan, parameter: PlannedParameter) -> bool:
    """Whether the experts' changes of a parameter, where they have one, reach its method as factors."""
    if parameter.then or not all_adapters(plan.experts):
        return False
    deltas = [source.deltas.get(name) for source, name in zip(plan.experts, parameter.experts, strict=True)]
    return all(delta is None or delta.factors is not None for delta in deltas)


@dataclass
class LoadedChanges(Loaded):
    """What adapters do to one parameter; `experts` stays empty, for changes are made dense only where a method asks for it."""

    changes: list[tuple[AdapterSource, str]]

    def mapped(self, function: Callable[[Tensor], Tensor]) -> LoadedChanges:
        """Itself: it is computed with dense changes, which are not there yet."""
        return self

    @property
    def touched(self) -> bool:
        """Whether any adapter changes the parameter."""
        return any(name in source.deltas for source, name in self.changes)

    def factors(self) -> list[Factors] | None:
        """The changes as factors, of rank 0 where an adapter leaves the parameter alone; `None` where one is dense."""
        found = [(source.factors(name), name in source.deltas) for source, name in self.changes]
        known = [factors for factors, _ in found if factors is not None]
        if not known or any(factors is None and touched for factors, touched in found):
            return None
        return [Factors.zero(known[0]) if factors is None else factors for factors, _ in found]


class AdapterEngine(StreamingEngine):
    """Merges adapters by data-free methods, into a model or, with a layout, into the changes that an adapter holds."""

    def __init__(self, plan: MergePlan, placement: Any):
        super().__init__(plan, placement)
        self._whole = None if plan.adapter is None else set(plan.adapter.planned.values)

    def read(self, parameter: PlannedParameter) -> Loaded:
        if not merges_changes(parameter):
            return super().read(parameter)
        wants_base = self._whole is None or parameter.name in self._whole
        base = self.plan.base.read(parameter.base) if wants_base else None
        return LoadedChanges([], base, list(zip(self.plan.experts, parameter.experts, strict=True)))

    def _surveyed(self) -> list[PlannedParameter]:
        """Parameters that no adapter changes have no task vectors to survey."""
        return [
            parameter
            for parameter in super()._surveyed()
            if any(name in source.deltas for source, name in zip(self.plan.experts, parameter.experts, strict=True))
        ]

    def _group(self, parameter: PlannedParameter, loaded: Loaded) -> TensorGroup:
        """The changes, made dense, as experts of a base model of zeros."""
        if not isinstance(loaded, LoadedChanges):
            return super()._group(parameter, loaded)
        changes = [source.change(name) for source, name in loaded.changes]
        return super()._group(parameter, Loaded(changes, torch.zeros_like(changes[0])))

    @torch.no_grad()
    def finish(self, parameter: PlannedParameter, loaded: Loaded, rounded: bool = True) -> Tensor | Factors:
        """The merged value; where the result is an adapter that holds the parameter's change, the merged change."""
        if not isinstance(loaded, LoadedChanges):
            return self._finish_value(parameter, loaded, rounded)
        row = self._row(parameter)
        row["method"] = parameter.settings.merge_type
        if not loaded.touched:
            return loaded.base.to(parameter.info.dtype if rounded else torch.float32)
        change = self._merge_low_rank(parameter, loaded, row)
        if change is None:
            change, reported = self._on_device(parameter, loaded, lambda group: self._change(parameter, group))
            row.update(reported)
        self._check_finite(parameter, change)
        row["task_vector_norm"] = change.norm() if isinstance(change, Factors) else change.norm().item()
        if loaded.base is None:
            return change
        dense = change.dense().reshape(parameter.info.shape) if isinstance(change, Factors) else change
        merged = loaded.base.to(dense.dtype) + dense
        result = merged.to(parameter.info.dtype)
        self._check_finite(parameter, result)
        row["norm"] = float(torch.linalg.vector_norm(merged))
        return result if rounded else merged

    def _change(self, parameter: PlannedParameter, group: TensorGroup) -> tuple[Tensor, dict[str, float]]:
        """The merged change, dense, and what its method reports."""
        change = self._method(parameter.settings.merge_type)(group)
        return self._follow(parameter, group, change).cpu(), group.report

    def _finish_value(self, parameter: PlannedParameter, loaded: Loaded, rounded: bool) -> Tensor:
        """By a method that needs the values; an adapter gets the difference to the base model's."""
        holds_change = self._whole is not None and parameter.name not in self._whole
        value = super().finish(parameter, loaded, rounded and not holds_change)
        return value - loaded.base.to(value.device, value.dtype) if holds_change else value

    def _merge_low_rank(self, parameter: PlannedParameter, loaded: LoadedChanges, row: dict) -> Factors | None:
        """The merged change as factors, in the orientation that the parameter is stored in."""
        factors = loaded.factors() if not parameter.then else None
        if factors is None:
            return None
        if parameter.kind in _TRANSPOSED:
            factors = [one.mT for one in factors]
        if parameter.kind in _STACKED:
            count = factors[0].left.shape[0]
            parts = [self._merge_factors(parameter, [one[e] for one in factors], row, count) for e in range(count)]
            merged = None if any(part is None for part in parts) else stacked(parts)
        else:
            merged = self._merge_factors(parameter, factors, row, 1)
        return merged.mT if merged is not None and parameter.kind in _TRANSPOSED else merged

    def _merge_factors(
        self, parameter: PlannedParameter, factors: list[Factors], row: dict, count: int
    ) -> Factors | None:
        group = LowRankGroup(
            name=parameter.name,
            kind=parameter.kind,
            experts=factors,
            expert_names=tuple(source.name for source in self.plan.experts),
            settings=parameter.settings,
            seed=self.plan.config.seed,
        )
        merged = self._method(parameter.settings.merge_type).merge_low_rank(group)
        for key, value in group.report.items():
            row[key] = row.get(key, 0.0) + value / count
        return merged

    def _check_finite(self, parameter: PlannedParameter, value: Tensor | Factors) -> None:
        parts = (value.left, value.right) if isinstance(value, Factors) else (value,)
        if not all(bool(torch.isfinite(part).all()) for part in parts):
            raise NonFiniteError(
                f"Merging '{parameter.name}' with '{parameter.settings.merge_type}' gave NaN or infinity: one of the adapters holds "
                "them, or the settings or the dtype are at fault."
            )

    def _write(self, group: Any, merged: Any, sink: Any, tell: Any) -> None:
        if self._whole is None:
            super()._write(group, merged, sink, tell)
            return
        for name, value in merged.items():
            if name in self._whole:
                sink.write(name, value)
            else:
                sink.write_change(name, value)
            tell(Written(name, {}))


def tensor_engine(plan: MergePlan, placement: Placement) -> StreamingEngine:
    """The engine of a method that merges parameter by parameter.

    Args:
        plan ([`MergePlan`]): A checked plan.
        placement ([`Placement`]): Where parameters are merged.
    """
    return AdapterEngine(plan, placement) if all_adapters(plan.experts) else StreamingEngine(plan, placement)
