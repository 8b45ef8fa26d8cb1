"""Distillation of the experts' last hidden states through the whole model: the baselines of ProDistill (arXiv 2502.12706)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..model_base import ModelGroup, ModelInputs, ModelMethod
from ..model_outputs import run_hidden, run_logits
from ..model_training import ModelTraining, memory_of_coefficients, memory_of_weights
from ..prodistill.coefficients import Coefficients
from ..prodistill.losses import Loss, cosine_distance, divergence, spread, squared_error, token_sums


class Distillation(ModelMethod):
    """What both methods have in common: the loss."""

    keeps_targets = True

    @classmethod
    def reads_logits(cls, settings: Any) -> bool:
        return settings.loss == "logits"


class DistillMerge(Distillation):
    """min_α Σ_i Σ_{x ∈ D_i} ‖h(x; α) − h_i(x)‖² with θ(α) = θ_init + Σ_i (α_i − α_init) ∘ τ_i and h the last hidden states."""

    requires_base = True

    @classmethod
    def working_memory(cls, sizes: Sequence[int], experts: int, settings: Any) -> int:
        return memory_of_coefficients(sizes, experts, settings.granularity)

    def merge(self, group: ModelGroup) -> None:
        loss = HiddenLoss(group)
        coefficients = Coefficients(group.model, group.parameters, group.settings.granularity)
        if coefficients.tensors:
            training = ModelTraining(
                group, coefficients.tensors, loss, coefficients.collect_gradients, coefficients.apply
            )
            training.run()
        coefficients.freeze()


class DirectDistill(Distillation):
    """min_θ Σ_i Σ_{x ∈ D_i} ‖h(x; θ) − h_i(x)‖², from the merged start."""

    @classmethod
    def working_memory(cls, sizes: Sequence[int], experts: int, settings: Any) -> int:
        return memory_of_weights(sizes)

    def merge(self, group: ModelGroup) -> None:
        loss = HiddenLoss(group)
        weights = [weight.requires_grad_(True) for weight in group.weights().values()]
        ModelTraining(group, weights, loss).run()


_DISTANCES: dict[str, Loss] = {
    "sse": squared_error,
    "relative": squared_error,
    "cosine": cosine_distance,
    "logits": divergence,
}


class HiddenLoss:
    """The distance of the merged model's last hidden states, or of its predictions, from the experts', which are computed once.

    Args:
        group ([`ModelGroup`]): Its settings are a [`DistillationConfig`].
    """

    def __init__(self, group: ModelGroup):
        self.models = group.models
        self.settings = group.settings
        self.distance = _DISTANCES[group.settings.loss]
        self.read = run_logits if group.settings.loss == "logits" else run_hidden
        self.targets = [self._targets(task) for task in range(len(group))]
        self.scales = [
            spread(token_sums(targets)) if group.settings.loss == "relative" else 1.0 for targets in self.targets
        ]

    @torch.no_grad()
    def _targets(self, task: int) -> list[Tensor]:
        """What the expert gives for every batch, (tokens, channels) on the CPU."""
        with self.models.expert(task) as expert:
            batches = [self.models.inputs(task, index) for index in range(self.models.batches[task])]
            return [self._rows(inputs, self.read(self.models, expert, inputs)).cpu() for inputs in batches]

    def __call__(self, task: int, index: int) -> Tensor:
        inputs = self.models.inputs(task, index)
        output = self._rows(inputs, self.read(self.models, self.models.student(task), inputs))
        return self.distance(output, self.targets[task][index].to(output.device)) / self.scales[task]

    def _rows(self, inputs: ModelInputs, hidden: Tensor) -> Tensor:
        return inputs.masked(hidden) if self.settings.mask_padding else hidden.reshape(-1, hidden.shape[-1])
