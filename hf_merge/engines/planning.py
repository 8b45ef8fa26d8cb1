"""Makes the plan of a merge from the headers of its models."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..checkpoints.source import ModelSource
from ..checkpoints.storage import TensorInfo
from ..config import MergeConfig
from ..errors import ConfigError
from ..methods.base import ParameterKind, TensorMethod
from ..registry import get_merge_method
from .adapters import factor_problems
from .compatibility import find_incompatibilities
from .heads import plan_heads
from .plan import Dropped, MergePlan, PlannedParameter
from .vocabulary import align_vocabularies


_UNMERGEABLE = (torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64)


def build_plan(config: MergeConfig, experts: Sequence[ModelSource], base: ModelSource | None) -> MergePlan:
    """Plans a merge from the headers of its models.

    Args:
        config ([`MergeConfig`]): The recipe.
        experts (`Sequence[ModelSource]`): At least one.
        base ([`ModelSource`], *optional*): The base model.
    """
    aligned = align_vocabularies(config, experts, base)
    base = aligned.base
    plan = MergePlan(config, aligned.experts, base, notes=aligned.notes, problems=aligned.problems)
    _check_method(plan)
    plan.notes += [note for source in plan.sources for note in source.notes]
    incompatibilities = find_incompatibilities(plan.experts, base)
    plan.problems += incompatibilities.problems
    plan.notes += incompatibilities.notes
    if incompatibilities.different_architectures:
        return plan
    _check_unexpected(plan)
    heads = plan_heads(config.heads, plan.experts, _output_dtype(plan))
    plan.heads, plan.problems, plan.notes = heads.per_task, plan.problems + heads.problems, plan.notes + heads.notes
    missing: dict[str, list[str]] = {}
    for name in plan.target.anatomy.parameters:
        _plan_parameter(plan, name, heads.copied, missing)
    _report_missing(plan, missing)
    _check_patterns(plan)
    plan.problems += factor_problems(plan)
    _list_dropped(plan, heads.dropped_reason)
    if not plan.parameters and not plan.problems:
        plan.problems.append("The models have no parameter in common: nothing can be merged.")
    return plan


def _check_method(plan: MergePlan) -> None:
    has_base = plan.base is not None
    for merge_type in dict.fromkeys([plan.config.merge_type, *(rule.get("merge_type") for rule in plan.config.rules)]):
        if merge_type is not None:
            method = get_merge_method(merge_type).method_cls
            plan.problems += method.refusals(merge_type, len(plan.experts), has_base)
            if merge_type != plan.config.merge_type and not issubclass(method, TensorMethod):
                plan.problems.append(
                    f"A rule chooses '{merge_type}', which needs data: only the recipe's own method may."
                )
    for inner in plan.config.inner_recipes():
        method = get_merge_method(inner.merge_type).method_cls
        plan.problems += method.refusals(inner.merge_type, len(plan.experts), has_base)
    for step in plan.config.next_recipes():
        method = get_merge_method(step.merge_type).method_cls
        plan.problems += [f"then: {refusal}" for refusal in method.refusals(step.merge_type, 1, has_base)]
        if not issubclass(method, TensorMethod) or method().rounds(step):
            plan.problems.append(
                f"then: '{step.merge_type}' does not work parameter by parameter and cannot follow a merge."
            )


def _check_unexpected(plan: MergePlan) -> None:
    for source in plan.sources:
        unexpected = source.names.unexpected
        if unexpected and source.quantization is None:
            plan.problems.append(
                f"{source} stores {len(unexpected)} tensor(s) that {source.description.class_name} does not have: "
                f"{_listing(unexpected)}. Correct 'architectures' in its config.json, or remove them."
            )
        plan.dropped += [
            Dropped(source.name, key, "rebuilt by transformers when the model is loaded")
            for key in source.names.ignorable
        ]
        plan.dropped += [
            Dropped(source.name, key, f"tied to '{partner}', which has the same values")
            for key, partner in source.duplicates.items()
        ]


def _plan_parameter(plan: MergePlan, name: str, copied_heads: bool, missing: dict[str, list[str]]) -> None:
    """Adds the parameter `name` of the target to the plan, or what prevents it to the problems or to `missing`."""
    anatomy = plan.target.anatomy
    info, canonical = anatomy.parameters[name], anatomy.canonical(name)
    if info.is_task_head and copied_heads:
        _plan_copied_head(plan, name)
        return
    stored = [source.by_canonical.get(canonical) for source in plan.experts]
    if all(found is None for found in stored):
        _plan_absent(plan, name, canonical)
        return
    found = [known or _stand_in(source, canonical) for known, source in zip(stored, plan.experts, strict=True)]
    lacking = [source.name for known, source in zip(found, plan.experts, strict=True) if known is None]
    if lacking:
        for expert in lacking:
            missing.setdefault(expert, []).append(name)
        return
    base = None
    if plan.base is not None:
        base = plan.base.by_canonical.get(canonical) or _stand_in(plan.base, canonical)
        if base is not None and info.is_task_head and _shape(plan.base, base) != _shape(plan.target, found[0]):
            base = None  # another task's head
        if base is None and info.kind not in (ParameterKind.BUFFER, ParameterKind.HEAD):
            missing.setdefault(plan.base.name, []).append(name)
    if _shapes_agree(plan, name, found, base):
        plan.parameters.append(_decide(plan, name, found, base))


def _shape(source: ModelSource, name: str) -> tuple[int, ...]:
    return source.parameters[name].shape


def _report_missing(plan: MergePlan, missing: dict[str, list[str]]) -> None:
    for source in plan.sources:
        names = missing.get(source.name)
        if names and source.quantization is None:
            plan.problems.append(
                f"{source} lacks {len(names)} parameter(s) that other models have: {_listing(names)}."
            )


def _plan_copied_head(plan: MergePlan, name: str) -> None:
    if name not in plan.target.parameters:
        return
    info = plan.target.anatomy.parameters[name]
    reason = f"head of '{plan.target.name}', which the folder itself loads with"
    plan.parameters.append(
        PlannedParameter(
            name,
            info.kind,
            info.depth,
            "copy",
            [name],
            None,
            _result_info(plan, name, plan.target.parameters[name]),
            plan.config,
            copy_from=plan.target.name,
            reason=reason,
        )
    )


def _plan_absent(plan: MergePlan, name: str, canonical: str) -> None:
    """A parameter that no expert stores: tied to another one, or missing everywhere."""
    target = plan.target
    if target.tied_stand_in(name) is not None:
        return
    if plan.base is not None and canonical in plan.base.by_canonical:
        plan.problems.append(f"The parameter '{name}' is stored by the base model but by no expert.")
    elif target.anatomy.may_be_absent(name):
        plan.notes.append(f"no model stores '{name}': the result lacks it too")
    else:
        plan.problems.append(f"No model stores the parameter '{name}' of {target.description.class_name}.")


def _stand_in(source: ModelSource, canonical: str) -> str | None:
    """The parameter that a tied one shares its values with, in a model that stores only one of the two."""
    name = source.anatomy.by_canonical.get(canonical)
    return source.tied_stand_in(name) if name is not None else None


def _shapes_agree(plan: MergePlan, name: str, found: list[str], base: str | None) -> bool:
    shapes = {source.name: source.parameters[known].shape for source, known in zip(plan.experts, found, strict=True)}
    if plan.base is not None and base is not None:
        shapes["base"] = plan.base.parameters[base].shape
    if len(set(shapes.values())) == 1:
        return True
    listing = ", ".join(f"{shape} in '{model}'" for model, shape in shapes.items())
    hint = ""
    info = plan.target.anatomy.parameters[name]
    if info.kind in (ParameterKind.EMBEDDING, ParameterKind.HEAD) and not info.is_task_head:
        hint = " The vocabularies differ: tokenizer='union', 'base' or an expert's name merges them token by token."
    plan.problems.append(f"The shapes of '{name}' differ: {listing}.{hint}")
    return False


def _decide(plan: MergePlan, name: str, found: list[str], base: str | None) -> PlannedParameter:
    """What is done with a parameter that every expert has in the same shape."""
    info, config = plan.target.anatomy.parameters[name], plan.config
    stored = plan.target.parameters[found[0]]
    planned = PlannedParameter(
        name, info.kind, info.depth, "merge", found, base, _result_info(plan, name, stored), config
    )
    origin = "base" if base is not None else plan.target.name
    plan.problems += _quantised_weights(plan, planned)
    if not stored.dtype.is_floating_point:
        planned.action, planned.copy_from, planned.reason = (
            "copy",
            origin,
            f"not floating point, copied from '{origin}'",
        )
    elif not config.selects(name):
        planned.action, planned.copy_from, planned.reason = (
            "copy",
            origin,
            f"not selected by include/exclude, copied from '{origin}'",
        )
    else:
        _resolve(plan, planned)
    return planned


def _quantised_weights(plan: MergePlan, planned: PlannedParameter) -> list[str]:
    """The models that store a weight in a format that is no floating-point number to compute with."""
    is_buffer = planned.kind is ParameterKind.BUFFER
    found = []
    pairs = list(zip(plan.experts, planned.experts, strict=True))
    if planned.base is not None:
        pairs.append((plan.base, planned.base))
    for source, name in pairs:
        dtype = source.parameters[name].dtype
        if dtype in _UNMERGEABLE or not (dtype.is_floating_point or is_buffer):
            dtype_name = str(dtype).removeprefix("torch.")
            found.append(f"{source} stores '{name}' as {dtype_name}, a quantised format: merge the original weights.")
    return found


def _resolve(plan: MergePlan, planned: PlannedParameter) -> None:
    try:
        planned.settings = plan.config.resolve(planned.name, planned.depth, [source.name for source in plan.experts])
        planned.then = [
            step.resolve(planned.name, planned.depth, ["merged"])
            for step in plan.config.next_recipes()
            if step.selects(planned.name)
        ]
    except ConfigError as error:
        if str(error) not in plan.problems:
            plan.problems.append(str(error))
        return
    method = get_merge_method(planned.settings.merge_type).method_cls
    if planned.kind is ParameterKind.BUFFER and not method.merges_buffers:
        planned.action, planned.reason = "mean", "a buffer (statistics, not a weight), the experts are averaged"
    elif issubclass(method, TensorMethod) and method.requires_base and planned.base is None and plan.base is not None:
        planned.action, planned.reason = "mean", "the base model has no such parameter, the experts are averaged"


def _output_dtype(plan: MergePlan) -> torch.dtype | None:
    return getattr(torch, plan.config.dtype) if plan.config.dtype else None


def _result_info(plan: MergePlan, name: str, stored: TensorInfo) -> TensorInfo:
    wanted = _output_dtype(plan)
    if wanted is None or not stored.dtype.is_floating_point:
        return stored
    keep = plan.target.anatomy.stays_in_float32(name, wanted)
    return TensorInfo(stored.shape, torch.float32 if keep else wanted)


def _check_patterns(plan: MergePlan) -> None:
    """A regex that matches no parameter is a mistake, a rule that never wins may be one."""
    names = [parameter.name for parameter in plan.parameters]
    unmatched = plan.config.unmatched(names)
    for index, step in enumerate(plan.config.next_recipes()):
        unmatched += [(f"then[{index}].{key}", pattern) for key, pattern in step.unmatched(names)]
    for key, pattern in unmatched:
        plan.problems.append(
            f"{key}: the pattern {pattern!r} matches no parameter. Names look like {_listing(names, 3)}."
        )
    plan.notes += [
        f"the rule for {pattern!r} has no effect: earlier rules decide all that it sets, wherever it matches"
        for pattern in plan.config.overruled(names)
    ]


def _list_dropped(plan: MergePlan, head_reason: str) -> None:
    """Law 1: every stored tensor is used or listed."""
    used: dict[str, set[str]] = {source.name: set() for source in plan.sources}
    for parameter in plan.parameters:
        if parameter.base is not None:
            used["base"].add(parameter.base)
        if parameter.action == "copy" and parameter.copy_from != "base" and len(parameter.experts) == 1:
            used[parameter.copy_from].add(parameter.experts[0])
            continue
        for source, name in zip(plan.experts, parameter.experts, strict=True):
            used[source.name].add(name)
    for head in plan.heads.values():
        used[head.task].update(head.names)
    for source in plan.sources:
        for name in source.parameters:
            if name in used[source.name]:
                continue
            if source.anatomy.parameters[name].is_task_head:
                reason = head_reason if source is not plan.base else "the base model's own head is not needed"
            elif source.anatomy.canonical(name) in plan.target.anatomy.by_canonical:
                continue  # one of the problems
            else:
                reason = f"{plan.target.description.class_name} has no such parameter"
            plan.dropped.append(Dropped(source.name, name, reason))


def _listing(names: Sequence[str], most: int = 4) -> str:
    shown = ", ".join(f"'{name}'" for name in list(names)[:most])
    return shown + (", ..." if len(names) > most else "")
