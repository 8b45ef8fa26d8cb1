"""WUDI-Merging on the linear layers of a model: builds each layer's objective and hands it to the chosen solver."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ...low_rank import Factors
from ...registry import get_merge_method
from ..base import LINEAR_KINDS, LinearMethod, LowRankGroup, ParameterKind, TaskMatrices, TensorGroup
from ..linalg import solve_dtype
from ..reporting import add_to_report
from .config import WudiConfig
from .layer import solve
from .low_rank import ROTATION_FREE, solve_low_rank
from .solvers import Solution


NORM_RATIO = 5.0
"""Task vectors whose norms differ by more than this break every method of the family (DisTaC, arXiv 2508.01148)."""


class Wudi(LinearMethod):
    """W_0 + argmin_M Σ_i ‖(M − T_i) T_iᵀ‖² / ‖T_i‖², regularised by the solver (arXiv 2503.08099, eq. 9).

    With `equalize_norms` every parameter is observed once before the merge, for the norms of the whole task vectors.
    """

    working_copies = (18.0, 1.0)
    square_copies = 9.0
    changes_only = True

    @classmethod
    def merged_rank(cls, ranks: Sequence[int], settings: WudiConfig) -> int | None:
        return sum(ranks) if settings.solver in ROTATION_FREE else None

    def __init__(self):
        self._scales: dict[str, float] = {}
        self._squares: dict[str, dict[str, list[float]]] = {}  # by parameter and expert

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

    def noticed(self) -> dict[str, dict[str, list[float]]]:
        return self._squares

    def notice(self, noticed: dict[str, dict[str, list[float]]]) -> None:
        self._squares |= noticed

    def remarks(self) -> list[str]:
        squares: dict[str, list[float]] = {}
        for by_expert in self._squares.values():
            for name, parts in by_expert.items():
                squares.setdefault(name, []).extend(parts)
        mismatch = _mismatch(_total_norms(squares))
        return [mismatch] if mismatch else []

    def merge_matrix(self, task_matrices: TaskMatrices, group: TensorGroup) -> Tensor:
        scales = [self._scales.get(name, 1.0) for name in group.expert_names]
        vectors = _ScaledMatrices(task_matrices, scales, solve_dtype(task_matrices.base))
        norms = [torch.linalg.vector_norm(vector).item() for vector in vectors]
        if group.settings.check_norms and not self._scales:
            if not task_matrices.index:
                self._squares.pop(group.name, None)  # of an attempt for which the memory was too small
            for name, norm in zip(group.expert_names, norms, strict=True):
                self._squares.setdefault(group.name, {}).setdefault(name, []).append(norm**2)
        vectors.drop([index for index, norm in enumerate(norms) if norm == 0])
        if not vectors:
            return torch.zeros_like(task_matrices.base)
        start = _other_start(task_matrices, group.settings)
        solution = solve(vectors, [norm for norm in norms if norm != 0], group.settings, start=start)
        _report(solution, group, task_matrices)
        return solution.merged.to(task_matrices.base.dtype)

    def merge_factors(self, group: LowRankGroup) -> Factors | None:
        settings: WudiConfig = group.settings
        if settings.solver not in ROTATION_FREE or settings.initial not in (None, "sum", "mean"):
            return None
        if settings.check_norms and not self._scales:
            for name, expert in zip(group.expert_names, group.experts, strict=True):
                self._squares.setdefault(group.name, {}).setdefault(name, []).append(expert.norm() ** 2)
        scales = [self._scales.get(name, 1.0) for name in group.expert_names]
        experts = [expert.scaled(scale) for expert, scale in zip(group.experts, scales, strict=True)]
        solution, basis = solve_low_rank(experts, settings)
        if solution is None:
            return Factors.zero(group.experts[0])
        group.report |= {"wudi_loss_before": solution.loss_before, "wudi_loss_after": solution.loss_after}
        if solution.rank is not None:
            group.report["effective_rank"] = solution.rank
        return Factors(solution.merged, basis.mT).to(group.experts[0].left.dtype)


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
