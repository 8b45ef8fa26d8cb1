"""Model Breadcrumbs: sparse masks that leave out the largest and the smallest entries (arXiv 2312.06795)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..base import ParameterKind, TensorGroup
from ..selection import Cut, count_kept, cuts_of_parts, selection_memory
from ..sparsify import SparseMethod, task_vector_parts


class Breadcrumbs(SparseMethod):
    """τ̂ keeps, of each parameter, the `density` largest entries after the γ largest (arXiv 2312.06795)."""

    @classmethod
    def working_memory(cls, kind: ParameterKind, shape: Sequence[int], experts: int, settings: Any) -> int:
        held = super().working_memory(kind, shape, experts, settings)
        return max(held, selection_memory(math.prod(shape)))

    @classmethod
    def looks_again(cls, settings: Any) -> bool:
        return True

    def mark(self, group: TensorGroup, index: int) -> tuple[Cut, Cut]:
        density, gamma = group.settings.density[index], group.settings.gamma[index]
        size = group.shape.numel()
        kept = count_kept(density, size)
        # Rounded down and up: a parameter with fewer than 1/γ entries has no outliers, and never loses all of them.
        outliers = min(size - kept, math.floor(gamma * size * (1 + 1e-12)))
        within, above = cuts_of_parts(task_vector_parts(group, index), size, [outliers + kept, outliers])
        return within, above

    def sparsify(self, vector: Tensor, piece: TensorGroup, index: int, mark: tuple[Cut, Cut]) -> Tensor:
        kept, outliers = mark
        vector = kept.trim(vector, piece.offset)
        return vector - outliers.trim(vector, piece.offset)
