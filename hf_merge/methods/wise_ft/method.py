"""WiSE-FT: the weight-space ensemble of a model and its fine-tune (arXiv 2109.01903)."""

from __future__ import annotations

from torch import Tensor

from ..base import ElementwiseMethod, TensorGroup


class WiseFt(ElementwiseMethod):
    """(1 − α) θ_0 + α θ_1 for one expert (arXiv 2109.01903)."""

    requires_base = True
    changes_only = True
    max_experts = 1

    def merge_piece(self, piece: TensorGroup, prepared: None) -> Tensor:
        alpha = piece.settings.alpha
        return piece.base.mul(1.0 - alpha).add_(piece.expert(0), alpha=alpha)
