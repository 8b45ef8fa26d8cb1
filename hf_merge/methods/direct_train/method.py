"""Supervised training of the merged backbone on labelled samples of all tasks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..model_base import ModelGroup, ModelMethod
from ..model_training import ModelTraining, memory_of_weights


class DirectTrain(ModelMethod):
    """min_θ Σ_i mean_{(x, y) ∈ D_i} L_i(x, y; θ) with the loss that transformers gives the expert's class, from the merged start.

    Heads that are kept per task are frozen: they are saved as they are.
    """

    requires_labels = True

    @classmethod
    def working_memory(cls, sizes: Sequence[int], experts: int, settings: Any) -> int:
        return memory_of_weights(sizes)

    def merge(self, group: ModelGroup) -> None:
        weights = [weight.requires_grad_(True) for weight in group.weights().values()]

        def loss(task: int, index: int) -> Tensor:
            inputs = group.models.inputs(task, index)
            return group.models.run(group.models.student(task), inputs.arguments | {"labels": inputs.labels}).loss

        ModelTraining(group, weights, loss).run()
