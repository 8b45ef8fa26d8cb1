"""Model Stock: layer-wise interpolation between the base model and the mean of the experts (arXiv 2403.19522)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..base import FLOAT32, ElementwiseMethod, ParameterKind, TensorGroup
from ..rows import entries_of_rows, from_piece_rows, piece_rows, row_length, row_unit
from ..spherical import SMALLEST_SQUARE, gram_matrix, rough_gram_matrix, row_norms


KEPT = 1 << 24
"""Bytes of a parameter in float32 up to which Σ τ_i is kept when it was made for the angle."""


@dataclass
class Prepared:
    """What is known of a parameter.

    Args:
        ratio (`float`): Its t.
        length (`int`): The length of its rows, where every row has its own t.
        totals (`dict`): Σ τ_i of its pieces by offset, of a small parameter.
    """

    ratio: float = 1.0
    length: int = 1
    totals: dict[int, Tensor] = field(default_factory=dict)


class ModelStock(ElementwiseMethod):
    """θ_0 + t · mean τ, with t from the mean angle θ between the task vectors; see [`interpolation_ratio`]."""

    requires_base = True
    changes_only = True
    min_experts = 2

    @classmethod
    def looks_again(cls, settings: Any) -> bool:
        return settings.filter_wise

    def unit(self, group: TensorGroup) -> int | None:
        return row_unit(group.shape, group.kind) if group.settings.filter_wise else 1

    @classmethod
    def entries_at_once(cls, kind: ParameterKind, shape: Sequence[int], settings: Any) -> int:
        return entries_of_rows(kind, shape) if settings.filter_wise else super().entries_at_once(kind, shape, settings)

    @classmethod
    def working_memory(cls, kind: ParameterKind, shape: Sequence[int], experts: int, settings: Any) -> int:
        size = FLOAT32 * math.prod(shape)
        return super().working_memory(kind, shape, experts, settings) + (size if size <= KEPT else 0)

    def prepare(self, group: TensorGroup) -> Prepared:
        if group.settings.filter_wise:
            return Prepared(length=row_length(group.shape, group.kind))
        gram, totals = 0.0, {}
        for piece in group.pieces():
            vectors = list(piece.task_vectors())
            gram = rough_gram_matrix(vectors) + gram
            if FLOAT32 * group.shape.numel() <= KEPT:
                totals[piece.offset] = _sum(vectors)
        if not SMALLEST_SQUARE < float(gram.diagonal().min()) <= float(gram.diagonal().max()) < math.inf:
            gram = sum(gram_matrix(list(piece.task_vectors())) for piece in group.pieces())
        norms = gram.diagonal().sqrt()
        units = norms.masked_fill(norms == 0, 1.0).reciprocal_()
        ratio = float(interpolation_ratio(units @ gram @ units, torch.count_nonzero(norms), len(group)))
        group.report["ratio"] = ratio
        return Prepared(ratio, totals=totals)

    def merge_piece(self, piece: TensorGroup, prepared: Prepared) -> Tensor:
        total = prepared.totals.pop(piece.offset, None)
        if total is None:
            total = _sum(piece.task_vectors())
        if piece.settings.filter_wise:
            rows = piece_rows(total, piece.kind, prepared.length)
            ratios = _row_ratios(piece, prepared.length).to(rows.dtype)
            return from_piece_rows(rows.mul_(ratios), total, piece.kind).div_(len(piece)).add_(piece.base)
        return torch.add(piece.base, total, alpha=prepared.ratio / len(piece))


def _sum(vectors: Iterable[Tensor]) -> Tensor:
    """Their sum, in the memory of the first."""
    first, *others = vectors
    for vector in others:
        first += vector
    return first


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
