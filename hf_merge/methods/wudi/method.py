"""WUDI-Merging on the linear layers of a model: builds each layer's objective and hands it to the chosen solver."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ...registry import get_merge_method
from ..base import LINEAR_KINDS, LinearMethod, ParameterKind, TaskMatrices, TensorGroup
from ..linalg import solve_dtype
from ..reporting import add_to_report
from .config import WudiConfig
from .objective import Term, cheaper_to_descend, cheaper_to_diagonalize
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

NORM_RATIO = 5.0
"""Task vectors whose norms differ by more than this break every method of the family (DisTaC, arXiv 2508.01148)."""


class Wudi(LinearMethod):
    """W_0 + argmin_M Σ_i ‖(M − T_i) T_iᵀ‖² / ‖T_i‖², regularised by the solver (arXiv 2503.08099, eq. 9).

    With `equalize_norms` every parameter is observed once before the merge, for the norms of the whole task vectors.
    """

    def __init__(self):
        self._scales: dict[str, float] = {}
        self._squares: dict[str, list[float]] = {}

    def rounds(self, settings: WudiConfig) -> int:
        return int(settings.equalize_norms)

    def observe(self, group: TensorGroup, round: int) -> dict[str, float]:
        """‖τ_i‖² by expert, of one linear weight; empty for other parameters."""
        if group.kind not in LINEAR_KINDS or group.base is None:
            return {}
        return {
            name: torch.linalg.vector_norm(vector).item() ** 2
            for name, vector in zip(group.expert_names, group.task_vectors(), strict=True)
        }

    def conclude(self, observations: Iterator[tuple[str, Any]], round: int, settings: WudiConfig) -> None:
        squares: dict[str, list[float]] = {}
        for _, by_expert in observations:
            for name, square in by_expert.items():
                squares.setdefault(name, []).append(square)
        norms = _total_norms(squares)
        mean = math.exp(sum(map(math.log, norms.values())) / len(norms)) if norms else 1.0
        self._scales = {name: mean / norm for name, norm in norms.items()}

    def remarks(self) -> list[str]:
        mismatch = _mismatch(_total_norms(self._squares))
        return [mismatch] if mismatch else []

    def merge_matrix(self, task_matrices: TaskMatrices, group: TensorGroup) -> Tensor:
        scales = [self._scales.get(name, 1.0) for name in group.expert_names]
        vectors = _ScaledMatrices(task_matrices, scales, solve_dtype(task_matrices.base))
        norms = [torch.linalg.vector_norm(vector).item() for vector in vectors]
        if group.settings.check_norms and not self._scales:
            for name, norm in zip(group.expert_names, norms, strict=True):
                self._squares.setdefault(name, []).append(norm**2)
        vectors.drop([index for index, norm in enumerate(norms) if norm == 0])
        if not vectors:
            return torch.zeros_like(task_matrices.base)
        start = _other_start(task_matrices, group.settings)
        solution = solve(vectors, [norm for norm in norms if norm > 0], group.settings, start=start)
        _report(solution, group, task_matrices)
        return solution.merged.to(task_matrices.base.dtype)


class _ScaledMatrices(Sequence):
    """s_i T_i in the dtype of the solver, made on access, one at a time."""

    def __init__(self, matrices: TaskMatrices, scales: list[float], dtype: torch.dtype):
        self._matrices = matrices
        self._scales = scales
        self._dtype = dtype
        self._kept = list(range(len(matrices)))

    def drop(self, indices: list[int]) -> None:
        """Leaves experts out."""
        self._kept = [index for index in self._kept if index not in indices]

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, position: int) -> Tensor:
        index = self._kept[position]
        matrix = self._matrices[index].to(self._dtype)
        return matrix if self._scales[index] == 1.0 else matrix.mul_(self._scales[index])


def _other_start(matrices: TaskMatrices, settings: WudiConfig) -> Tensor | None:
    """The merged task vector of the method that `initial` names, shape (out, in)."""
    if settings.initial in (None, "sum", "mean") or settings.solver not in ("adam", "sgd", "optmerge"):
        return None
    entry, names = get_merge_method(settings.initial), matrices.group.expert_names
    layer = replace(
        matrices.group,
        kind=ParameterKind.LINEAR,
        stored_base=matrices.base,
        stored_experts=[matrices[index] + matrices.base for index in range(len(matrices))],
        settings=entry.config_cls(seed=matrices.group.seed).resolve(matrices.group.name, 0.0, names),
        report={},
    )
    return entry.method_cls()(layer) - matrices.base


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
    if settings.solver in ("adaptive", "spectral", "closed_form"):
        return _solve_closed(vectors, norms, settings, in_features or vectors[0].shape[1])
    return _solve_descent(vectors, norms, settings, start)


def _solve_closed(
    vectors: Sequence[Tensor], norms: Sequence[float], settings: WudiConfig, in_features: int
) -> Solution:
    shape = vectors[0].shape
    form = cheaper_to_diagonalize(len(vectors) * shape[0], shape[1])
    objective = form.build(_terms(vectors, norms), shape)
    total = _sum(vectors)
    if settings.solver == "closed_form":
        # tr(C) = Σ ‖T_i‖²/‖T_i‖² is the number of experts.
        merged = solve_ridge(objective, settings.ridge * len(vectors) / in_features)
        return Solution(merged, objective.loss(total), objective.loss(merged))
    if settings.solver == "adaptive":
        return solve_filtered(objective, total, adaptive_filter)
    rank = max(1, int(settings.rank_ratio * in_features))
    return solve_filtered(objective, total, lambda values: exponential_filter(values, settings.time, rank))


def _solve_descent(
    vectors: Sequence[Tensor], norms: Sequence[float], settings: WudiConfig, start: Tensor | None
) -> Solution:
    shape = vectors[0].shape
    if settings.solver == "optmerge":
        rank = max(1, min(shape) // len(vectors))
        terms, rows = _denoised_terms(vectors, norms, rank), rank * len(vectors)
    else:
        terms, rows = _terms(vectors, norms), shape[0] * len(vectors)
    objective = cheaper_to_descend(rows, shape[1]).build(terms, shape)
    total = _sum(vectors)
    before = objective.loss(total)
    if start is not None:
        start = start.to(total.dtype)
    else:
        start = total.div_(len(vectors)) if _initial(settings) == "mean" else total
    # Scaling every T_i by 1/s leaves C and the eigenvalues alone and makes Adam's absolute step s times as large.
    scale = _rms(norms, shape) / REFERENCE_RMS if settings.normalize else 1.0
    like = torch.empty_like(start, dtype=torch.float32 if start.dtype == torch.float64 else start.dtype)
    if objective.is_minimal(start):
        return Solution(start, before, objective.loss(start))
    objective = objective.recentred(start, scale, like.dtype)
    if settings.solver == "sgd":
        delta = descend_sgd(objective, like, settings.learning_rate, settings.num_steps)
    else:
        rate = 1e-5 if settings.learning_rate is None else settings.learning_rate
        delta = descend_adam(objective, like, rate, settings.num_steps)
    return Solution(start.add_(delta, alpha=scale), before, objective.loss(delta) * scale**2)


def _initial(settings: WudiConfig) -> str:
    if settings.initial is not None:
        return settings.initial
    return "mean" if settings.solver == "sgd" else "sum"


def _terms(vectors: Sequence[Tensor], norms: Sequence[float]) -> Iterator[Term]:
    for vector, norm in zip(vectors, norms, strict=True):
        yield Term(vector, vector, norm**-2)


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


def _report(solution: Solution, group: TensorGroup, matrices: TaskMatrices) -> None:
    add_to_report(group, matrices, "wudi_loss_before", solution.loss_before)
    add_to_report(group, matrices, "wudi_loss_after", solution.loss_after)
    if solution.rank is not None:
        add_to_report(group, matrices, "effective_rank", solution.rank)


def _total_norms(squares: dict[str, list[float]]) -> dict[str, float]:
    """‖τ_i‖ over the linear layers, of the experts that differ from the base model."""
    # fsum is exact, so that the order of the parameters does not matter.
    totals = {name: math.sqrt(math.fsum(parts)) for name, parts in squares.items()}
    return {name: norm for name, norm in totals.items() if norm > 0}


def _mismatch(norms: dict[str, float]) -> str:
    """What to say of task vectors of very different sizes, or the empty string."""
    if len(norms) < 2:
        return ""
    largest, smallest = max(norms, key=norms.get), min(norms, key=norms.get)
    ratio = norms[largest] / norms[smallest]
    if ratio <= NORM_RATIO:
        return ""
    return (
        f"The task vector of '{largest}' has {ratio:.1f} times the norm of that of '{smallest}' ({norms[largest]:.3g} against "
        f"{norms[smallest]:.3g}): the merged model follows '{largest}' and loses '{smallest}'. Set equalize_norms=True to "
        "scale them to one norm, or check_norms=False if this is meant."
    )
