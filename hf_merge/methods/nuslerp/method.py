"""NuSLERP: spherical interpolation between two experts or their task vectors, as mergekit defines it."""

from __future__ import annotations

from torch import Tensor

from ..base import TensorGroup, TensorMethod
from ..linear.method import normalizer
from ..spherical import slerp_rows


class NuSlerp(TensorMethod):
    """slerp(t; θ_1, θ_2), or θ_0 + slerp(t; τ_1, τ_2) with a base model, t = w_2 / (w_1 + w_2)."""

    working_copies = (9.5, 0.0)
    changes_only = True
    min_experts = 2
    max_experts = 2

    def merge(self, group: TensorGroup) -> Tensor:
        settings = group.settings
        t = settings.weights[1] / normalizer(settings.weights, group.name)
        vector = group.expert if group.base is None else group.task_vector
        first, second = (_as_vectors(vector(index), settings.granularity) for index in range(2))
        merged = slerp_rows(t, first, second)
        if settings.granularity == "column":
            merged = merged.T
        merged = merged.reshape(group.shape)
        return merged if group.base is None else merged.add_(group.base)


def _as_vectors(values: Tensor, granularity: str) -> Tensor:
    """The vectors as rows of a matrix."""
    if granularity == "tensor" or values.dim() < 2:
        return values.reshape(1, -1)
    return values.flatten(1).T if granularity == "column" else values.flatten(0, -2)
