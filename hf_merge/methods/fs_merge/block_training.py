"""FS-Merge one block after another: every block's factors are trained on what the merged model's own earlier blocks hand to it, so
that a linear map of its outputs gives those of the expert's block.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from ..backbone_blocks import BackboneBlock, BackbonePart
from .features import variance_of
from .least_squares import LeastSquares
from .optimization import Updates
from .supernet import Supernet
from .weights import FoldedWeights, TrainedWeights


def train_block(block: BackboneBlock, scales: Sequence[float]) -> None:
    """Merges a block.

    Args:
        block ([`BackboneBlock`]): The block.
        scales (`Sequence[float]`): The multiple of the identity that every expert's M starts as.
    """
    settings = block.settings
    shapes = {name: value.shape for name, value in block.student.named_parameters()}
    device = next(block.student.parameters()).device
    supernet = Supernet(
        block.topology, block.experts, shapes, scales, settings.form, settings.rank, block.head_sizes, block.seed
    ).to(device)
    weights = FoldedWeights(block, supernet)
    weights.refresh()
    train_part(block, weights)


def train_part(part: BackbonePart, weights: TrainedWeights) -> None:
    """Trains a part of the backbone, from maps that fit its outputs as they are in the beginning."""
    for task, output_map in enumerate(part.maps):
        if output_map is not None:
            fit = LeastSquares(output_map.in_features, output_map.out_features, output_map.bias is not None)
            for found, target in part.batches.pairs(task):
                fit.add(found, target)
            output_map.set_values(*fit.solve(output_map.weight))
    part.report |= PartTraining(part, weights).run()
    part.student.requires_grad_(False)


class PartTraining:
    """Minimises Σ_i ‖U_i f(z) − y_i‖² / variance over the batches of a part.

    Args:
        part ([`BackbonePart`]): What is trained; its settings are a [`FsMergeConfig`].
        weights ([`TrainedWeights`]): What is trained in it.
    """

    def __init__(self, part: BackbonePart, weights: TrainedWeights):
        self.part, self.weights, self.settings = part, weights, part.settings
        self.steps = math.ceil(max(part.batches.counts) / part.accumulation)
        maps = [one for one in part.maps if one is not None]
        total = self.settings.epochs * self.steps
        self.updates = Updates(self.settings, weights, maps, self.settings.learning_rates(), total)
        tasks = range(len(part.maps))
        self.scales = [variance_of([target for _, target in self._targets(task)]) for task in tasks]

    def run(self) -> dict[str, Any]:
        """Trains until the epochs are over or a callback ends it. Returns the losses."""
        monitor, epochs = self.part.monitor, self.settings.epochs
        monitor.begin_block(self.part.name, self.part.student, self.updates.optimizer, epochs, self.steps)
        generator = self.part.random("order")
        losses: list[float] = []
        for epoch in range(epochs):
            losses.append(self._epoch(epoch, generator))
            if monitor.end_epoch(losses[-1]):
                break
        self.updates.keep_average()
        return {"first_loss": losses[0], "last_loss": losses[-1], "epochs": len(losses)}

    def _targets(self, task: int) -> Iterator[tuple[int, Tensor]]:
        for index in range(self.part.batches.counts[task]):
            yield index, self.part.batches.target(task, index)

    def _epoch(self, epoch: int, generator: np.random.Generator) -> float:
        """One pass over the batches. Returns its mean loss per update."""
        monitor, total = self.part.monitor, 0.0
        monitor.begin_epoch()
        orders = [generator.permutation(count) for count in self.part.batches.counts]
        for step in range(self.steps):
            monitor.begin_step()
            loss = self.updates.make(epoch * self.steps + step, self._losses(orders, step))
            total += loss
            if monitor.end_step(loss, self.updates.learning_rate):
                break
        return total / (step + 1)

    def _losses(self, orders: Sequence[np.ndarray], step: int) -> Iterator[Tensor]:
        """The losses of an update, batch by batch. A task with fewer batches begins again."""
        size = self.part.accumulation
        for part in range(size):
            for task, order in enumerate(orders):
                yield self._loss(task, int(order[(step * size + part) % len(order)])) / size

    def _loss(self, task: int, index: int) -> Tensor:
        found, target = self.part.batches.predict(task, index), self.part.batches.target(task, index)
        output_map = self.part.maps[task]
        found = found if output_map is None else output_map(found)
        return (found - target).square().mean() / self.scales[task]
