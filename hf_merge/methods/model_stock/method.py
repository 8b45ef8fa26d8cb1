"""Model Stock: layer-wise interpolation between the base model and the mean of the experts (arXiv 2403.19522)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..base import TensorGroup, TensorMethod
from ..rows import as_rows, from_rows
from ..spherical import row_norms


class ModelStock(TensorMethod):
    """θ_0 + t · mean τ, with t from the mean angle θ between the task vectors; see [`interpolation_ratio`]."""

    requires_base = True
    changes_only = True
    min_experts = 2

    def merge(self, group: TensorGroup) -> Tensor:
        total = torch.zeros_like(group.base)
        directions, nonzero = 0.0, 0
        for vector in group.task_vectors():
            total += vector
            rows = as_rows(vector, group.kind) if group.settings.filter_wise else vector.reshape(1, -1)
            norms = row_norms(rows)
            directions = rows.div_(norms.masked_fill(norms == 0, 1.0)) + directions
            nonzero = (norms > 0) + nonzero
        ratio = interpolation_ratio(row_norms(directions).square_(), nonzero, len(group))
        group.report["ratio"] = ratio.mean().item()
        rows = as_rows(total, group.kind) if group.settings.filter_wise else total.reshape(1, -1)
        scaled = rows * (ratio / len(group)).to(rows.dtype)
        merged = from_rows(scaled, total, group.kind) if group.settings.filter_wise else scaled.view(total.shape)
        return merged.add_(group.base)


def interpolation_ratio(squared_sum: Tensor, nonzero: Tensor, n: int) -> Tensor:
    """t = n cos θ / (1 + (n − 1) cos θ), cos θ the mean cosine over the pairs of experts, clamped to [0, 1].

    The cosines of all pairs come from one pass: ‖Σ u_i‖² = m + 2 Σ_{i<j} cos θ_ij for m unit vectors u_i. A task vector that is
    zero has the cosine 0 with every other. There is no absolute guard: parameters and task vectors may be of any size.

    Args:
        squared_sum (`torch.Tensor`): ‖Σ u_i‖², float64, one for each row.
        nonzero (`torch.Tensor`): m, how many task vectors are not zero in the row.
        n (`int`): The number of experts.
    """
    cos = ((squared_sum - nonzero) / (n * (n - 1))).clamp_(0.0, 1.0)
    return n * cos / (1 + (n - 1) * cos)
