"""The plan of a mixture of experts: the dense merge that gives everything outside of the MLPs, the experts' MLPs, and the routers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..checkpoints.source import ModelSource
from ..checkpoints.storage import TensorInfo
from ..config import MergeConfig
from ..errors import suggest
from ..methods.moe.config import BASE
from ..modeling.mixtures import FAMILIES, expert_weights, mixture_refusal, routed_module
from ..registry import get_merge_method
from .plan import MergePlan, PlannedParameter
from .planned_source import planned_source
from .planning import build_plan


@dataclass
class MixturePlan(MergePlan):
    """A [`MergePlan`] whose result is a mixture of experts.

    Args:
        shared ([`MergePlan`], *optional*): The dense merge of all parameters. Those outside of the MLPs become the mixture's; the
            dense model as a whole is what `gate_mode="hidden"` runs.
    """

    shared: MergePlan | None = None


def build_mixture_plan(config: MergeConfig, experts: Sequence[ModelSource], base: ModelSource | None) -> MixturePlan:
    """Plans a merge by a [`MixtureMethod`] from the headers of its models.

    Args:
        config ([`MergeConfig`]): The recipe.
        experts (`Sequence[ModelSource]`): At least two.
        base ([`ModelSource`], *optional*): The base model.
    """
    refused = _refusals(config, experts, base)
    if refused:
        return MixturePlan(config, list(experts), base, problems=refused)
    shared = build_plan(config.inner_config(), experts, base)
    plan = MixturePlan(
        config,
        shared.experts,
        shared.base,
        dropped=shared.dropped,
        notes=shared.notes,
        problems=shared.problems,
        shared=shared,
    )
    if plan.problems:
        return plan
    if config.shared == BASE:
        _take_from_base(shared)
    first = plan.experts[0]
    family = FAMILIES[first.model_class.__name__]
    target = family.mixture_config(first.config, len(plan.experts), config.experts_per_token)
    plan.merged = planned_source(first, family.mixture_class, target)
    _plan_parameters(plan)
    return plan


def _refusals(config: MergeConfig, experts: Sequence[ModelSource], base: ModelSource | None) -> list[str]:
    """What the recipe and the configs tell, before anything is compared."""
    method = get_merge_method(config.merge_type).method_cls
    found = method.refusals(config.merge_type, len(experts), base is not None)
    for source in experts:
        reason = mixture_refusal(source.model_class, source.config)
        if reason is not None:
            found.append(f"{source} cannot become an expert of a mixture: {reason}.")
    if config.shared == BASE and base is None:
        found.append("shared='base' takes everything but the MLPs from the base model: pass base_model=... (--base).")
    if config.experts_per_token > len(experts):
        found.append(
            f"experts_per_token={config.experts_per_token} is more than the {len(experts)} experts of this merge."
        )
    names = [source.name for source in experts]
    if isinstance(config.negative_prompts, Mapping):
        found += [
            f"negative_prompts names '{name}', and no expert is called so.{suggest(name, names)} Experts: {', '.join(names)}."
            for name in config.negative_prompts
            if name not in names
        ]
    return found


def _take_from_base(shared: MergePlan) -> None:
    """Replaces the mean of the experts by the base model's values."""
    for parameter in shared.parameters:
        if parameter.base is not None:
            parameter.action, parameter.copy_from, parameter.reason = "copy", BASE, "the base model's (shared='base')"


def _plan_parameters(plan: MixturePlan) -> None:
    dense = {parameter.name: parameter for parameter in plan.shared.parameters}
    placed = set()
    for name, info in plan.target.anatomy.parameters.items():
        parts = expert_weights(name)
        if name in dense:
            placed.add(name)
            plan.parameters.append(dense[name])
        elif parts is not None:
            placed.update(parts)
            plan.parameters.append(_stacked(plan, name, [dense[part] for part in parts]))
        elif routed_module(name) is not None:
            dtype = dense[f"{routed_module(name)}.gate_proj.weight"].info.dtype
            shape = TensorInfo(info.shape, dtype)
            plan.parameters.append(
                PlannedParameter(name, info.kind, info.depth, "route", [], None, shape, plan.config, reason="a router")
            )
    homeless = [name for name in dense if name not in placed]
    if homeless:
        plan.problems.append(
            f"{plan.experts[0]} has {len(homeless)} parameter(s) that a {plan.target.model_class.__name__} has no place for, such as "
            f"'{homeless[0]}': this model cannot become an expert of a mixture."
        )


def _stacked(plan: MixturePlan, name: str, parts: Sequence[PlannedParameter]) -> PlannedParameter:
    info = plan.target.anatomy.parameters[name]
    names = [part.experts[index] for index in range(len(plan.experts)) for part in parts]
    stored = TensorInfo(info.shape, parts[0].info.dtype)
    reason = "the experts' MLPs, as they are"
    return PlannedParameter(name, info.kind, info.depth, "stack", names, None, stored, plan.config, reason=reason)
