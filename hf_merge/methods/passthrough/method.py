"""One expert's parameters, times a factor."""

from __future__ import annotations

from torch import Tensor

from ..base import TensorGroup, TensorMethod


class Passthrough(TensorMethod):
    """s θ_1 for one expert."""

    merges_buffers = True
    max_experts = 1

    def merge(self, group: TensorGroup) -> Tensor:
        return group.expert(0) * group.settings.scaling
