"""ACE-Merging: adaptive covariance estimation without data (arXiv 2603.02945)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..base import LinearMethod, TaskMatrices, TensorGroup
from ..linalg import singular_triplets, solve_dtype
from ..reporting import add_to_report
from ..tsv_m.method import nonzero_experts


class Ace(LinearMethod):
    """M = (Σ_i T_i Σ_i)(Σ_i Σ_i + C)⁻¹, where the rows of T_i stand for samples of task i's inputs.

    - Σ_i = T̃_iᵀT̃_i + εI with the centred rows T̃_i; divided by tr(T̃_iᵀT̃_i) where the layer is heterogeneous.
    - C = J Σ_i T̃_iᵀT̃_i with J = 11ᵀ/in: the structure that the tasks share, the mean row of the summed covariance in every row.
    - Heterogeneous layers are refined: σ̄ U_k V_kᵀ is added, from the SVD of M + Σ_i T_i (Σ_i − Σ̄).

    ε and the heterogeneity are relative here, absolute in the paper: its result depends on the units of the weights.
    """

    working_copies = (6.0, 2.0)
    square_copies = 35.0
    changes_only = True

    def merge_matrix(self, task_matrices: TaskMatrices, group: TensorGroup) -> Tensor:
        indices = nonzero_experts(task_matrices)
        if not indices:
            return torch.zeros_like(task_matrices.base)
        squares = torch.stack([task_matrices[index].double().square().sum() for index in indices])
        spread = squares.log().var(correction=1).item() if len(indices) > 1 else 0.0
        heterogeneous = spread > group.settings.heterogeneity
        add_to_report(group, task_matrices, "ace_heterogeneity", spread)
        estimate = _Estimate(task_matrices, indices, group.settings.ridge, heterogeneous)
        merged = estimate.solve()
        if heterogeneous:
            merged = refine(merged, estimate.residual(), group.settings.refined_fraction)
        return merged.to(task_matrices.base.dtype)


class _Estimate:
    """The covariances of one layer and RegMean's solution for them. Computes Σ_i again where it is needed: one is resident."""

    def __init__(self, task_matrices: TaskMatrices, indices: list[int], ridge: float, normalized: bool):
        self._matrices = task_matrices
        self._indices = indices
        self._normalized = normalized
        self._dtype = solve_dtype(task_matrices.base)
        self._total = self._covariance(indices[0])
        for index in indices[1:]:
            self._total += self._covariance(index)
        self._ridge = ridge * self._total.trace() / self._total.shape[0] / len(indices)

    def _covariance(self, index: int) -> Tensor:
        """T̃_iᵀT̃_i without its ridge, shape (in, in)."""
        matrix = self._matrix(index)
        centred = matrix - matrix.mean(dim=0, keepdim=True)
        trace = centred.square().sum()
        covariance = centred.mT @ centred
        return covariance / trace if self._normalized and trace > 0 else covariance

    def _matrix(self, index: int) -> Tensor:
        return self._matrices[index].to(self._dtype)

    def solve(self) -> Tensor:
        """M, shape (out, in)."""
        weighted = torch.zeros_like(self._matrices.base, dtype=self._dtype)
        for index in self._indices:
            matrix = self._matrix(index)
            weighted += matrix @ self._covariance(index) + self._ridge * matrix
        # J Σ has the mean of Σ's rows in every row: the system is not symmetric.
        system = self._total + self._total.mean(dim=0, keepdim=True)
        system.diagonal().add_(self._ridge * len(self._indices))
        if not self._ridge > 0:  # out = 1: one row is its own mean, and nothing is known of the inputs
            return sum(self._matrix(index) for index in self._indices) / len(self._indices)
        return torch.linalg.solve(system, weighted, left=False)

    def residual(self) -> Tensor:
        """Σ_i T_i (Σ_i − Σ̄), shape (out, in)."""
        mean = self._total / len(self._indices)
        result = torch.zeros_like(self._matrices.base, dtype=self._dtype)
        for index in self._indices:
            result += self._matrix(index) @ (self._covariance(index) - mean)
        return result


def refine(merged: Tensor, residual: Tensor, fraction: float) -> Tensor:
    """M + σ̄ U_k V_kᵀ: the leading k = fraction · min(out, in) directions of M + residual get their mean singular value."""
    found = singular_triplets(merged + residual)
    top = found.top(int(min(merged.shape) * fraction))
    if not len(top.values):
        return merged
    return merged + top.values.mean() * (top.left @ top.right)
