"""Arcee Fusion: the outliers of an importance score, as mergekit defines it."""

from __future__ import annotations

import torch
from torch import Tensor

from ..base import TensorGroup, TensorMethod
from ..selection import kth_largest_magnitude


_CHUNK = 1 << 20


class ArceeFusion(TensorMethod):
    """θ_0 + τ ⊙ [I ≥ median(I) + 1.5 (Q_3(I) − Q_1(I))], I the importance of every entry, for one expert.

    The quartiles are exact; mergekit estimates them from a random sample of large parameters.
    """

    working_copies = (12.5, 0.0)
    requires_base = True
    max_experts = 1

    def merge(self, group: TensorGroup) -> Tensor:
        vector = group.task_vector(0)
        scores = importance(group.expert(0), group.base)
        if scores.numel() == 0:
            return group.base.clone()
        first, median, third = (_quantile(scores, fraction) for fraction in (0.25, 0.5, 0.75))
        vector.mul_(scores >= median + 1.5 * (third - first))
        return vector.add_(group.base)


def importance(expert: Tensor, base: Tensor) -> Tensor:
    """|θ_1 − θ_0| · KL(softmax θ_1 ‖ softmax θ_0), the softmax along the last dimension.

    The divergence of a fine-tune from its base is of the order of the squared change, far below the rounding of a float32 sum: it
    is computed in float64.
    """
    rows, base_rows = (values.reshape(-1, values.shape[-1] if values.dim() else 1) for values in (expert, base))
    step = max(1, _CHUNK // max(1, rows.shape[1]))
    divergences = []
    for p, q in zip(rows.split(step), base_rows.split(step), strict=True):
        log_p, log_q = p.double().log_softmax(dim=1), q.double().log_softmax(dim=1)
        divergences.append((log_p.exp() * (log_p - log_q)).sum(dim=1, keepdim=True).clamp_(min=0.0))
    return (rows - base_rows).abs_().mul_(torch.cat(divergences)).view(expert.shape)


def _quantile(scores: Tensor, fraction: float) -> float:
    """The lower quantile of scores that are not negative, by selection."""
    index = int(fraction * (scores.numel() - 1))
    return kth_largest_magnitude(scores, scores.numel() - index)
