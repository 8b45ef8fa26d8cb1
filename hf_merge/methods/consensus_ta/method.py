"""Consensus Task Arithmetic: keep what several tasks use (arXiv 2405.07813)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..base import TensorGroup, TensorMethod
from ..sparsify import weighted_sum


class ConsensusTa(TensorMethod):
    """θ_0 + λ m ⊙ τ, τ = Σ w_i τ_i, where m keeps the entries that at least k tasks use.

    Task i uses an entry when |τ_i| ≥ |τ − τ_i| t_i: its TALL mask (arXiv 2405.07813). As by default in the authors' code the
    masks look at the sum of the task vectors before it is scaled.
    """

    requires_base = True
    changes_only = True
    min_experts = 2

    def merge(self, group: TensorGroup) -> Tensor:
        settings = group.settings
        total = weighted_sum(group.task_vector, settings.weights)
        users = torch.zeros(group.shape, dtype=torch.int16, device=total.device)
        for threshold, vector in zip(settings.t, group.task_vectors(), strict=True):
            users += vector.abs() >= (total - vector).abs_().mul_(threshold)
        return total.mul_(users >= settings.k).mul_(settings.scaling).add_(group.base)
