"""Weighted average: Σ w_i θ_i, divided by Σ w_i when `normalize` (arXiv 2203.05482)."""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import ConfigError
from ..base import TensorGroup, TensorMethod


class LinearMerge(TensorMethod):
    """Σ w_i θ_i (÷ Σ w_i). Needs no base model."""

    merges_buffers = True

    def merge(self, group: TensorGroup) -> Tensor:
        settings = group.settings
        total = torch.zeros(group.shape, dtype=group.dtype, device=group.stored_experts[0].device)
        for weight, expert in zip(settings.weights, group.experts(), strict=True):
            total.add_(expert, alpha=weight)
        return total.div_(normalizer(settings.weights, group.name)) if settings.normalize else total


def normalizer(weights: list[float], name: str) -> float:
    """Σ w_i, or a [`ConfigError`] that names the parameter when the weights cancel."""
    total = sum(weights)
    if abs(total) < 1e-12 * max(1.0, max(map(abs, weights))):
        raise ConfigError(
            f"The weights {weights} for the parameter '{name}' sum to zero and cannot be normalised: change them or set normalize=False."
        )
    return total
