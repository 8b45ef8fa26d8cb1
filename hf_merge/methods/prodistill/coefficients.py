"""The trained coefficients of one block: θ(α) = θ_init + Σ_i (α_i − α_init) ∘ τ_i.

Autograd runs through the merged weights only. The gradient of a coefficient follows from that of the weight,
∂L/∂α_i = (∂L/∂θ) ∘ τ_i, summed over the entries that share it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..base import TensorGroup
from .optimizer import CoefficientAdam


@dataclass
class _Trained:
    """One parameter: δ = α − α_init, τ stacked over the experts, θ_init, and the leaf that runs in the block."""

    name: str
    weight: nn.Parameter
    start: Tensor
    vectors: Tensor
    delta: Tensor


class Coefficients:
    """The coefficients of a block, in memory.

    Args:
        module (`torch.nn.Module`): The block; its parameters hold θ_init and are changed in place by [`~Coefficients.apply`].
        groups (`Mapping[str, TensorGroup]`): The parameters to train, by name within the block.
        granularity (`str`): `"element"`, `"tensor"` or `"task"`.
    """

    def __init__(self, module: nn.Module, groups: Mapping[str, TensorGroup], granularity: str):
        self._trained: list[_Trained] = []
        shared: Tensor | None = None
        for name, group in groups.items():
            weight = module.get_parameter(name)
            vectors = stacked_vectors(group, weight)
            if not bool(vectors.any()):
                continue
            if granularity == "element":
                delta = torch.zeros_like(vectors)
            elif granularity == "tensor":
                delta = torch.zeros(len(group), device=weight.device)
            else:
                shared = delta = torch.zeros(len(group), device=weight.device) if shared is None else shared
            weight.requires_grad_(True)
            self._trained.append(_Trained(name, weight, weight.detach().clone(), vectors, delta))

    @property
    def tensors(self) -> list[Tensor]:
        """The coefficients δ, each once, for an optimizer."""
        unique = {id(one.delta): one.delta for one in self._trained}
        return [delta.requires_grad_(True) for delta in unique.values()]

    def by_name(self) -> dict[str, Tensor]:
        """The coefficients δ of each parameter that has some; parameters may share them."""
        return {one.name: one.delta.detach() for one in self._trained}

    @torch.no_grad()
    def changes(self) -> dict[str, dict[str, list[float]]]:
        """Mean and standard deviation of each expert's δ, by parameter, for the report."""
        return {name: moments(delta) for name, delta in self.by_name().items()}

    @torch.no_grad()
    def collect_gradients(self) -> None:
        """Turns the gradients of the weights into those of the coefficients, and clears the former."""
        for delta in self.tensors:
            delta.grad = torch.zeros_like(delta) if delta.grad is None else delta.grad.zero_()
        for one in self._trained:
            if one.weight.grad is None:
                continue
            if one.delta.shape == one.vectors.shape:
                torch.mul(one.vectors, one.weight.grad, out=one.delta.grad)
            else:
                one.delta.grad.add_((one.vectors * one.weight.grad).flatten(1).sum(1))
            one.weight.grad = None

    @torch.no_grad()
    def apply(self) -> None:
        """Writes θ(α) into the block."""
        for one in self._trained:
            one.weight.copy_(one.start)
            if one.delta.shape != one.vectors.shape:
                one.weight.add_(torch.tensordot(one.delta, one.vectors, 1))
                continue
            for delta, vector in zip(one.delta, one.vectors, strict=True):
                one.weight.addcmul_(delta, vector)

    def freeze(self) -> None:
        """Ends training."""
        for one in self._trained:
            one.weight.requires_grad_(False)
            one.weight.grad = None


