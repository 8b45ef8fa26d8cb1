"""MultiSLERP: the mean direction of several experts, as mergekit defines it."""

from __future__ import annotations

import math

from torch import Tensor

from ..base import TensorGroup, TensorMethod
from ..linear.method import normalizer
from ..spherical import combine, unit_gram


_OPPOSITE = 1e-6  # a mean of unit vectors shorter than this has no direction


class MultiSlerp(TensorMethod):
    """(Σ w_i ‖v_i‖) m, m the direction of Σ w_i v_i / ‖v_i‖; v_i = τ_i with a base model (and θ_0 is added), θ_i without.

    mergekit projects the unit vectors onto the tangent space at m, averages there and maps back. That average is zero, as m is the
    direction of their sum: the result is m itself.
    """

    working_copies = (6.5, 0.3)
    changes_only = True

    def merge(self, group: TensorGroup) -> Tensor:
        vector = group.expert if group.base is None else group.task_vector
        weights = group.settings.weights
        if group.settings.normalize:
            total = normalizer(weights, group.name)
            weights = [weight / total for weight in weights]
        merged = combine(vector, self._coefficients(vector, weights))
        return merged if group.base is None else merged.add_(group.base)

    @staticmethod
    def _coefficients(vector, weights: list[float]) -> list[float]:
        norms, gram = unit_gram(vector, len(weights))
        along = gram.new_tensor(weights)
        length = math.sqrt(max(0.0, float(along @ gram @ along)))
        if length < _OPPOSITE:
            return weights
        return (along * (along @ norms) / length / norms.masked_fill(norms == 0, 1.0)).tolist()
