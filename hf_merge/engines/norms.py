"""Norms of merged values, which the report tells, and what is said of values that are not finite."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..methods.groups import TensorGroup
from .pieces import squared_norm
from .plan import MergePlan, PlannedParameter


class StepNorms(NamedTuple):
    """The squared norm of the values of a step, and what the step adds to the squared norms of the parameter and of its distance to the
    base model's."""

    own: float
    added: float
    distance: float


def squared_norms(merged: Tensor, base: Tensor | None, places: Tensor | None) -> tuple[float, float]:
    """The squared norms of merged values and of their distance to the base model's.

    Args:
        merged (`torch.Tensor`): The values, of the shape of `base`, or flat where there are `places`.
        base (`torch.Tensor`, *optional*): The base model's; the distance is 0 without it.
        places (`torch.Tensor`, *optional*): Which entries of `base` the values are for: int64, flat. All of them when not given.
    """
    if base is None:
        return squared_norm(merged), 0.0
    return squared_norm(merged), squared_norm(merged - (base if places is None else base.reshape(-1)[places]))


def in_range(square: float, dtype: torch.dtype) -> bool:
    """Whether a squared norm is so small that no entry is out of the range of a dtype."""
    largest = torch.finfo(dtype).max if dtype.is_floating_point else 0.0
    return square < largest * largest


def describe_non_finite(plan: MergePlan, parameter: PlannedParameter, group: TensorGroup, merged: Tensor) -> str:
    """Where NaN or infinity in a result comes from.

    Args:
        plan ([`MergePlan`]): What is merged.
        parameter ([`PlannedParameter`]): The parameter.
        group ([`TensorGroup`]): Its values in the models.
        merged (`torch.Tensor`): Its merged values before they were rounded.
    """
    sources = [source for source, tensor in zip(plan.experts, group.experts()) if not torch.isfinite(tensor).all()]
    if sources:
        return f"The parameter '{parameter.name}' of {', '.join(map(str, sources))} holds NaN or infinity."
    if group.base is not None and not torch.isfinite(group.base).all():
        return f"The parameter '{parameter.name}' of the base model holds NaN or infinity."
    if torch.isfinite(merged).all():
        dtype = str(parameter.info.dtype).removeprefix("torch.")
        return f"The merged parameter '{parameter.name}' is too large for {dtype}: pass dtype='bfloat16' or 'float32'."
    return (
        f"Merging '{parameter.name}' with '{parameter.settings.merge_type}' gave NaN or infinity: check its settings."
    )
