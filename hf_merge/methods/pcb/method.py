"""PCB-Merging: parameter competition balancing (arXiv 2410.02396)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..base import TensorGroup, TensorMethod
from ..election import weighted_sum
from ..selection import count_kept, kth_largest_magnitude


_OUTLIERS = 1e-4  # the fraction of largest magnitudes that are clipped, as in the authors' code


class Pcb(TensorMethod):
    """θ_0 + λ Σ s_i ⊙ τ_i / Σ s_i, with s_i the scores of [`balanced_scores`], parameter by parameter."""

    working_copies = (12.0, 2.0)
    requires_base = True
    changes_only = True

    def merge(self, group: TensorGroup) -> Tensor:
        settings = group.settings
        total = weighted_sum(group.task_vectors(), [1.0] * len(group))
        merged, mass = torch.zeros_like(total), torch.zeros_like(total)
        for index, vector in enumerate(group.task_vectors()):
            clipped = clip_outliers(vector)
            scores = balanced_scores(vector, clipped, total, len(group), settings.density[index])
            mass += scores
            merged += scores.mul_(clipped)
        merged.div_(mass.masked_fill_(mass == 0, 1.0))
        return merged.mul_(settings.scaling).add_(group.base)


def balanced_scores(vector: Tensor, clipped: Tensor, total: Tensor, n: int, density: float) -> Tensor:
    """The weight of every entry of one task vector, 0 for those that are dropped and at most 1.

    Intra-balancing exp(n · norm(|τ_i|)²) times inter-balancing tanh(τ_i ⊙ Σ_j τ_j), where norm scales linearly to [0, 1]. The
    `density` highest products are kept and scaled to [0, 1] (arXiv 2410.02396, in the form of the authors' code, which leaves out
    constants of the paper's softmax that cancel).

    Args:
        vector, clipped (`torch.Tensor`): τ_i, as it is and without outliers.
        total (`torch.Tensor`): Σ_j τ_j.
        n (`int`): The number of experts.
        density (`float`): The fraction that is kept.
    """
    kept = count_kept(density, vector.numel())
    if kept == 0:
        return torch.zeros_like(vector)
    scores = _to_unit_range(clipped.abs()).square_().mul_(n).exp_()
    scores.mul_(vector.mul(total).tanh_())
    lowest = scores.reshape(-1).kthvalue(scores.numel() - kept + 1).values
    span = scores.max() - lowest
    if span == 0:  # nothing to rank: what is kept counts alike
        return (scores >= lowest).logical_and_(vector != 0).to(vector.dtype)
    return scores.sub_(lowest).clamp_(min=0.0).div_(span)


def clip_outliers(vector: Tensor) -> Tensor:
    """The task vector with its few largest magnitudes cut down to the next one below; none in parameters of a few entries."""
    outliers = int(_OUTLIERS * vector.numel())
    if outliers == 0:
        return vector
    limit = kth_largest_magnitude(vector, outliers + 1)
    return vector.clamp(-limit, limit)


def _to_unit_range(values: Tensor) -> Tensor:
    low, high = torch.aminmax(values)
    return values.sub_(low).div_(high - low) if high > low else torch.zeros_like(values)
