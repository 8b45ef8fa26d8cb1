"""What the engines of methods with calibration samples share: the merge without data that they start from, and what they report."""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoints.source import ModelSource
from ..data.samples import TaskModel
from ..methods.base import TensorGroup
from .plan import MergePlan, PlannedParameter
from .planning import build_plan


def initial_plan(plan: MergePlan) -> MergePlan:
    """The plan of the merge without data that a merge with samples starts from. Parameters that the recipe does not leave to the
    method with samples are planned as in `plan`.

    Args:
        plan ([`MergePlan`]): Of the merge with samples.
    """
    initial = build_plan(plan.config.initial_config(), plan.experts, plan.base)
    by_name = {parameter.name: parameter for parameter in initial.parameters}
    initial.parameters = [
        replace(by_name[p.name] if is_left_to_method(plan, p) and p.name in by_name else p, then=[])
        for p in plan.parameters
    ]
    initial.problems = [problem for problem in initial.problems if problem not in plan.problems]
    return initial


def is_left_to_method(plan: MergePlan, parameter: PlannedParameter) -> bool:
    """Whether the recipe's own method merges a parameter, not a rule's and not a copy."""
    return parameter.action == "merge" and parameter.settings.merge_type == plan.config.merge_type


def parameter_row(planned: PlannedParameter, group: TensorGroup, merged: Tensor) -> dict[str, Any]:
    """What the report says about a merged parameter."""
    row: dict[str, Any] = {"kind": planned.kind.value, "action": planned.action, "method": planned.settings.merge_type}
    row["norm"] = float(torch.linalg.vector_norm(merged))
    if group.base is not None:
        row["task_vector_norm"] = float(torch.linalg.vector_norm(merged - group.base))
    return row | group.report


def task_model(source: ModelSource) -> TaskModel:
    """What the samples of an expert have to fit."""
    arguments = frozenset(inspect.signature(source.model_class.forward).parameters) - {"self", "labels", "use_cache"}
    return TaskModel(
        task=source.name,
        config=source.config,
        arguments=arguments,
        main_input=source.shell.main_input_name,
        positions=_positions(source),
        folder=source.processor_folder or source.folder,
    )


def _positions(source: ModelSource) -> int | None:
    """How many tokens the model can take; tables of positions of RoBERTa and its relatives begin behind the padding index."""
    limit = getattr(source.config.get_text_config(), "max_position_embeddings", None)
    for path, module in source.shell.named_modules():
        if (
            isinstance(module, nn.Embedding)
            and path.endswith("position_embeddings")
            and module.padding_idx is not None
        ):
            return module.num_embeddings - module.padding_idx - 1
    return limit if isinstance(limit, int) and limit > 0 else None
