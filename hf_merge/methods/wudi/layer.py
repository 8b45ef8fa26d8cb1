"""WUDI on one linear layer: its objective is built and handed to the chosen solver."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .config import WudiConfig
from .objective import Objective, Term, cheaper_to_descend, cheaper_to_diagonalize
from .solvers import (
    Solution,
    adaptive_filter,
    descend_adam,
    descend_sgd,
    exponential_filter,
    solve_filtered,
    solve_ridge,
)


REFERENCE_RMS = 2e-4
"""Root mean square of a task vector that 300 Adam steps of 1e-5 suit: the scale that `normalize` solves at."""


def solve(
    vectors: Sequence[Tensor],
    norms: Sequence[float],
    settings: WudiConfig,
    in_features: int | None = None,
    start: Tensor | None = None,
) -> Solution:
    """Solves one layer.

    Args:
        vectors (`Sequence[torch.Tensor]`): T_i, each (out, in), in the dtype of the arithmetic; none is zero.
        norms (`Sequence[float]`): ‖T_i‖.
        settings ([`WudiConfig`]): Resolved for this layer.
        in_features (`int`, *optional*): The layer's input dimension, where the T_i are given in coordinates of a subspace.
        start (`torch.Tensor`, *optional*): Where an iterative solver starts, shape (out, in), when `initial` names a method.
    """
    if not all(map(math.isfinite, norms)):
        nothing = torch.full_like(vectors[0], math.nan)  # decompositions would raise; the engine names the parameter
        return Solution(nothing, math.nan, math.nan)
    if settings.solver in ("adaptive", "spectral", "closed_form"):
        return _solve_closed(vectors, norms, settings, in_features or vectors[0].shape[1])
    return _solve_descent(vectors, norms, settings, start)


def _solve_closed(
    vectors: Sequence[Tensor], norms: Sequence[float], settings: WudiConfig, in_features: int
) -> Solution:
    total = _sum(vectors)
    form = cheaper_to_diagonalize(len(vectors) * total.shape[0], total.shape[1])
    if settings.solver == "closed_form":
        objective = form.build(_terms(vectors, norms), torch.zeros_like(total), total.dtype)
        # tr(C) = Σ ‖T_i‖²/‖T_i‖² is the number of experts.
        merged = solve_ridge(objective, settings.ridge * len(vectors) / in_features)
        return Solution(merged, objective.loss(total), objective.loss(merged))
    objective = form.build(_terms(vectors, norms), total, total.dtype)
    if settings.solver == "adaptive":
        return solve_filtered(objective, total, adaptive_filter)
    rank = max(1, int(settings.rank_ratio * in_features))
    return solve_filtered(objective, total, lambda values: exponential_filter(values, settings.time, rank))


def _solve_descent(
    vectors: Sequence[Tensor], norms: Sequence[float], settings: WudiConfig, start: Tensor | None
) -> Solution:
    total = _sum(vectors)
    if start is None:
        start = total / len(vectors) if _initial(settings) == "mean" else total
    start = start.to(total.dtype)
    # Scaling every T_i by 1/s leaves C and the eigenvalues alone and makes Adam's absolute step s times as large.
    scale = _rms(norms, total.shape) / REFERENCE_RMS if settings.normalize else 1.0
    objective = _descent_objective(vectors, norms, settings, start, scale)
    before = objective.loss((total - start).div_(scale).float()) * scale**2
    if objective.is_minimal():
        return Solution(start, before, objective.constant * scale**2)
    like = torch.empty_like(start, dtype=torch.float32)
    if settings.solver == "sgd":
        delta = descend_sgd(objective, like, settings.learning_rate, settings.num_steps)
    else:
        rate = 1e-5 if settings.learning_rate is None else settings.learning_rate
        delta = descend_adam(objective, like, rate, settings.num_steps)
    return Solution(start.add_(delta, alpha=scale), before, objective.loss(delta) * scale**2)


def _descent_objective(
    vectors: Sequence[Tensor], norms: Sequence[float], settings: WudiConfig, start: Tensor, scale: float
) -> Objective:
    """About the start, for changes in float32."""
    out, in_features = start.shape
    if settings.solver != "optmerge":
        form = cheaper_to_descend(len(vectors) * out, in_features)
        return form.build(_terms(vectors, norms), start, torch.float32, scale)
    rank = max(1, min(out, in_features) // len(vectors))
    form = cheaper_to_descend(len(vectors) * rank, in_features)
    return form.build(_denoised_terms(vectors, norms, rank), start, torch.float32, scale)


def _initial(settings: WudiConfig) -> str:
    if settings.initial is not None:
        return settings.initial
    return "mean" if settings.solver == "sgd" else "sum"


def _terms(vectors: Sequence[Tensor], norms: Sequence[float]) -> Iterator[Term]:
    # A map, unlike a loop, does not hold one expert while it makes the next.
    return map(lambda vector, norm: Term(vector, vector, norm**-2), vectors, norms)


def _denoised_terms(vectors: Sequence[Tensor], norms: Sequence[float], rank: int) -> Iterator[Term]:
    """OptMerge (arXiv 2505.19892): Y_i = SVD_K(T_i − T̄) + T̄ and P_i = S_K V_Kᵀ of T_i."""
    mean = _sum(vectors) / len(vectors)
    for vector, norm in zip(vectors, norms, strict=True):
        _, values, right = torch.linalg.svd(vector, full_matrices=False)
        left, centred, directions = torch.linalg.svd(vector - mean, full_matrices=False)
        target = torch.addmm(mean, left[:, :rank] * centred[:rank], directions[:rank])
        yield Term(target, values[:rank, None] * right[:rank], norm**-2)


def _sum(vectors: Sequence[Tensor]) -> Tensor:
    total = torch.zeros_like(vectors[0])
    for vector in vectors:
        total += vector
    return total


def _rms(norms: Sequence[float], shape: torch.Size) -> float:
    """Root mean square of the entries of all task vectors."""
    return math.sqrt(sum(norm**2 for norm in norms) / (len(norms) * shape.numel()))
