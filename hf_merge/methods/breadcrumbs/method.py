"""Model Breadcrumbs: sparse masks that leave out the largest and the smallest entries (arXiv 2312.06795)."""

from __future__ import annotations

import math

from torch import Tensor

from ..base import TensorGroup
from ..selection import count_kept, largest_mask
from ..sparsify import SparseMethod, restore_norm
from ..spherical import l1_norm


class Breadcrumbs(SparseMethod):
    """τ̂ keeps, of each parameter, the `density` largest entries after the γ largest (arXiv 2312.06795)."""

    def sparsify(self, group: TensorGroup, index: int) -> Tensor:
        density, gamma = group.settings.density[index], group.settings.gamma[index]
        vector = group.task_vector(index)
        size = vector.numel()
        kept = count_kept(density, size)
        # Rounded down and up: a parameter with fewer than 1/γ entries has no outliers, and never loses all of them.
        outliers = min(size - kept, math.floor(gamma * size * (1 + 1e-12)))
        mask = largest_mask(vector, outliers + kept)
        if outliers:
            mask ^= largest_mask(vector, outliers)
        if group.settings.rescale == "none":
            return vector.mul_(mask)
        return restore_norm(vector.mul_(mask), l1_norm(group.task_vector(index)))
