"""Singular value calibration: shared directions that a merge has added up several times are scaled back (arXiv 2602.05536)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ...errors import ConfigError
from ...low_rank import Factors
from ...registry import get_merge_method
from ..base import LinearMethod, LowRankGroup, TaskMatrices, TensorGroup, TensorMethod
from ..linalg import singular_triplets, solve_dtype
from .config import SvcConfig


class Svc(LinearMethod):
    """Σ_r σ_r γ_r u_r v_rᵀ with ΔW_merged = Σ_r σ_r u_r v_rᵀ of the inner method and γ_r = n / Σ_i max(α, s_r^i).

    s_r^i = ⟨u_rᵀ ΔW_merged, u_rᵀ T_i⟩ / ‖u_rᵀ T_i‖² is how strongly the merge answers along u_r compared with expert i.
    Parameters of other kinds are the inner method's.
    """

    working_copies = (15.0, 0.5)
    square_copies = 13.0

    def __init__(self):
        self._inner: dict[str, TensorMethod] = {}

    @classmethod
    def works_on_changes(cls, settings: SvcConfig) -> bool:
        inner = get_merge_method(settings.inner).method_cls
        return issubclass(inner, TensorMethod) and inner.works_on_changes(settings.inner_config)

    def rounds(self, settings: SvcConfig) -> int:
        return self._method(settings).rounds(settings.inner_config)

    def observe(self, group: TensorGroup, round: int) -> Any:
        return self._method(group.settings).observe(_inner_group(group), round)

    def conclude(self, observations: Iterator[tuple[str, Any]], round: int, settings: SvcConfig) -> None:
        self._method(settings).conclude(observations, round, settings.inner_config)

    def merge(self, group: TensorGroup) -> Tensor:
        inner = _inner_group(group)
        merged = self._method(group.settings)(inner)
        group.report.update(inner.report)
        # The inner result takes the place of an expert, so that one view brings every stored form to matrices.
        view = dataclasses.replace(group, stored_experts=[merged], expert_names=("merged",))
        return _Calibration(group).merge(view)

    def merge_low_rank(self, group: LowRankGroup) -> Factors | None:
        return None

    def merge_other(self, group: TensorGroup) -> Tensor:
        inner = _inner_group(group)
        return self._method(group.settings)(inner)

    def _method(self, settings: SvcConfig) -> TensorMethod:
        if settings.inner not in self._inner:
            self._inner.setdefault(settings.inner, get_merge_method(settings.inner).method_cls())
        return self._inner[settings.inner]


class _Calibration(LinearMethod):
    """Calibrates one parameter of a merged model against the experts of `group`."""

    def __init__(self, group: TensorGroup):
        self._group = group

    def merge_matrix(self, task_matrices: TaskMatrices, group: TensorGroup) -> Tensor:
        experts = TaskMatrices(self._group, task_matrices.index, task_matrices.transposed)
        return calibrate(task_matrices[0], experts, group.settings.strength)


def calibrate(merged: Tensor, task_matrices: TaskMatrices, alpha: float) -> Tensor:
    """The calibrated ΔW_merged.

    Args:
        merged (`torch.Tensor`): ΔW_merged, shape (out, in).
        task_matrices ([`TaskMatrices`]): The experts' T_i.
        alpha (`float`): α.
    """
    found = singular_triplets(merged.to(solve_dtype(merged)))
    if not len(found.values):
        return torch.zeros_like(merged)
    total = torch.zeros_like(found.values)
    counted = torch.zeros_like(found.values)
    for matrix in task_matrices:
        answers = found.left.mT @ matrix.to(found.left.dtype)  # u_rᵀ T_i, (k, in)
        squares = answers.square().sum(dim=1)
        # u_rᵀ ΔW_merged = σ_r v_rᵀ. An expert that does not answer along u_r has no ratio and is left out of the mean.
        products = found.values * (answers * found.right).sum(dim=1)
        answering = squares > squares.max() * torch.finfo(squares.dtype).eps
        total += torch.where(answering, (products / squares).clamp(min=alpha), 0.0)
        counted += answering
    factors = torch.where(counted > 0, counted / total, 1.0)
    return ((found.left * (found.values * factors)) @ found.right).to(merged.dtype)


def _inner_group(group: TensorGroup) -> TensorGroup:
    method = get_merge_method(group.settings.inner).method_cls
    count = len(group)
    if count < method.min_experts or (method.max_experts is not None and count > method.max_experts):
        raise ConfigError(
            f"SvcConfig.inner='{group.settings.inner}' merges {method.min_experts} to {method.max_experts or 'any number of'} "
            f"experts, got {count}: choose another inner method."
        )
    return dataclasses.replace(group, settings=group.settings.inner_config, report={})
