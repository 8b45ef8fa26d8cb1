"""The Karcher (Fréchet) mean of the experts on a sphere (arXiv 2603.04972)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..base import TensorGroup, TensorMethod
from ..linear.method import normalizer
from ..spherical import combine, unit_gram


_OPPOSITE = 1e-6


class Karcher(TensorMethod):
    """(Σ α_i ‖θ_i‖) μ for each parameter, μ the Karcher mean of θ_i / ‖θ_i‖ on the unit sphere and α_i = w_i / Σ w.

    The mean lies in the span of the experts: it is computed on its coefficients, from the inner products of the experts alone, in
    float64. The steps cost nothing, whatever the size of the parameter.
    """

    working_copies = (4.0, 0.5)

    def merge(self, group: TensorGroup) -> Tensor:
        settings = group.settings
        total = normalizer(settings.weights, group.name)
        alphas = torch.tensor(settings.weights, dtype=torch.float64) / total
        norms, gram = unit_gram(group.expert, len(group))
        mean = karcher_mean(gram, alphas * (norms > 0), settings.max_iter, settings.tol)
        if mean is None:
            return combine(group.expert, alphas.tolist())
        return combine(group.expert, (mean * (alphas @ norms) / norms.masked_fill(norms == 0, 1.0)).tolist())


def karcher_mean(gram: Tensor, alphas: Tensor, max_iter: int, tol: float) -> Tensor | None:
    """The Karcher mean of unit vectors as coefficients of these vectors, or `None` when they have none (opposite vectors).

    Steps μ ← exp_μ(Σ α_i log_μ u_i) from the normalised weighted sum, until a step is shorter than `tol`.

    Args:
        gram (`torch.Tensor`): The inner products ⟨u_i, u_j⟩, float64 (n, n).
        alphas (`torch.Tensor`): Weights, float64 (n,); they are normalised.
        max_iter (`int`), tol (`float`): When to stop.
    """
    if float(alphas.sum()) == 0.0:
        return None
    alphas = alphas / alphas.sum()
    mean = _normalized(alphas, gram)
    for _ in range(max_iter):
        if mean is None:
            return None
        cos = (gram @ mean).clamp(-1.0, 1.0)
        if bool((cos[alphas > 0] < -1.0 + _OPPOSITE).any()):
            return None
        angles = torch.acos(cos)
        pull = alphas / torch.sinc(angles / torch.pi)
        tangent = pull - (pull @ cos) * mean
        length = float((tangent @ gram @ tangent).clamp(min=0.0).sqrt())
        if length < tol:
            break
        step = torch.tensor(length, dtype=torch.float64)
        mean = _normalized(torch.cos(step) * mean + torch.sin(step) / length * tangent, gram)
    return mean


def _normalized(coefficients: Tensor, gram: Tensor) -> Tensor | None:
    length = float((coefficients @ gram @ coefficients).clamp(min=0.0).sqrt())
    return coefficients / length if length > _OPPOSITE else None
