"""The training of a merged backbone on the experts' features: the loop that `fs_merge` and `kd` share. The two differ in what is
trained ([`TrainedWeights`]); data, losses and schedule are the same.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..backbone_base import BackboneGroup
from .features import captured, mean_square, real_rows, variance_of
from .least_squares import MapFits
from .optimization import Updates
from .states import Best
from .weights import TrainedWeights


_SAMPLES_OF_VARIANCE = 64


class FeatureTraining:
    """Minimises Σ_i ‖U_i f(x) − f_i(x)‖² / variance, over samples x of task i only.

    Args:
        group ([`BackboneGroup`]): What is merged; its settings are a [`FeatureTrainingConfig`].
        weights ([`TrainedWeights`]): What is trained.
        epochs (`int`): Passes over the samples.
        learning_rates (`Mapping[str, float]`): For `"matrix"`, `"vector"` and `"output"`.
        label (`str`): What callbacks and the report call this run.
        fit_maps (`bool`): Whether maps begin with least-squares values; not where they are trained already.
    """

    def __init__(
        self,
        group: BackboneGroup,
        weights: TrainedWeights,
        epochs: int,
        learning_rates: Mapping[str, float],
        label: str,
        fit_maps: bool = False,
    ):
        self.group, self.weights, self.settings, self.label = group, weights, group.settings, label
        self.source = group.source
        self.epochs = epochs
        self.rows, self.held_out = self._split()
        self._sites = self._inner_sites()
        if self._sites:
            self._add_probes()
        self._maps = [one for one in group.maps if one is not None]
        if fit_maps:
            self._fit_maps()
        size = self.settings.batch_size * group.accumulation
        self.steps = math.ceil(max(len(rows) for rows in self.rows) / size)
        self.updates = Updates(self.settings, weights, self._maps, learning_rates, epochs * self.steps)
        self.scales = [self._variances(task) for task in range(len(group))]

    def run(self) -> dict[str, Any]:
        """Trains until the epochs are over, a callback ends it, or the held-out loss stops falling. The best state by that loss is
        kept. Returns the losses."""
        monitor = self.group.monitor
        monitor.begin_block(self.label, self.group.student, self.updates.optimizer, self.epochs, self.steps)
        generator = self.group.random(self.label, "order")
        losses: list[float] = []
        best = Best(self.settings.early_stopping_patience)
        for epoch in range(self.epochs):
            losses.append(self._epoch(epoch, generator))
            watched = self.evaluate() if self.held_out else losses[-1]
            if monitor.end_epoch(watched) or (self.held_out and best.is_over(watched, self.updates.average.values)):
                break
        best.restore(self.updates.average.values)
        self.updates.keep_average()
        return {"first_loss": losses[0], "last_loss": losses[-1], "epochs": len(losses)} | best.report()

    # -- samples --------------------------------------------------------------------------------------------------

    def _split(self) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """The rows to train on and those held out, by task."""
        rows, held_out = [], []
        for name, count in zip(self.group.expert_names, self.source.counts, strict=False):
            order = self.group.random("validation", name).permutation(count)
            size = min(round(self.settings.validation_split * count), count - 1)
            held_out.append(np.sort(order[:size]))
            rows.append(np.sort(order[size:]))
        return rows, held_out if all(len(one) for one in held_out) else []

    def _batches(self, orders: Sequence[np.ndarray], step: int) -> Iterator[tuple[int, np.ndarray]]:
        """The batches of an update. A task with fewer samples begins again."""
        size = self.settings.batch_size
        for part in range(self.group.accumulation):
            for task, order in enumerate(orders):
                first = (step * self.group.accumulation + part) * size
                wanted = np.arange(first, first + min(size, len(order))) % len(order)
                yield task, order[wanted]

    # -- training -------------------------------------------------------------------------------------------------

    def _epoch(self, epoch: int, generator: np.random.Generator) -> float:
        """One pass over the samples. Returns its mean loss per update."""
        monitor = self.group.monitor
        monitor.begin_epoch()
        orders = [generator.permutation(rows) for rows in self.rows]
        total = 0.0
        for step in range(self.steps):
            monitor.begin_step()
            loss = self.updates.make(epoch * self.steps + step, self._losses(orders, step, generator))
            total += loss
            if monitor.end_step(loss, self.updates.learning_rate):
                break
        return total / (step + 1)

    def _losses(self, orders: Sequence[np.ndarray], step: int, generator: np.random.Generator) -> Iterator[Tensor]:
        """The losses of an update, batch by batch."""
        for task, rows in self._batches(orders, step):
            yield self._loss(task, self.source.inputs(task, rows, generator)) / self.group.accumulation

    # -- the loss -------------------------------------------------------------------------------------------------

    def _loss(self, task: int, inputs: Mapping[str, Tensor]) -> Tensor:
        mask = inputs.get("attention_mask")
        with captured(self.group.modules[task], self._sites) as theirs:
            output = self.source.run_expert(task, inputs)
            target = self.group.features(task, output)
        with captured(self.group.student, self._sites) as ours:
            found = self.group.features(task, self.source.run_student(inputs))
        if self.group.maps[task] is not None:
            found = self.group.maps[task](found)
        variance, inner_variances = self.scales[task]
        loss = self.settings.feature_weight * mean_square(found - target, mask) / variance
        if self.settings.logit_weight and self.group.taps[task] is not None:
            loss = loss + self.settings.logit_weight * self._divergence(task, inputs, output, found, target, mask)
        for name in self._sites:
            mapped = self.weights.inner(name, task, ours[name].float(), theirs[name].shape[-1])
            error = mean_square(mapped - theirs[name].float(), mask) / inner_variances[name]
            loss = loss + self.settings.inner_weight / len(self._sites) * error
        return loss

    def _divergence(
        self, task: int, inputs: Mapping[str, Tensor], output: Any, found: Tensor, target: Tensor, mask: Tensor | None
    ) -> Tensor:
        """KL(p ‖ q) of the predictions p that the expert's head makes of its own features, and q of the merged ones."""
        with torch.no_grad():
            expected = self.source.predict(task, inputs, output, target).log_softmax(-1)
        predicted = self.source.predict(task, inputs, output, found).log_softmax(-1)
        return real_rows(expected.exp() * (expected - predicted), mask).sum(-1).mean()

    @torch.no_grad()
    def evaluate(self) -> float:
        """The loss of the averaged weights on the held-out samples, all in one pass. They are augmented in the same way every
        time: what a masked language model is trained on has masks."""
        generator = self.group.random(self.label, "held-out")
        total = 0.0
        with self.updates.average.applied():
            self.weights.refresh()
            for task, rows in enumerate(self.held_out):
                for start in range(0, len(rows), self.settings.batch_size):
                    part = rows[start : start + self.settings.batch_size]
                    loss = self._loss(task, self.source.inputs(task, part, generator))
                    total += float(loss) * len(part) / len(rows)
        return total

    @torch.no_grad()
    def _variances(self, task: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The variance of a task's features and of what its layers read, over some batches."""
        targets: list[Tensor] = []
        inner: dict[str, list[Tensor]] = {name: [] for name in self._sites}
        rows = self.rows[task][:_SAMPLES_OF_VARIANCE]
        for start in range(0, len(rows), self.settings.batch_size):
            inputs = self.source.inputs(task, rows[start : start + self.settings.batch_size], None)
            mask = inputs.get("attention_mask")
            with captured(self.group.modules[task], self._sites) as theirs:
                targets.append(real_rows(self.group.features(task, self.source.run_expert(task, inputs)), mask))
            for name, value in theirs.items():
                inner[name].append(real_rows(value.float(), mask))
        return variance_of(targets), {name: variance_of(values) for name, values in inner.items()}

    def _inner_sites(self) -> dict[str, str]:
        """The first layer of every group that reads one tensor, by group, where inner features are compared."""
        if not self.settings.inner_weight:
            return {}
        return {str(group): names[0] for group, names in self.group.topology.readers().items()}

    def _add_probes(self) -> None:
        shapes = {}
        for name, layer in self._sites.items():
            axis = 0 if self.group.topology.linears[layer].transposed else 1
            shapes[name] = (f"{layer}.weight", axis)
        widths = {
            n: [expert[weight].shape[axis] for expert in self.group.experts] for n, (weight, axis) in shapes.items()
        }
        merged = self.group.shapes()
        self.weights.add_probes(widths, {n: merged[weight][axis] for n, (weight, axis) in shapes.items()})

    # -- the start ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _fit_maps(self) -> None:
        """Gives the maps to the experts' features, and those inside that play no part yet, their least-squares values."""
        self.weights.refresh()
        unfitted = self.weights.unfitted()
        readers = {str(group): names[0] for group, names in self.group.topology.readers().items()}
        for task, output_map in enumerate(self.group.maps):
            sites = {name: layer for name, layer in readers.items() if task in unfitted.get(name, ())}
            fits = self._map_fits(task, sites)
            if output_map is not None:
                output_map.set_values(*fits.solve("", output_map.weight))
            for name in sites:
                self.weights.fit(name, task, fits.solve(name, None)[0].to(self.group.device))

    def _map_fits(self, task: int, sites: Mapping[str, str]) -> MapFits:
        """One pass over a task's samples: the features, called `""`, and what the layers of the sites read."""
        generator, size = self.group.random(self.label, "maps"), self.settings.batch_size
        fits, rows = MapFits(), self.rows[task]
        for start in range(0, len(rows), size):
            inputs = self.source.inputs(task, rows[start : start + size], generator)
            mask = inputs.get("attention_mask")
            with captured(self.group.modules[task], sites) as theirs:
                theirs[""] = self.group.features(task, self.source.run_expert(task, inputs))
            with captured(self.group.student, sites) as ours:
                ours[""] = self.group.features(task, self.source.run_student(inputs))
            for name, value in ours.items():
                fits.add(name, real_rows(value.float(), mask), real_rows(theirs[name].float(), mask), name == "")
        return fits
