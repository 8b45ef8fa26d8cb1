"""The training loop of the methods that train through the whole model: Adam on a sum of losses, one for each task."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from .base import FLOAT32
from .model_base import ModelGroup


def memory_of_weights(sizes: Sequence[int]) -> int:
    """Bytes that training the weights themselves takes: their gradients and Adam's two moments, float32."""
    return 3 * FLOAT32 * sum(sizes)


def memory_of_coefficients(sizes: Sequence[int], experts: int, granularity: str) -> int:
    """Bytes that training coefficients takes: the start, the task vectors and the weights' gradients, float32; with one coefficient for
    every element also these, their gradients and Adam's two moments, for every expert.

    Args:
        sizes (`Sequence[int]`): The entries of each parameter.
        experts (`int`): The number of experts.
        granularity (`str`): `"element"`, `"tensor"` or `"task"`.
    """
    per_expert = 5 if granularity == "element" else 1
    return (2 + per_expert * experts) * FLOAT32 * sum(sizes)


BatchLoss = Callable[[int, int], Tensor]
"""The loss of one batch, `(task, index)`: differentiable, without dimensions."""


class ModelTraining:
    """Minimises Σ_tasks of the losses of their batches.

    An update takes `group.accumulation` batches of every task that has as many left. Gradients of the merged model's parameters
    are turned into those of the trained tensors by `collect`, and the trained tensors into parameters by `apply`.

    Args:
        group ([`ModelGroup`]): What is trained; its settings are a [`ModelTrainingConfig`].
        tensors (`Sequence[torch.Tensor]`): What the optimizer changes.
        loss (`Callable`): Of one batch.
        collect, apply (`Callable`, *optional*): Called before and after each update, where the trained tensors are not the
            parameters themselves.
    """

    def __init__(
        self,
        group: ModelGroup,
        tensors: Sequence[Tensor],
        loss: BatchLoss,
        collect: Callable[[], None] | None = None,
        apply: Callable[[], None] | None = None,
    ):
        self.group = group
        self.settings = settings = group.settings
        self.loss = loss
        self.optimizer = torch.optim.Adam(
            tensors,
            lr=settings.learning_rate,
            betas=(settings.adam_beta1, settings.adam_beta2),
            eps=settings.adam_epsilon,
            fused=True,
        )
        self._collect = collect or _nothing
        self._apply = apply or _nothing
        self.batches = group.models.batches
        self.steps = math.ceil(max(self.batches) / group.accumulation)

    def run(self) -> None:
        """Trains until the epochs are over or a callback ends it; reports the losses."""
        monitor, settings = self.group.monitor, self.settings
        monitor.begin_block("model", self.group.model, self.optimizer, settings.epochs, self.steps)
        generator = self.group.random("order")
        losses: list[float] = []
        for epoch in range(settings.epochs):
            losses.append(self._epoch(epoch, generator))
            if monitor.end_epoch(losses[-1]):
                break
        self.group.report.update(first_loss=losses[0], last_loss=losses[-1], epochs=len(losses))

    def _epoch(self, epoch: int, generator: np.random.Generator) -> float:
        """One pass over the samples. Returns its mean loss per update."""
        monitor = self.group.monitor
        monitor.begin_epoch()
        orders = [generator.permutation(count) for count in self.batches]
        total = 0.0
        for step in range(self.steps):
            monitor.begin_step()
            loss = self._backward(orders, step)
            rate = self._learning_rate(epoch * self.steps + step)
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            self._collect()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self._apply()
            total += loss
            if monitor.end_step(loss, rate):
                break
        return total / (step + 1)

    def _backward(self, orders: Sequence[np.ndarray], step: int) -> float:
        """Adds up the gradients of one update. Returns its loss."""
        total = 0.0
        for task, index in self._of_step(orders, step):
            loss = self.loss(task, index)
            loss.backward()
            total += float(loss.detach())
        return total

    def _of_step(self, orders: Sequence[np.ndarray], step: int) -> Iterator[tuple[int, int]]:
        count = self.group.accumulation
        for task, order in enumerate(orders):
            for index in order[step * count : (step + 1) * count]:
                yield task, int(index)

    def _learning_rate(self, step: int) -> float:
        rate = self.settings.learning_rate
        if self.settings.lr_scheduler == "cosine":
            rate *= 0.5 * (1 + math.cos(math.pi * step / (self.settings.epochs * self.steps)))
        return rate


def _nothing() -> None:
    pass
