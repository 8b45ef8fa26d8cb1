"""Task arithmetic: θ_0 + λ Σ w_i τ_i (arXiv 2212.04089, eq. 1)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..base import TensorGroup, TensorMethod
from ..linear.method import normalizer


class TaskArithmetic(TensorMethod):
    """θ_0 + λ Σ w_i τ_i."""

    requires_base = True

    def merge(self, group: TensorGroup) -> Tensor:
        settings = group.settings
        total = torch.zeros_like(group.base)
        for weight, vector in zip(settings.weights, group.task_vectors(), strict=True):
            total.add_(vector, alpha=weight)
        if settings.normalize:
            total.div_(normalizer(settings.weights, group.name))
        return total.mul_(settings.scaling).add_(group.base)
