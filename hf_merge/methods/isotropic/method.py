"""Isotropic merging: every direction of the merged task vector gets the same singular value (arXiv 2502.04959)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...low_rank import Factors, concatenated
from ..base import LinearMethod, LowRankGroup, TaskMatrices, TensorGroup
from ..linalg import (
    Triplets,
    factored_triplets,
    polar_factor,
    rounding_floor,
    singular_triplets,
    solve_dtype,
)
from ..tsv_m.method import leading_triplets, nonzero_experts


class IsoC(LinearMethod):
    """λ σ̄ U Vᵀ with Σ T_i = U diag(σ) Vᵀ and σ̄ the mean of the non-zero σ."""

    working_copies = (11.0, 1.0)
    square_copies = 5.5
    changes_only = True

    @classmethod
    def merged_rank(cls, ranks: Sequence[int], settings: Any) -> int:
        return sum(ranks)

    def merge_matrix(self, task_matrices: TaskMatrices, group: TensorGroup) -> Tensor:
        common = singular_triplets(_sum(task_matrices))
        if not len(common.values):
            return torch.zeros_like(task_matrices.base)
        merged = common.left @ common.right
        return merged.mul_(common.values.mean() * group.settings.scaling).to(task_matrices.base.dtype)

    def merge_factors(self, group: LowRankGroup) -> Factors:
        common = factored_triplets(concatenated(group.experts))
        if len(common.values):
            common.values = common.values.mean().expand_as(common.values)
        return common.factors(group.settings.scaling, group.experts[0].left.dtype)


class IsoCts(LinearMethod):
    """The top directions of Σ T_i, and of each task those of T_i outside of them; polar factors, one singular value."""

    working_copies = (10.0, 5.0)
    square_copies = 24.0
    changes_only = True

    @classmethod
    def merged_rank(cls, ranks: Sequence[int], settings: Any) -> int:
        return sum(ranks)

    def merge_matrix(self, task_matrices: TaskMatrices, group: TensorGroup) -> Tensor:
        indices = nonzero_experts(task_matrices)
        if not indices:
            return torch.zeros_like(task_matrices.base)
        size = min(task_matrices.shape)
        per_task = directions_per_task(size, len(indices), group.settings.common_space_fraction)
        common = singular_triplets(_sum(task_matrices)).top(size - per_task * len(indices))
        parts = [common]
        for index in indices if per_task else ():
            matrix = task_matrices[index].to(common.left.dtype)
            specific = matrix - common.left @ (common.left.mT @ matrix)
            parts.append(_beyond_rounding(matrix, leading_triplets(specific, per_task, index, task_matrices, group)))
        left = polar_factor(torch.cat([part.left for part in parts], dim=1))
        right = polar_factor(torch.cat([part.right for part in parts]))
        mean = torch.cat([part.values for part in parts]).mean()
        return (left @ right).mul_(mean * group.settings.scaling).to(task_matrices.base.dtype)

    def merge_factors(self, group: LowRankGroup) -> Factors:
        experts = [expert for expert in group.experts if expert.norm() > 0]
        if not experts:
            return Factors.zero(group.experts[0])
        size = min(group.shape)
        per_task = directions_per_task(size, len(experts), group.settings.common_space_fraction)
        parts = [factored_triplets(concatenated(experts)).top(size - per_task * len(experts))]
        basis = parts[0].left
        for expert in experts if per_task else ():
            left = expert.left.double()
            specific = factored_triplets(Factors(left - basis @ (basis.mT @ left), expert.right.double()))
            floor = rounding_floor(torch.tensor(expert.norm()), group.shape)
            parts.append(specific.top(min(per_task, int((specific.values > floor).sum()))))
        left = polar_factor(torch.cat([part.left for part in parts], dim=1))
        right = polar_factor(torch.cat([part.right for part in parts]))
        mean = torch.cat([part.values for part in parts]).mean()
        return Triplets(left, mean.expand(left.shape[1]), right).factors(
            group.settings.scaling, group.experts[0].left.dtype
        )


def directions_per_task(size: int, tasks: int, common_fraction: float) -> int:
    """How many of `size` directions each task keeps for itself: the rest of the common part, in equal shares, rounded."""
    rest = size - int(size * common_fraction)
    return min(round(rest / tasks), size // tasks)


def _beyond_rounding(matrix: Tensor, specific: Triplets) -> Triplets:
    """Leaves out directions of a projection that are only the rounding of what was projected away."""
    floor = rounding_floor(torch.linalg.matrix_norm(matrix), matrix.shape)
    return specific.top(int((specific.values > floor).sum()))


def _sum(task_matrices: TaskMatrices) -> Tensor:
    total = torch.zeros_like(task_matrices.base, dtype=solve_dtype(task_matrices.base))
    for matrix in task_matrices:
        total += matrix
    return total
