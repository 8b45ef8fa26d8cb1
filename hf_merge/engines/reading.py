"""Which parameters are read whole before they are merged, and which piece by piece while they are."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..checkpoints.source import ModelSource
from ..methods.base import TensorMethod
from ..registry import get_merge_method
from .placement import CPU
from .plan import MergePlan, PlannedParameter


HELD = 1 << 25
"""Bytes of a parameter, of all models together, up to which it is rather held than read several times. What is larger would not stay in
the cache either."""


def in_pieces(parameter: PlannedParameter) -> bool:
    """Whether a parameter is merged in many short operations."""
    method = get_merge_method(parameter.settings.merge_type).method_cls
    return parameter.action == "mean" or (issubclass(method, TensorMethod) and method.works_in_pieces(parameter.kind))


def sources_of(plan: MergePlan, parameter: PlannedParameter) -> list[tuple[ModelSource, str]]:
    """What is read for a parameter: models and their names for it."""
    if parameter.action == "copy" and parameter.copy_from == "base":
        return [(plan.base, parameter.base)]
    if parameter.action == "copy":
        index = next(i for i, source in enumerate(plan.experts) if source.name == parameter.copy_from)
        return [(plan.experts[index], parameter.experts[index if len(parameter.experts) > 1 else 0])]
    found = list(zip(plan.experts, parameter.experts, strict=True))
    return found + ([(plan.base, parameter.base)] if parameter.base is not None and plan.base is not None else [])


def is_piecewise(parameter: PlannedParameter, device: torch.device) -> bool:
    """Whether what is known of a parameter while it is merged are pieces: of a method that merges entry by entry, on the CPU.

    Args:
        parameter ([`PlannedParameter`]): The parameter.
        device (`torch.device`): Where it is merged.
    """
    return parameter.action in ("merge", "mean") and not parameter.then and device == CPU and in_pieces(parameter)


def stays_in_files(plan: MergePlan, parameter: PlannedParameter, device: torch.device) -> bool:
    """Whether each piece of a parameter is read when it is merged, rather than the parameter before.

    Args:
        plan ([`MergePlan`]): What is merged.
        parameter, device: As in [`is_piecewise`].
    """
    if not is_piecewise(parameter, device):
        return False
    return all(source.stored(name) is not None for source, name in sources_of(plan, parameter))


def held_bytes(plan: MergePlan, parameter: PlannedParameter) -> int:
    """How much of a parameter that [`stays_in_files`] is held in memory while it is merged all the same: all of it where it is small and
    the method looks at each piece several times, else nothing."""
    method = get_merge_method(parameter.settings.merge_type).method_cls
    if parameter.action != "merge" or not method.looks_again(parameter.settings):
        return 0
    nbytes = sum(source.parameters[name].nbytes for source, name in sources_of(plan, parameter))
    return nbytes if nbytes <= HELD else 0


def is_filled(plan: MergePlan, parameters: Sequence[PlannedParameter], is_plain: bool, device: torch.device) -> bool:
    """Whether each piece is written when it is merged: where the result is written as it is.

    Args:
        plan ([`MergePlan`]): What is merged.
        parameters (`Sequence[PlannedParameter]`): What is written together.
        is_plain (`bool`): Whether they have only another name on disk, see [`SaveGroup`].
        device (`torch.device`): Where they are merged.
    """
    return plan.adapter is None and is_plain and len(parameters) == 1 and is_piecewise(parameters[0], device)
