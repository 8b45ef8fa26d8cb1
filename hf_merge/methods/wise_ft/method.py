"""WiSE-FT: the weight-space ensemble of a model and its fine-tune (arXiv 2109.01903)."""

from __future__ import annotations

from torch import Tensor

from ..base import TensorGroup, TensorMethod


class WiseFt(TensorMethod):
    """(1 − α) θ_0 + α θ_1 for one expert (arXiv 2109.01903)."""

    requires_base = True
    changes_only = True
    max_experts = 1

    def merge(self, group: TensorGroup) -> Tensor:
        alpha = group.settings.alpha
        return group.base.mul(1.0 - alpha).add_(group.expert(0), alpha=alpha)
