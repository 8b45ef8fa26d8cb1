"""SCE: select entries by variance, calculate coefficients, erase the minority sign (FuseChat, arXiv 2408.07990)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..base import TensorGroup, TensorMethod
from ..selection import count_kept, largest_mask
from ..sparsify import disjoint_merge, elect_positive
from ..spherical import dot


class Sce(TensorMethod):
    """θ_0 + Σ c_i m_i τ̂_i / Σ c_i m_i: τ̂_i keeps the selected entries, c_i ∝ ‖τ̂_i‖², m_i keeps the elected sign.

    The coefficients are relative: unlike in mergekit small task vectors do not make them uniform.
    """

    requires_base = True
    changes_only = True

    def merge(self, group: TensorGroup) -> Tensor:
        mask = select(group, group.settings.density)

        def selected(index: int) -> Tensor:
            vector = group.task_vector(index)
            return vector if mask is None else vector.mul_(mask)

        energies = [dot(vector, vector) for vector in map(selected, range(len(group)))]
        total = sum(energies)
        if total == 0.0:
            return group.base.clone()
        positive = elect_positive(selected, [1.0] * len(group), "total")
        merged = disjoint_merge(selected, [energy / total for energy in energies], positive, mean=True)
        return merged.add_(group.base)


def select(group: TensorGroup, density: float) -> Tensor | None:
    """The mask of the entries of largest variance over the experts; `None` when all are kept."""
    if density >= 1.0:
        return None
    variance = _variance(group)
    return largest_mask(variance, count_kept(density, int(torch.count_nonzero(variance))))


def _variance(group: TensorGroup) -> Tensor:
    """The variance over the experts of every entry, exactly 0 where they are equal: moments of the distance to the first."""
    first = group.expert(0)
    mean, square = torch.zeros_like(first), torch.zeros_like(first)
    for index in range(1, len(group)):
        distance = group.expert(index) - first
        mean += distance
        square.addcmul_(distance, distance)
    return square.div_(len(group)).sub_(mean.div_(len(group)).square_()).clamp_(min=0.0)
