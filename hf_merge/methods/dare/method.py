"""DARE: Drop And REscale (arXiv 2311.03099)."""

from __future__ import annotations

from torch import Tensor

from ..base import TensorGroup
from ..sparsify import SparseMethod


class Dare(SparseMethod):
    """m ~ Bernoulli(1 − p), τ̂ = m ⊙ τ / (1 − p) with p = 1 − density (arXiv 2311.03099)."""

    def sparsify(self, group: TensorGroup, index: int) -> Tensor:
        density = group.settings.density[index]
        vector = group.task_vector(index)
        if density < 1.0:
            vector.mul_(group.keep_mask(index, density))
        return vector.div_(density) if group.settings.rescale and density > 0.0 else vector
