"""DARE: Drop And REscale (arXiv 2311.03099)."""

from __future__ import annotations

from torch import Tensor

from ..base import TensorGroup
from ..sparsify import SparseMethod, restore_norm
from ..spherical import l1_norm


class Dare(SparseMethod):
    """m ~ Bernoulli(1 − p), τ̂ = m ⊙ τ / (1 − p) with p = 1 − density (arXiv 2311.03099)."""

    def sparsify(self, group: TensorGroup, index: int) -> Tensor:
        density, rescale = group.settings.density[index], group.settings.rescale
        vector = group.task_vector(index)
        if density == 1.0:
            return vector
        norm = l1_norm(vector) if rescale == "norm" else 0.0
        vector.mul_(group.keep_mask(index, density))
        if rescale == "norm":
            return restore_norm(vector, norm)
        return vector.div_(density) if rescale == "probability" and density > 0.0 else vector
