"""Σ w_i T_i: as it is, or truncated to the leading singular triplets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...low_rank import Factors, concatenated, truncated
from ..base import LinearMethod, LowRankGroup, TaskMatrices, TensorGroup, TensorMethod
from ..linalg import singular_triplets, solve_dtype
from .config import SvdConfig


class Cat(TensorMethod):
    """θ_0 + Σ w_i τ_i. The merged adapter's factors are the experts' side by side: [w_1 B_1 … w_n B_n] and [A_1; …; A_n]."""

    working_copies = (3.5, 0.6)
    requires_base = True
    changes_only = True

    @classmethod
    def merged_rank(cls, ranks: Sequence[int], settings: Any) -> int:
        return sum(ranks)

    def merge(self, group: TensorGroup) -> Tensor:
        total = group.base.clone()
        for weight, vector in zip(group.settings.weights, group.task_vectors(), strict=True):
            total.add_(vector, alpha=weight)
        return total

    def merge_low_rank(self, group: LowRankGroup) -> Factors:
        return concatenated(group.experts, group.settings.weights)


class Svd(LinearMethod):
    """The leading singular triplets of Σ w_i T_i."""

    working_copies = (8.0, 1.0)
    square_copies = 0.0
    changes_only = True

    @classmethod
    def needs_factors(cls, settings: SvdConfig) -> bool:
        return settings.rank is None

    def merge_matrix(self, task_matrices: TaskMatrices, group: TensorGroup) -> Tensor:
        total = torch.zeros_like(task_matrices.base, dtype=solve_dtype(task_matrices.base))
        for weight, matrix in zip(group.settings.weights, task_matrices, strict=True):
            total.add_(matrix, alpha=weight)
        if group.settings.rank is not None:
            total = singular_triplets(total).top(group.settings.rank).matrix()
        return total.to(task_matrices.base.dtype)

    def merge_factors(self, group: LowRankGroup) -> Factors:
        rank = self.merged_rank([expert.rank for expert in group.experts], group.settings)
        merged, lost = truncated(concatenated(group.experts, group.settings.weights), rank)
        group.report["discarded_energy"] = lost
        return merged

    @classmethod
    def merged_rank(cls, ranks: Sequence[int], settings: SvdConfig) -> int:
        return max(ranks) if settings.rank is None else min(settings.rank, sum(ranks))
