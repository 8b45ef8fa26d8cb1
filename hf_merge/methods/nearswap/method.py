"""NearSwap: an expert's values where they are near the base model's, as mergekit defines it."""

from __future__ import annotations

from torch import Tensor

from ..base import ElementwiseMethod, TensorGroup


class NearSwap(ElementwiseMethod):
    """θ_0 + clamp(τ, −t, t) for one expert.

    The usual form q θ_1 + (1 − q) θ_0 with q = min(1, t / |τ|) is the same: q τ is τ up to |τ| = t and has the length t above.
    """

    requires_base = True
    changes_only = True
    max_experts = 1

    def merge_piece(self, piece: TensorGroup, prepared: None) -> Tensor:
        t = piece.settings.t
        return piece.task_vector(0).clamp_(-t, t).add_(piece.base)
