"""One expert's parameters, times a factor."""

from __future__ import annotations

from torch import Tensor

from ..base import ElementwiseMethod, TensorGroup


class Passthrough(ElementwiseMethod):
    """s θ_1 for one expert."""

    merges_buffers = True
    max_experts = 1

    def merge_piece(self, piece: TensorGroup, prepared: None) -> Tensor:
        return piece.expert(0) * piece.settings.scaling
