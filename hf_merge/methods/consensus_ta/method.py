"""Consensus Task Arithmetic: keep what several tasks use (arXiv 2405.07813)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..base import ElementwiseMethod, TensorGroup
from ..election import weighted_sum


class ConsensusTa(ElementwiseMethod):
    """θ_0 + λ m ⊙ τ, τ = Σ w_i τ_i, where m keeps the entries that at least k tasks use.

    Task i uses an entry when |τ_i| ≥ |τ − τ_i| t_i: its TALL mask (arXiv 2405.07813). As by default in the authors' code the
    masks look at the sum of the task vectors before it is scaled.
    """

    requires_base = True
    changes_only = True
    min_experts = 2

    @classmethod
    def looks_again(cls, settings: Any) -> bool:
        return True

    def merge_piece(self, piece: TensorGroup, prepared: None) -> Tensor:
        settings = piece.settings
        total = weighted_sum(piece.task_vectors(), settings.weights)
        users = torch.zeros(piece.shape, dtype=torch.int16, device=piece.device)
        for threshold, vector in zip(settings.t, piece.task_vectors(), strict=True):
            users += vector.abs() >= (total - vector).abs_().mul_(threshold)
        return total.mul_(users >= settings.k).mul_(settings.scaling).add_(piece.base)
