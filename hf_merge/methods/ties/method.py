"""TIES-Merging: trim the task vectors, elect a sign for every entry, average the experts that agree (arXiv 2306.01708)."""

from __future__ import annotations

from torch import Tensor

from ..base import TensorGroup
from ..sparsify import disjoint_merge, elect_positive, restore_norm
from ..spherical import l1_norm
from ..trimming import TrimmingMethod


class Ties(TrimmingMethod):
    """θ_0 + λ · disjoint mean of the trimmed task vectors (arXiv 2306.01708)."""

    def merge(self, group: TensorGroup) -> Tensor:
        settings = group.settings
        cuts = [self.cut(group, index) for index in range(len(group))]

        def trimmed(index: int) -> Tensor:
            vector = self.trim(group, index, cuts[index])
            return vector if settings.rescale == "none" else restore_norm(vector, l1_norm(group.task_vector(index)))

        positive = elect_positive(trimmed, settings.weights, settings.majority_sign)
        merged = disjoint_merge(trimmed, settings.weights, positive, mean=settings.merge == "mean")
        return merged.mul_(settings.scaling).add_(group.base)
