"""The solvers of WUDI's objective: spectral filters in closed form, and gradient descent.

All filters are one preconditioned gradient step from the sum of the task vectors. With C = V diag(l) Vᵀ, the result of
arXiv 2606.07289, S − S V diag(f) Vᵀ + D V diag(f/l) Vᵀ, equals

    M = S − (S C − D) V diag(φ) Vᵀ,   φ = f / l,

because S V diag(f) = S C V diag(f/l). φ stays finite where l → 0, and null directions of C need no care: there both S C and D vanish.
S C − D is the half gradient at S, the G of the objective about S. In the row form the same M is S − F U diag(φ) Uᵀ R with
R Rᵀ = U diag(l) Uᵀ.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..linalg import eigenpairs_in_place
from .objective import Objective, RowObjective


@dataclass
class Solution:
    """The merged matrix, and what the report says about it."""

    merged: Tensor
    loss_before: float
    loss_after: float
    rank: int | None = None


def spectrum(curvature: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues in rising order, those below the rounding error set to zero, and eigenvectors (columns). Overwrites its
    argument."""
    values, vectors = eigenpairs_in_place(curvature)
    floor = values[-1] * len(values) * torch.finfo(values.dtype).eps
    return torch.where(values > floor, values, 0.0), vectors


def effective_rank(values: Tensor) -> int:
    """K = ⌈(Σ √l)² / Σ l⌉ (arXiv 2606.07289), between 1 and the rank."""
    ratio = (values.sqrt().sum() ** 2 / values.sum()).item()
    # An orthogonal spectrum gives an integer up to rounding; without the slack it would be counted one too high.
    return max(1, math.ceil(ratio * (1 - 1e-9)))


def adaptive_filter(values: Tensor) -> Tensor:
    """φ = 1/l on the top K directions, 0 elsewhere.  values: (k,), in rising order."""
    rank = min(effective_rank(values), int((values > 0).sum()))
    inverse = torch.zeros_like(values)
    inverse[-rank:] = 1.0 / values[-rank:]
    return inverse


def exponential_filter(values: Tensor, time: float, rank: int) -> Tensor:
    """φ = (1 − e^{−lt})/l on the top `rank` directions, 0 elsewhere; t where l = 0.  values: (k,), in rising order."""
    safe = torch.where(values > 0, values, 1.0)
    inverse = torch.where(values > 0, -torch.expm1(-safe * time) / safe, time)
    inverse[: max(0, len(values) - rank)] = 0.0
    return inverse


def solve_filtered(objective: Objective, total: Tensor, choose: Callable[[Tensor], Tensor]) -> Solution:
    """M = S − ½∇L(S) V diag(φ) Vᵀ, in either form of the objective.

    The step removes φ_k (2 − l_k φ_k) ‖½∇L(S) v_k‖² from L along direction k, so that no further product is needed for L(M).

    Args:
        objective ([`Objective`]): Of one layer, about S. Its curvature is overwritten.
        total (`torch.Tensor`): S, shape (out, in). Overwritten by M.
        choose (`Callable`): φ by the rising eigenvalues of the curvature; non-zero on the top directions only.
    """
    values, vectors = spectrum(objective.curvature())
    inverse = choose(values)
    rank = int(torch.count_nonzero(inverse))
    basis, values, inverse = vectors[:, -rank:], values[-rank:], inverse[-rank:]
    gains = inverse * (2 - values * inverse)
    if isinstance(objective, RowObjective):
        # In terms of u_k = R v_k / √l_k: ‖½∇L(S) v_k‖² = l_k ‖F u_k‖².
        step, gains = objective.residual @ basis, gains * values
        merged = total.addmm_(step * inverse, basis.mT @ objective.rows, alpha=-1)
    else:
        step = objective.slope @ basis
        merged = total.addmm_(step * inverse, basis.mT, alpha=-1)
    removed = (step.square().sum(dim=0) * gains).sum().item()
    return Solution(merged, objective.constant, max(0.0, objective.constant - removed), rank)


def solve_ridge(objective: Objective, ridge: float) -> Tensor:
    """The minimiser −G (C + ρI)⁻¹ = −F (R Rᵀ + ρI)⁻¹ R of an objective about zero, by a Cholesky factor."""
    curvature = objective.curvature().clone()
    curvature.diagonal().add_(ridge)
    factor = torch.linalg.cholesky(curvature)
    if isinstance(objective, RowObjective):
        return torch.cholesky_solve(objective.residual.mT, factor).mT.neg() @ objective.rows
    return torch.cholesky_solve(objective.slope.mT, factor).mT.neg()


def descend_adam(objective: Objective, like: Tensor, learning_rate: float, steps: int) -> Tensor:
    """Adam from zero with β = (0.9, 0.999) and ε = 1e-8, without autograd: the gradient is written into one buffer."""
    point = torch.zeros_like(like)
    point.grad = torch.empty_like(like)
    optimizer = torch.optim.Adam([point], lr=learning_rate, fused=True)
    for _ in range(steps):
        objective.half_gradient(point, out=point.grad).mul_(2)
        optimizer.step()
    point.grad = None
    return point


def descend_sgd(objective: Objective, like: Tensor, learning_rate: float | None, steps: int) -> Tensor:
    """Gradient descent from zero. The default rate 1/(2‖C‖) is half of the largest that is stable for every spectrum."""
    if learning_rate is None:
        learning_rate = 0.5 / torch.linalg.matrix_norm(objective.curvature()).item()
    point = torch.zeros_like(like)
    gradient = torch.empty_like(like)
    for _ in range(steps):
        point.sub_(objective.half_gradient(point, out=gradient), alpha=2 * learning_rate)
    return point
