"""Task heads: whether the experts have the same one, and what becomes of heads that differ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from ..checkpoints.source import ModelSource
from ..checkpoints.storage import TensorInfo
from ..modeling.surgery import HeadSurgery


@dataclass
class HeadPlan:
    """A head that is kept beside the merged backbone.

    Args:
        task (`str`): The expert's name.
        names (`list[str]`): Its parameters, by module name.
        outputs (`dict[str, TensorInfo]`): Shape and dtype to save them in.
        model ([`ModelSource`], *optional*): The result under this head, where its config is not the expert's own.
        values (`dict[str, torch.Tensor]`, *optional*): What an engine made of the head; the expert's own when `None`.
        surgery ([`HeadSurgery`], *optional*): A correction of the features that the head reads.
    """

    task: str
    names: list[str]
    outputs: dict[str, TensorInfo]
    model: ModelSource | None = None
    values: dict[str, torch.Tensor] | None = None
    surgery: HeadSurgery | None = None


@dataclass
class HeadsDecision:
    """What the policy makes of the experts' heads.

    Args:
        per_task (`dict[str, HeadPlan]`): Heads saved under `heads/<task>/`.
        copied (`bool`): The merged model's own head is the first expert's instead of a merge.
        dropped_reason (`str`): Why head tensors of the other experts are not used.
        problems, notes (`list[str]`): For the plan.
    """

    per_task: dict[str, HeadPlan] = field(default_factory=dict)
    copied: bool = False
    dropped_reason: str = ""
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def plan_heads(policy: str, experts: Sequence[ModelSource], dtype: torch.dtype | None) -> HeadsDecision:
    """Applies the policy of [`MergeConfig`]'s field `heads`.

    Args:
        policy (`str`): `"auto"`, `"per_task"`, `"merge"`, `"first"` or `"error"`.
        experts (`Sequence[ModelSource]`): The experts.
        dtype (`torch.dtype`, *optional*): The output dtype; the stored one when `None`.
    """
    heads = {source.name: _head_of(source) for source in experts}
    decision = HeadsDecision()
    if not any(heads.values()):
        return decision
    difference = _difference(experts, heads)
    if policy == "error" and difference:
        decision.problems.append(
            f"The heads differ: {difference}. heads='error' was asked for; 'per_task' keeps each one."
        )
    elif policy == "merge" and difference:
        shapes = {tuple(sorted((name, info.shape) for name, info in head.items())) for head in heads.values()}
        if len(shapes) > 1:
            decision.problems.append(f"heads='merge' is not possible: {difference}. Use heads='per_task'.")
    elif policy == "first":
        decision.copied = True
        decision.dropped_reason = f"heads='first' keeps the head of '{experts[0].name}' only"
    elif policy == "per_task" or (policy == "auto" and difference):
        decision.copied = True
        decision.per_task = {
            task: HeadPlan(task, list(head), {name: _as(info, dtype) for name, info in head.items()})
            for task, head in heads.items()
            if head
        }
        if difference:
            decision.notes.append(f"heads are kept per task: {difference}")
    elif policy == "auto" and len(experts) > 1 and has_generic_labels(experts[0]):
        decision.notes.append(
            "the heads have the same shapes and no label names to tell tasks apart: they are merged into one "
            "(heads='per_task' keeps each)"
        )
    return decision


def has_generic_labels(source: ModelSource) -> bool:
    """Whether a classifier's labels are the default names, which say nothing about its task."""
    labels = source.description.labels
    return bool(labels) and all(name == f"LABEL_{index}" for index, name in labels.items())


def _head_of(source: ModelSource) -> dict[str, TensorInfo]:
    known = source.anatomy.parameters
    return {name: info for name, info in source.parameters.items() if known[name].is_task_head}


def _difference(experts: Sequence[ModelSource], heads: dict[str, dict[str, TensorInfo]]) -> str:
    """Why the heads are not one and the same, or the empty string."""
    first = experts[0]
    for other in experts[1:]:
        pair = f"'{first.name}' and '{other.name}'"
        if first.description.class_path != other.description.class_path:
            return f"{pair} are {first.description.class_name} and {other.description.class_name}"
        ours, theirs = heads[first.name], heads[other.name]
        for name in dict.fromkeys([*ours, *theirs]):
            if name not in ours or name not in theirs:
                return f"only one of {pair} has '{name}'"
            if ours[name].shape != theirs[name].shape:
                return f"'{name}' is {ours[name].shape} in '{first.name}' and {theirs[name].shape} in '{other.name}'"
        if first.description.labels != other.description.labels:
            return f"the label names of {pair} differ"
    return ""


def _as(info: TensorInfo, dtype: torch.dtype | None) -> TensorInfo:
    return TensorInfo(info.shape, dtype if dtype is not None and info.dtype.is_floating_point else info.dtype)
