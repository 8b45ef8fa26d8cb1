"""Localize-and-Stitch in its form without data (arXiv 2408.13656)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..base import TensorGroup
from ..trimming import TrimmingMethod


class LocalizeAndStitch(TrimmingMethod):
    """θ_0 + λ Σ m_i ⊙ τ_i / max(1, Σ m_i), m_i the mask of the `density` largest entries of τ_i (arXiv 2408.13656).

    Where the regions of several experts overlap, those experts are averaged.
    """

    def merge(self, group: TensorGroup) -> Tensor:
        merged = torch.zeros_like(group.base)
        owners = torch.zeros(group.shape, dtype=torch.int16, device=merged.device)
        for index in range(len(group)):
            cut = self.cut(group, index)
            vector = group.task_vector(index)
            mask = self.kept(group, vector, cut)
            merged += vector.mul_(mask)
            owners += mask
        return merged.div_(owners.clamp_(min=1)).mul_(group.settings.scaling).add_(group.base)
