"""MagMax: maximum magnitude selection (arXiv 2407.06322)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..base import TensorGroup, TensorMethod


class MagMax(TensorMethod):
    """θ_0 + λ τ, where each entry of τ is that of the task vector in which it is largest in magnitude (arXiv 2407.06322).

    Of two opposite entries of one magnitude the positive one is taken, so that the order of the experts does not matter.
    """

    requires_base = True
    changes_only = True

    def merge(self, group: TensorGroup) -> Tensor:
        best = group.task_vector(0)
        for index in range(1, len(group)):
            vector = group.task_vector(index)
            magnitude, largest = vector.abs(), best.abs()
            wins = (magnitude > largest) | ((magnitude == largest) & (vector > best))
            best = torch.where(wins, vector, best)
        return best.mul_(group.settings.scaling).add_(group.base)
