"""Model Stock: layer-wise interpolation between the base model and the mean of the experts (arXiv 2403.19522)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..base import ElementwiseMethod, TensorGroup
from ..rows import from_piece_rows, piece_rows, row_length, row_unit
from ..spherical import SMALLEST_SQUARE, gram_matrix, rough_gram_matrix, row_norms


class ModelStock(ElementwiseMethod):
    """θ_0 + t · mean τ, with t from the mean angle θ between the task vectors; see [`interpolation_ratio`]."""

    requires_base = True
    changes_only = True
    min_experts = 2

    @classmethod
    def looks_again(cls, settings: Any) -> bool:
        return True

    def unit(self, group: TensorGroup) -> int | None:
        return row_unit(group.shape, group.kind) if group.settings.filter_wise else 1

    def prepare(self, group: TensorGroup) -> float | int:
        """t of the parameter, or the length of its rows where every row has its own."""
        if group.settings.filter_wise:
            return row_length(group.shape, group.kind)
        gram = sum(rough_gram_matrix(piece.task_vector, len(piece)) for piece in group.pieces())
        if not SMALLEST_SQUARE < float(gram.diagonal().min()) <= float(gram.diagonal().max()) < math.inf:
            gram = sum(gram_matrix(piece.task_vector, len(piece)) for piece in group.pieces())
        norms = gram.diagonal().sqrt()
        units = norms.masked_fill(norms == 0, 1.0).reciprocal_()
        ratio = float(interpolation_ratio(units @ gram @ units, torch.count_nonzero(norms), len(group)))
        group.report["ratio"] = ratio
        return ratio

    def merge_piece(self, piece: TensorGroup, prepared: float) -> Tensor:
        total = piece.task_vector(0)
        for index in range(1, len(piece)):
            total += piece.task_vector(index)
        if piece.settings.filter_wise:
            rows = piece_rows(total, piece.kind, prepared)
            total = from_piece_rows(rows.mul_(_row_ratios(piece, prepared).to(rows.dtype)), total, piece.kind)
        else:
            total.mul_(prepared)
        return total.div_(len(piece)).add_(piece.base)


def _row_ratios(piece: TensorGroup, length: int) -> Tensor:
    """t of every row: float64, (rows, 1)."""
    directions, nonzero = 0.0, 0
    for vector in piece.task_vectors():
        rows = piece_rows(vector, piece.kind, length)
        norms = row_norms(rows)
        directions = rows.div_(norms.masked_fill(norms == 0, 1.0)) + directions
        nonzero = (norms > 0) + nonzero
    return interpolation_ratio(row_norms(directions).square_(), nonzero, len(piece))


def interpolation_ratio(squared_sum: Tensor, nonzero: Tensor, n: int) -> Tensor:
    """t = n cos θ / (1 + (n − 1) cos θ), cos θ the mean cosine over the pairs of experts, clamped to [0, 1].

    The cosines of all pairs come from one pass: ‖Σ u_i‖² = m + 2 Σ_{i<j} cos θ_ij for m unit vectors u_i. A task vector that is
    zero has the cosine 0 with every other. There is no absolute guard: parameters and task vectors may be of any size.

    Args:
        squared_sum (`torch.Tensor`): ‖Σ u_i‖², float64, one for each row.
        nonzero (`torch.Tensor`): m, how many task vectors are not zero in the row.
        n (`int`): The number of experts.
    """
    cos = ((squared_sum - nonzero) / (n * (n - 1))).clamp_(0.0, 1.0)
    return n * cos / (1 + (n - 1) * cos)