class ElementCoefficients:
    """One coefficient for every element of every task vector, never in memory: see [`CoefficientAdam`].

    Args:
        module (`torch.nn.Module`): The block; its parameters hold θ_init and are changed in place by [`~ElementCoefficients.update`].
        groups (`Mapping[str, TensorGroup]`): The parameters to train, by name within the block.
        adam (`Mapping[str, Any]`): `lr`, `betas` and `eps`.
    """

    def __init__(self, module: nn.Module, groups: Mapping[str, TensorGroup], adam: Mapping[str, Any]):
        self._start: dict[str, Tensor] = {}
        self._weights: dict[str, nn.Parameter] = {}
        vectors = []
        for name, group in groups.items():
            weight = module.get_parameter(name)
            found = stacked_vectors(group, weight)
            if bool(found.any()):
                self._weights[name] = weight.requires_grad_(True)
                self._start[name] = weight.detach().clone()
                vectors.append(found)
        self.optimizer = CoefficientAdam(list(self._weights.values()), vectors, **adam) if vectors else None

    def gradients(self) -> dict[str, Tensor]:
        """The gradients of the weights that have one, by name."""
        return {name: weight.grad for name, weight in self._weights.items() if weight.grad is not None}

    def update(self, gradients: Mapping[str, Tensor]) -> None:
        """Makes one step and clears the gradients.

        Args:
            gradients (`Mapping[str, torch.Tensor]`): Of the weights, as [`~ElementCoefficients.gradients`] gives them.
        """
        for name, weight in self._weights.items():
            weight.grad = gradients.get(name)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def changes(self) -> dict[str, dict[str, list[float]]]:
        """Mean and standard deviation of each expert's δ, by parameter, for the report."""
        return {
            name: moments(self.optimizer.coefficients(weight, self._start[name]))
            for name, weight in self._weights.items()
        }

    def freeze(self) -> None:
        """Ends training."""
        for weight in self._weights.values():
            weight.requires_grad_(False)
            weight.grad = None


class SharedCoefficients:
    """One coefficient for every tensor or task vector of a block: [`Coefficients`] with their Adam.

    Args:
        module (`torch.nn.Module`), groups (`Mapping[str, TensorGroup]`), granularity (`str`): See [`Coefficients`].
        adam (`Mapping[str, Any]`): `lr`, `betas` and `eps`.
    """

    def __init__(
        self, module: nn.Module, groups: Mapping[str, TensorGroup], granularity: str, adam: Mapping[str, Any]
    ):
        self._coefficients = Coefficients(module, groups, granularity)
        self._tensors = self._coefficients.tensors
        self.optimizer = torch.optim.Adam(self._tensors, **adam) if self._tensors else None
        self.changes, self.freeze = self._coefficients.changes, self._coefficients.freeze

    def gradients(self) -> dict[int, Tensor]:
        """The gradients of the coefficients, by number; clears those of the weights."""
        self._coefficients.collect_gradients()
        return dict(enumerate(tensor.grad for tensor in self._tensors))

    def update(self, gradients: Mapping[int, Tensor]) -> None:
        """Makes one step.

        Args:
            gradients (`Mapping[int, torch.Tensor]`): Of the coefficients, as [`~SharedCoefficients.gradients`] gives them.
        """
        for number, gradient in gradients.items():
            self._tensors[number].grad = gradient
        self.optimizer.step()
        self._coefficients.apply()


def stacked_vectors(group: TensorGroup, weight: Tensor) -> Tensor:
    """The task vectors (experts, *shape) in the dtype and on the device of a weight."""
    vectors = torch.empty((len(group), *weight.shape), dtype=weight.dtype, device=weight.device)
    for row, vector in zip(vectors, group.task_vectors(), strict=True):
        row.copy_(vector)
    return vectors


def moments(coefficients: Iterable[Tensor]) -> dict[str, list[float]]:
    """Mean and standard deviation of each expert's coefficients."""
    found: dict[str, list[float]] = {"mean": [], "std": []}
    for one in coefficients:
        found["mean"].append(float(one.double().mean()))
        found["std"].append(float(one.double().std(correction=0)))
    return found
