"""Localize-and-Stitch in its form without data (arXiv 2408.13656)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..base import TensorGroup
from ..sparsify import Sparsity
from ..trimming import TrimmingMethod


class LocalizeAndStitch(TrimmingMethod):
    """θ_0 + λ Σ m_i ⊙ τ_i / max(1, Σ m_i), m_i the mask of the `density` largest entries of τ_i (arXiv 2408.13656).

    Where the regions of several experts overlap, those experts are averaged.
    """

    def prepare(self, group: TensorGroup) -> Sparsity:
        return Sparsity([self.mark(group, index) for index in range(len(group))], None, None)

    def merge_piece(self, piece: TensorGroup, prepared: Sparsity) -> Tensor:
        merged, owners = torch.zeros_like(piece.base), torch.zeros_like(piece.base)
        for index, (cut, vector) in enumerate(zip(prepared.marks, piece.task_vectors(), strict=True)):
            region = self.sparsify(vector, piece, index, cut)
            merged += region
            owners += region.sign_().abs_()
        return merged.div_(owners.clamp_(min=1.0)).mul_(piece.settings.scaling).add_(piece.base)
