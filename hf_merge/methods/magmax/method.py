"""MagMax: maximum magnitude selection (arXiv 2407.06322)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..base import ElementwiseMethod, TensorGroup


class MagMax(ElementwiseMethod):
    """θ_0 + λ τ, where each entry of τ is that of the task vector in which it is largest in magnitude (arXiv 2407.06322).

    Of two opposite entries of one magnitude the positive one is taken, so that the order of the experts does not matter.
    """

    requires_base = True
    changes_only = True

    def merge_piece(self, piece: TensorGroup, prepared: None) -> Tensor:
        best = piece.task_vector(0)
        for index in range(1, len(piece)):
            vector = piece.task_vector(index)
            magnitude, largest = vector.abs(), best.abs()
            wins = (magnitude > largest) | ((magnitude == largest) & (vector > best))
            best = torch.where(wins, vector, best)
        return best.mul_(piece.settings.scaling).add_(piece.base)
