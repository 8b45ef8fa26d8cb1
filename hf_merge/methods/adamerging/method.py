"""AdaMerging: θ(λ) = θ_0 + Σ λ_i τ_i with λ that minimises the entropy of predictions on unlabelled samples (arXiv 2310.02575)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..base import FLOAT32, TensorGroup
from ..model_base import ModelGroup, ModelMethod
from ..model_outputs import mean_entropy, run_logits
from ..model_training import ModelTraining, memory_of_coefficients
from ..prodistill.coefficients import Coefficients
from ..ties.method import Ties


class AdaMerging(ModelMethod):
    """min_λ Σ_i mean_{x ∈ D_i} H(p(y | x; θ(λ))), each task under its own head."""

    requires_base = True

    @classmethod
    def working_memory(cls, sizes: Sequence[int], experts: int, settings: Any) -> int:
        return memory_of_coefficients(sizes, experts, settings.granularity)

    def merge(self, group: ModelGroup) -> None:
        settings = group.settings
        coefficients = Coefficients(group.model, self.directions(group), settings.granularity)
        if coefficients.tensors:
            low, high = -settings.init_scale, 1 - settings.init_scale

            def apply() -> None:
                for delta in coefficients.tensors if settings.clamp else ():
                    delta.detach().clamp_(low, high)
                coefficients.apply()

            training = ModelTraining(
                group, coefficients.tensors, _Entropy(group), coefficients.collect_gradients, apply
            )
            training.run()
        coefficients.freeze()
        self._report(group, coefficients)

    def directions(self, group: ModelGroup) -> Mapping[str, TensorGroup]:
        """The parameters, with task vectors that the coefficients belong to."""
        return group.parameters

    def _report(self, group: ModelGroup, coefficients: Coefficients) -> None:
        """λ_i = init_scale + δ_i of each parameter."""
        start = group.settings.init_scale
        for name, delta in coefficients.by_name().items():
            values = zip(group.expert_names, delta.tolist(), strict=True)
            group.parameters[name].report.update({f"coefficient.{expert}": start + value for expert, value in values})


class AdaMergingPlusPlus(AdaMerging):
    """AdaMerging on the task vectors that TIES adds up: trimmed, and 0 where their sign is not the elected one."""

    @classmethod
    def working_memory(cls, sizes: Sequence[int], experts: int, settings: Any) -> int:
        trimmed = experts * FLOAT32 * sum(sizes)
        return super().working_memory(sizes, experts, settings) + trimmed

    def directions(self, group: ModelGroup) -> Mapping[str, TensorGroup]:
        config = group.settings.initial_config()
        resolved = {
            name: replace(one, settings=config.resolve(name, 0.0, group.expert_names))
            for name, one in group.parameters.items()
        }
        ties = Ties()
        for round in range(ties.rounds(config)):
            ties.conclude(((name, ties.observe(one, round)) for name, one in resolved.items()), round, config)
        return {name: _around_zero(one, agreeing(ties, one)) for name, one in resolved.items()}


def agreeing(ties: Ties, group: TensorGroup) -> list[Tensor]:
    """The trimmed task vectors τ̂_i without the entries that lost the election."""
    sparsity = ties.prepare(group)
    vectors = ties.sparse_vectors(group, sparsity)
    return sparsity.election.agreeing(vectors)


def _around_zero(group: TensorGroup, vectors: list[Tensor]) -> TensorGroup:
    """A parameter whose task vectors are exactly the given ones."""
    return replace(group, stored_base=torch.zeros_like(vectors[0]), stored_experts=vectors)


class _Entropy:
    """The loss of one batch."""

    def __init__(self, group: ModelGroup):
        self.models = group.models

    def __call__(self, task: int, index: int) -> Tensor:
        inputs = self.models.inputs(task, index)
        return mean_entropy(inputs.masked(run_logits(self.models, self.models.student(task), inputs)))
