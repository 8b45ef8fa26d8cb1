"""KnOTS (arXiv 2410.19735) and Core Space (arXiv 2509.17786): task vectors are merged in coordinates of a common basis.

Entries of two task vectors can only be compared where they stand for the same directions. KnOTS takes the left singular basis of
all of them; Core Space a left and a right one, which makes the parts as small as (Σ r_i, Σ r_i) for adapters. Both lose nothing:
an inner method that is linear gives the same result as without the bases.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...low_rank import Factors, singular_factors
from ...registry import get_merge_method
from ..base import LinearMethod, LowRankGroup, ParameterKind, TaskMatrices, TensorGroup
from ..linalg import rounding_floor, solve_dtype


class Knots(LinearMethod):
    """λ U Σ V_mergedᵀ with [T_1 … T_n] = U Σ [V_1ᵀ … V_nᵀ] and V_merged what the inner method makes of V_1 … V_n."""

    working_copies = (15.0, 9.0)
    square_copies = 0.0
    changes_only = True

    @classmethod
    def merged_rank(cls, ranks: Sequence[int], settings: Any) -> int:
        return sum(ranks)

    def merge_matrix(self, task_matrices: TaskMatrices, group: TensorGroup) -> Tensor:
        dtype = solve_dtype(task_matrices.base)
        side_by_side = torch.cat([matrix.to(dtype) for matrix in task_matrices], dim=1)
        left, values, right = torch.linalg.svd(side_by_side, full_matrices=False)
        parts = _without_null_space(left, values, right, side_by_side.shape)
        if parts is None:
            return torch.zeros_like(task_matrices.base)
        left, values, right = parts
        aligned = list(right.split(task_matrices.shape[1], dim=1))
        merged = _merge_aligned(aligned, group, task_matrices.index)
        return ((left * (values * group.settings.scaling)) @ merged).to(task_matrices.base.dtype)

    def merge_factors(self, group: LowRankGroup) -> Factors | None:
        # [T_1 … T_n] = Q [R_1 A_1 … R_n A_n] with [B_1 … B_n] = Q [R_1 … R_n], and A_i = L_iᵀ Q_iᵀ by another QR.
        outer = torch.linalg.qr(torch.cat([expert.left.double() for expert in group.experts], dim=1))
        inner = [torch.linalg.qr(expert.right.double().mT) for expert in group.experts]
        blocks = outer.R.split([expert.rank for expert in group.experts], dim=1)
        small = torch.cat([block @ one.R.mT for block, one in zip(blocks, inner, strict=True)], dim=1)
        width = group.shape[1] * len(group)
        parts = _without_null_space(*torch.linalg.svd(small, full_matrices=False), torch.Size([group.shape[0], width]))
        if parts is None:
            return Factors.zero(group.experts[0])
        left, values, right = parts
        pieces = right.split([one.R.shape[0] for one in inner], dim=1)
        aligned = [piece @ one.Q.mT for piece, one in zip(pieces, inner, strict=True)]
        merged = _merge_aligned(aligned, group, None)
        return Factors(outer.Q @ (left * (values * group.settings.scaling)), merged).to(group.experts[0].left.dtype)


class CoreSpace(LinearMethod):
    """λ U M Vᵀ with M what the inner method makes of the cores M_i = Uᵀ T_i V; U spans all columns and V all rows of the T_i."""

    working_copies = (16.0, 9.0)
    square_copies = 0.0
    changes_only = True

    @classmethod
    def merged_rank(cls, ranks: Sequence[int], settings: Any) -> int:
        return sum(ranks)

    def merge_matrix(self, task_matrices: TaskMatrices, group: TensorGroup) -> Tensor:
        dtype = solve_dtype(task_matrices.base)
        matrices = [matrix.to(dtype) for matrix in task_matrices]
        left = _column_basis(torch.cat(matrices, dim=1))
        right = _column_basis(torch.cat([matrix.mT for matrix in matrices], dim=1))
        if not left.shape[1]:
            return torch.zeros_like(task_matrices.base)
        cores = [left.mT @ matrix @ right for matrix in matrices]
        merged = _merge_aligned(cores, group, task_matrices.index)
        return (left @ merged @ right.mT).mul_(group.settings.scaling).to(task_matrices.base.dtype)

    def merge_factors(self, group: LowRankGroup) -> Factors | None:
        spectra = [singular_factors(expert) for expert in group.experts]
        # U_i S_i spans the columns of T_i and weighs them as T_i does, and so for the rows.
        left = _column_basis(torch.cat([u * values for u, values, _ in spectra], dim=1))
        right = _column_basis(torch.cat([vt.mT * values for _, values, vt in spectra], dim=1))
        if not left.shape[1]:
            return Factors.zero(group.experts[0])
        cores = [(left.mT @ (u * values)) @ (vt @ right) for u, values, vt in spectra]
        merged = _merge_aligned(cores, group, None)
        factors = Factors(left @ (merged * group.settings.scaling), right.mT)
        return factors.to(group.experts[0].left.dtype)


def _column_basis(matrix: Tensor) -> Tensor:
    """An orthonormal basis of the columns, the strongest directions first."""
    left, values, _ = torch.linalg.svd(matrix, full_matrices=False)
    return left[:, : int((values > rounding_floor(values[:1], matrix.shape)).sum())]


def _without_null_space(
    left: Tensor, values: Tensor, right: Tensor, shape: torch.Size
) -> tuple[Tensor, Tensor, Tensor] | None:
    rank = int((values > rounding_floor(values[:1], shape)).sum())
    return (left[:, :rank], values[:rank], right[:rank]) if rank else None


def _merge_aligned(parts: Sequence[Tensor], group: TensorGroup | LowRankGroup, index: int | None) -> Tensor:
    """What the inner method makes of matrices in common coordinates, taken as task vectors of a base of zeros."""
    settings = group.settings.inner_config
    inner = TensorGroup(
        name=group.name if index is None else f"{group.name}[{index}]",
        kind=ParameterKind.LINEAR,
        stored_base=torch.zeros_like(parts[0]),
        stored_experts=list(parts),
        expert_names=group.expert_names,
        settings=settings,
        seed=group.seed,
    )
    return get_merge_method(group.settings.inner).method_cls()(inner)
