"""Fisher-weighted averaging: θ = Σ w_i F_i θ_i / Σ w_i F_i with the diagonal Fisher information F_i (arXiv 2111.09832)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..base import FLOAT32
from ..model_base import ModelGroup, ModelInputs, ModelMethod
from ..model_outputs import run_logits


class Fisher(ModelMethod):
    """F_i = mean_x E_{y ~ p_i(y | x)} (∂ log p_i(y | x) / ∂θ)², from the gradients of single samples, under the expert's own head."""

    @classmethod
    def working_memory(cls, sizes: Sequence[int], experts: int, settings: Any) -> int:
        # Both sums, an expert, its Fisher and the gradients of one sample.
        return 5 * FLOAT32 * sum(sizes)

    @classmethod
    def batch_size(cls, settings: Any) -> int:
        return 1

    def merge(self, group: ModelGroup) -> None:
        totals: dict[str, Tensor] = {}
        weighted: dict[str, Tensor] = {}
        for task in range(len(group)):
            fisher = diagonal_fisher(group, task)
            scale = root_mean_square(fisher.values()) if group.settings.normalize else 1.0
            for name, parameter in group.parameters.items():
                importance = fisher.pop(name).div_(scale or 1.0).add_(parameter.settings.epsilon)
                importance.mul_(parameter.settings.weights[task])
                # Relative to the start: where all experts agree, the result is exact.
                difference = (parameter.expert(task) - group.model.get_parameter(name)).mul_(importance)
                totals[name] = totals[name].add_(importance) if name in totals else importance
                weighted[name] = weighted[name].add_(difference) if name in weighted else difference
            group.report[f"fisher_scale.{group.expert_names[task]}"] = scale
        for name, total in totals.items():
            update = torch.where(total > 0, weighted[name] / total, 0)
            group.assign(name, group.model.get_parameter(name) + update)


def diagonal_fisher(group: ModelGroup, task: int) -> dict[str, Tensor]:
    """The diagonal Fisher of an expert, float32, by the merged model's names; 0 for parameters that its predictions do not use."""
    models = group.models
    generator = group.random(f"labels of {group.expert_names[task]}")
    with models.expert(task) as expert:
        weights = {name: expert.get_parameter(models.expert_parameter(task, name)) for name in group.parameters}
        for weight in weights.values():
            weight.requires_grad_(True)
        fisher = {name: torch.zeros_like(weight) for name, weight in weights.items()}
        count = 0
        for inputs in models.samples(task):
            _add_sample(fisher, weights, _terms(group, expert, inputs, generator))
            count += inputs.count
    return {name: value.div_(count) for name, value in fisher.items()}


def _add_sample(
    fisher: dict[str, Tensor], weights: dict[str, nn.Parameter], terms: Iterator[tuple[Tensor, float]]
) -> None:
    """Adds Σ_y p(y | x) (∂ log p(y | x) / ∂θ)² of one sample."""
    for likelihood, probability in terms:
        likelihood.backward(retain_graph=True)
        for name, weight in weights.items():
            if weight.grad is not None:
                fisher[name].addcmul_(weight.grad, weight.grad, value=probability)
                weight.grad = None


def _terms(
    group: ModelGroup, expert: nn.Module, inputs: ModelInputs, generator: np.random.Generator
) -> Iterator[tuple[Tensor, float]]:
    """`(log p(y | x), weight)` for the labels y of one sample: all classes, or as many as are drawn."""
    logits = run_logits(group.models, expert, inputs)
    likelihoods = torch.log_softmax(inputs.masked(logits), dim=-1)
    draws = group.settings.draws
    if draws is None and logits.dim() == 2:
        for likelihood in likelihoods[0]:
            yield likelihood, float(likelihood.detach().exp())
        return
    probabilities = likelihoods.detach().exp()
    for _ in range(draws or 1):
        labels = draw(probabilities, generator)
        yield likelihoods.gather(-1, labels).sum(), 1 / (draws or 1)


def draw(probabilities: Tensor, generator: np.random.Generator) -> Tensor:
    """One label for each row of `probabilities` (rows, classes), as (rows, 1); the same on every device."""
    uniform = torch.from_numpy(generator.random((len(probabilities), 1), dtype=np.float32))
    steps = probabilities.cumsum(-1)
    labels = torch.searchsorted(steps, uniform.to(steps) * steps[:, -1:])
    return labels.clamp_(max=probabilities.shape[-1] - 1)


def root_mean_square(tensors: Iterator[Tensor]) -> float:
    """Over all entries."""
    squares, count = 0.0, 0
    for tensor in tensors:
        squares += float(torch.linalg.vector_norm(tensor, dtype=torch.float64)) ** 2
        count += tensor.numel()
    return (squares / max(count, 1)) ** 0.5
