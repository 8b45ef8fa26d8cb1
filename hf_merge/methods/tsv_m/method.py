"""TSV-Merge: the leading singular triplets of every task, decorrelated (arXiv 2412.00081, algorithm 1)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...low_rank import Factors
from ..base import LinearMethod, LowRankGroup, TaskMatrices, TensorGroup
from ..linalg import (
    Triplets,
    factored_triplets,
    polar_factor,
    randomized_triplets,
    singular_triplets,
    solve_dtype,
)
from ..reporting import add_to_report
from .config import TruncatedSvdConfig


class TsvM(LinearMethod):
    """λ U_⊥ diag(S) V_⊥ᵀ: of each of n tasks the top ⌊min(out, in)/n⌋ triplets, concatenated, U and V replaced by their polar
    factors."""

    working_copies = (5.0, 5.5)
    square_copies = 19.0
    changes_only = True

    @classmethod
    def merged_rank(cls, ranks: Sequence[int], settings: Any) -> int:
        return sum(ranks)

    def merge_matrix(self, task_matrices: TaskMatrices, group: TensorGroup) -> Tensor:
        indices = nonzero_experts(task_matrices)
        if not indices:
            return torch.zeros_like(task_matrices.base)
        count = max(1, min(task_matrices.shape) // len(indices))
        parts = []
        for index in indices:
            matrix = task_matrices[index].to(solve_dtype(task_matrices.base))
            parts.append(leading_triplets(matrix, count, index, task_matrices, group))
            energy = (parts[-1].values.norm() / matrix.norm()).item() ** 2
            add_to_report(group, task_matrices, "tsv_energy", energy / len(indices))
        left = polar_factor(torch.cat([part.left for part in parts], dim=1))
        right = polar_factor(torch.cat([part.right for part in parts]))
        merged = Triplets(left, torch.cat([part.values for part in parts]), right).matrix()
        return merged.mul_(group.settings.scaling).to(task_matrices.base.dtype)

    def merge_factors(self, group: LowRankGroup) -> Factors:
        parts = [factored_triplets(expert) for expert in group.experts]
        parts = [part for part in parts if len(part.values)]
        if not parts:
            return Factors.zero(group.experts[0])
        count = max(1, min(group.shape) // len(parts))
        energies = [(part.top(count).values.norm() / part.values.norm()).item() ** 2 for part in parts]
        group.report["tsv_energy"] = sum(energies) / len(energies)
        parts = [part.top(count) for part in parts]
        left = polar_factor(torch.cat([part.left for part in parts], dim=1))
        right = polar_factor(torch.cat([part.right for part in parts]))
        merged = Triplets(left, torch.cat([part.values for part in parts]), right)
        return merged.factors(group.settings.scaling, group.experts[0].left.dtype)


def nonzero_experts(task_matrices: TaskMatrices) -> list[int]:
    """The experts that changed this layer: a zero task vector has no direction to keep."""
    return [index for index, matrix in enumerate(task_matrices) if matrix.any()]


def leading_triplets(
    matrix: Tensor, count: int, index: int, task_matrices: TaskMatrices, group: TensorGroup
) -> Triplets:
    """The top `count` triplets of expert `index` by the decomposition that the settings choose."""
    settings: TruncatedSvdConfig = group.settings
    if settings.svd == "exact":
        return singular_triplets(matrix).top(count)
    purpose = "svd" if task_matrices.index is None else f"svd {task_matrices.index}"
    generator = group.random(index, purpose)
    found = randomized_triplets(matrix, count, settings.oversampling, settings.power_iterations, generator)
    add_to_report(group, task_matrices, "svd_residual", found.residual / len(task_matrices))
    return found
