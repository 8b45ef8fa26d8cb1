"""DARE: Drop And REscale (arXiv 2311.03099)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..base import TensorGroup
from ..election import masked
from ..sparsify import SparseMethod


class Dare(SparseMethod):
    """m ~ Bernoulli(1 − p), τ̂ = m ⊙ τ / (1 − p) with p = 1 − density (arXiv 2311.03099)."""

    def sparsify(self, vector: Tensor, piece: TensorGroup, index: int, mark: Any) -> Tensor:
        density = piece.settings.density[index]
        if density == 1.0:
            return vector
        masked(vector, piece.keep_mask(index, density))
        return vector.div_(density) if piece.settings.rescale == "probability" and density > 0.0 else vector
