"""Task arithmetic: θ_0 + λ Σ w_i τ_i (arXiv 2212.04089, eq. 1)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ...low_rank import Factors, concatenated
from ..base import ElementwiseMethod, LowRankGroup, TensorGroup
from ..linear.method import normalizer, scaled


class TaskArithmetic(ElementwiseMethod):
    """θ_0 + λ Σ w_i τ_i."""

    requires_base = True
    changes_only = True

    @classmethod
    def merged_rank(cls, ranks: Sequence[int], settings: Any) -> int:
        return sum(ranks)

    def merge_piece(self, piece: TensorGroup, prepared: None) -> Tensor:
        settings = piece.settings
        total = scaled(piece.task_vector(0), settings.weights[0])
        for index in range(1, len(piece)):
            total.add_(piece.task_vector(index), alpha=settings.weights[index])
        if settings.normalize:
            total.div_(normalizer(settings.weights, piece.name))
        return scaled(total, settings.scaling).add_(piece.base)

    def merge_low_rank(self, group: LowRankGroup) -> Factors:
        settings = group.settings
        factor = settings.scaling / (normalizer(settings.weights, group.name) if settings.normalize else 1.0)
        return concatenated(group.experts, [factor * weight for weight in settings.weights])
