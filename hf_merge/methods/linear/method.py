"""Weighted average: Σ w_i θ_i, divided by Σ w_i when `normalize` (arXiv 2203.05482)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ...errors import ConfigError
from ...low_rank import Factors, concatenated
from ..base import ElementwiseMethod, LowRankGroup, TensorGroup
from .config import LinearConfig


class LinearMerge(ElementwiseMethod):
    """Σ w_i θ_i (÷ Σ w_i). Needs no base model."""

    merges_buffers = True

    @classmethod
    def works_on_changes(cls, settings: LinearConfig) -> bool:
        return settings.normalize

    @classmethod
    def merged_rank(cls, ranks: Sequence[int], settings: LinearConfig) -> int:
        return sum(ranks)

    def merge_piece(self, piece: TensorGroup, prepared: None) -> Tensor:
        settings = piece.settings
        total = scaled(piece.new_expert(0), settings.weights[0])
        for index in range(1, len(piece)):
            total.add_(piece.expert(index), alpha=settings.weights[index])
        return total.div_(normalizer(settings.weights, piece.name)) if settings.normalize else total

    def merge_low_rank(self, group: LowRankGroup) -> Factors:
        total = normalizer(group.settings.weights, group.name)
        return concatenated(group.experts, [weight / total for weight in group.settings.weights])


def scaled(values: Tensor, factor: float) -> Tensor:
    """`values` times a factor, in place."""
    return values if factor == 1.0 else values.mul_(factor)


def normalizer(weights: list[float], name: str) -> float:
    """Σ w_i, or a [`ConfigError`] that names the parameter when the weights cancel."""
    total = sum(weights)
    if abs(total) < 1e-12 * max(1.0, max(map(abs, weights))):
        raise ConfigError(
            f"The weights {weights} for the parameter '{name}' sum to zero and cannot be normalised: change them or set normalize=False."
        )
    return total
