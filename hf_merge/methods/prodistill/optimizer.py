"""Adam on coefficients of every element, without a state for each of them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn


CHUNK = 2**18
"""Elements that are updated together on a CPU: few enough to stay in its cache."""


class CoefficientAdam(torch.optim.Optimizer):
    """Adam on the δ_i of θ = θ_init + Σ_i δ_i ∘ τ_i, which writes θ.

    The gradient of δ_i is g ∘ τ_i with the gradient g of the weight, and τ_i is constant. So Adam's moments of δ_i are τ_i ∘ m and
    τ_i² ∘ v with the moments m and v of g, and one update of all coefficients changes the weight by

        −lr · Σ_i τ_i² m̂ / (|τ_i| √v̂ + ε).

    It is Adam as published, to rounding (arXiv 1412.6980, algorithm 1), with two moments for each weight instead of two for each
    weight and expert; neither the coefficients nor their gradients are in memory.

    Args:
        weights (`Sequence[torch.nn.Parameter]`): The merged weights θ.
        vectors (`Sequence[torch.Tensor]`): The task vectors of each, (experts, *shape of the weight).
        lr (`float`): The step on the coefficients.
        betas (`tuple[float, float]`): Decays of the moments.
        eps (`float`): Adam's ε.
    """

    def __init__(
        self,
        weights: Sequence[nn.Parameter],
        vectors: Sequence[Tensor],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ):
        super().__init__(list(weights), {"lr": lr, "betas": betas, "eps": eps})
        self.vectors = dict(zip(weights, vectors, strict=True))

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Updates the weights that have a gradient."""
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    self._update(weight, group)

    def _update(self, weight: nn.Parameter, group: dict) -> None:
        state = self.state[weight]
        if not state:
            state.update(step=0, exp_avg=torch.zeros_like(weight), exp_avg_sq=torch.zeros_like(weight))
        state["step"] += 1
        beta1, beta2 = group["betas"]
        state["exp_avg"].lerp_(weight.grad, 1 - beta1)
        state["exp_avg_sq"].mul_(beta2).addcmul_(weight.grad, weight.grad, value=1 - beta2)
        rate = group["lr"] / (1 - beta1 ** state["step"])
        correction = math.sqrt(1 - beta2 ** state["step"])
        rows = zip(
            chunks(weight), chunks(state["exp_avg"]), chunks(state["exp_avg_sq"]), chunked(self.vectors[weight])
        )
        for part, mean, square, vectors in rows:
            root = square.sqrt().div_(correction)
            for vector in vectors:
                scale = vector.abs().mul_(root).add_(group["eps"])
                part.addcdiv_(vector.square().mul_(mean), scale, value=-rate)

    @torch.no_grad()
    def coefficients(self, weight: nn.Parameter, start: Tensor) -> Iterator[Tensor]:
        """The δ_i of a weight, one expert at a time, flat. The change of the weight is shared out as the last update was: exact where
        ε does not matter.

        Args:
            weight (`torch.nn.Parameter`): A merged weight.
            start (`torch.Tensor`): Its θ_init.
        """
        vectors, state, group = self.vectors[weight], self.state.get(weight), self.param_groups[0]
        if not state:
            yield from torch.zeros_like(vectors).flatten(1)
            return
        root = state["exp_avg_sq"].sqrt().div_(math.sqrt(1 - group["betas"][1] ** state["step"]))
        shares = [vector / (vector.abs() * root + group["eps"]) for vector in vectors]
        total = sum(vector * share for vector, share in zip(vectors, shares, strict=True))
        change = torch.where(total > 0, (weight - start) / total, 0.0)
        yield from ((share * change).flatten() for share in shares)


def chunks(tensor: Tensor) -> Iterable[Tensor]:
    """Parts of a contiguous tensor, flat, that share its memory."""
    return tensor.view(-1).split(CHUNK if tensor.device.type == "cpu" else tensor.numel())


def chunked(vectors: Tensor) -> Iterable[Tensor]:
    """The same parts of every task vector, (experts, part)."""
    return vectors.flatten(1).split(CHUNK if vectors.device.type == "cpu" else vectors[0].numel(), dim=1)
