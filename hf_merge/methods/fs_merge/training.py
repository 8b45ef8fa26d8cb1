"""The training of a merged backbone on the experts' features: the loop that `fs_merge` and `kd` share. The two differ in what is
trained ([`TrainedWeights`]); data, losses and schedule are the same.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..backbone_base import BackboneGroup, OutputMap
from .supernet import Supernet


_SAMPLES_OF_VARIANCE = 64


class TrainedWeights:
    """What is trained, and how it becomes the parameters of the merged backbone. This one trains the parameters themselves.

    Args:
        group ([`BackboneGroup`]): What is merged.
    """

    def __init__(self, group: BackboneGroup):
        self.group = group
        group.student.requires_grad_(True)
        self._probes = nn.ModuleDict()

    def groups(self) -> dict[str, list[nn.Parameter]]:
        """The trained tensors by learning rate: `"matrix"` and `"vector"`."""
        groups: dict[str, list[nn.Parameter]] = {"matrix": [], "vector": []}
        for parameter in self.group.student.parameters():
            groups["vector" if parameter.ndim == 1 else "matrix"].append(parameter)
        groups["matrix"] += self._probes.parameters()
        return groups

    def refresh(self) -> None:
        """Writes the merged parameters into the backbone."""

    def collect(self) -> None:
        """Turns the gradients of the backbone's parameters into those of the trained tensors."""

    def inner(self, name: str, task: int, hidden: Tensor, width: int) -> Tensor:
        """What the merged channels that a layer reads correspond to in an expert: a map that is trained along and thrown away.

        Args:
            name (`str`): The group of layers.
            task (`int`): The expert.
            hidden (`torch.Tensor`): (..., merged channels).
            width (`int`): The expert's channels.
        """
        return self._probes[f"{name}:{task}"](hidden)

    def add_probes(self, widths: Mapping[str, Sequence[int]], merged: Mapping[str, int]) -> None:
        """Makes the maps of [`~TrainedWeights.inner`] where there are none."""
        for name, experts in widths.items():
            for task, width in enumerate(experts):
                self._probes[f"{name}:{task}"] = OutputMap(merged[name], width, False)
        self._probes.to(next(self.group.student.parameters()).device)


class FoldedWeights(TrainedWeights):
    """Trains the factors of a supernet. The backbone's parameters are leaves of autograd: their gradients, gathered over all
    batches of an update, go back through the fold once.

    Args:
        group ([`BackboneGroup`]): What is merged.
        supernet ([`Supernet`]): Of the experts.
    """

    def __init__(self, group: BackboneGroup, supernet: Supernet):
        super().__init__(group)
        self.supernet = supernet
        self._folded: dict[str, Tensor] = {}

    def groups(self) -> dict[str, list[nn.Parameter]]:
        return self.supernet.parameter_groups()

    def refresh(self) -> None:
        self._folded = self.supernet.fold()
        self.group.assign(self._folded)

    def collect(self) -> None:
        weights = {name: self.group.student.get_parameter(name) for name in self._folded}
        reached = [
            name for name, weight in weights.items() if weight.grad is not None and self._folded[name].requires_grad
        ]
        torch.autograd.backward([self._folded[name] for name in reached], [weights[name].grad for name in reached])
        for weight in weights.values():
            weight.grad = None

    def inner(self, name: str, task: int, hidden: Tensor, width: int) -> Tensor:
        """U_i x: what expert i's layers read in the supernet."""
        factor = self.supernet.inputs[name][task]
        return factor.left(hidden.reshape(-1, hidden.shape[-1]).mT).mT.reshape(*hidden.shape[:-1], -1)

    def add_probes(self, widths: Mapping[str, Sequence[int]], merged: Mapping[str, int]) -> None:
        """The supernet has such maps already."""


class FeatureTraining:
    """Minimises Σ_i ‖U_i f(x) − f_i(x)‖² / variance, over samples x of task i only.

    Args:
        group ([`BackboneGroup`]): What is merged; its settings are a [`FeatureTrainingConfig`].
        weights ([`TrainedWeights`]): What is trained.
        epochs (`int`): Passes over the samples.
        learning_rates (`Mapping[str, float]`): For `"matrix"`, `"vector"` and `"output"`.
        label (`str`): What callbacks and the report call this run.
    """

    def __init__(
        self,
        group: BackboneGroup,
        weights: TrainedWeights,
        epochs: int,
        learning_rates: Mapping[str, float],
        label: str,
    ):
        self.group, self.weights, self.settings, self.label = group, weights, group.settings, label
        self.source = group.source
        self.epochs = epochs
        self.rows, self.held_out = self._split()
        self._sites = self._inner_sites()
        if self._sites:
            self._add_probes()
        self._maps = [one for one in group.maps if one is not None]
        self.optimizer = self._make_optimizer(learning_rates)
        size = self.settings.batch_size * group.accumulation
        self.steps = math.ceil(max(len(rows) for rows in self.rows) / size)
        self.scales = [self._variances(task) for task in range(len(group))]

    def run(self) -> dict[str, Any]:
        """Trains until the epochs are over, a callback ends it, or the held-out loss stops falling. The best state by that loss is
        kept. Returns the losses."""
        monitor = self.group.monitor
        monitor.begin_block(self.label, self.group.student, self.optimizer, self.epochs, self.steps)
        generator = self.group.random(self.label, "order")
        losses: list[float] = []
        best = _Best(self.settings.early_stopping_patience, [self.weights, *self._maps])
        for epoch in range(self.epochs):
            losses.append(self._epoch(epoch, generator))
            watched = self.evaluate() if self.held_out else losses[-1]
            if monitor.end_epoch(watched) or (self.held_out and best.is_over(watched, self._trained())):
                break
        best.restore(self._trained())
        self.weights.refresh()
        return {"first_loss": losses[0], "last_loss": losses[-1], "epochs": len(losses)} | best.report()

    def _trained(self) -> list[Tensor]:
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

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
            total += (loss := self._update(orders, step, generator, epoch * self.steps + step))
            if monitor.end_step(loss, self.optimizer.param_groups[0]["lr"]):
                break
        return total / (step + 1)

    def _update(self, orders: Sequence[np.ndarray], step: int, generator: np.random.Generator, count: int) -> float:
        factor = self._schedule(count)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * factor
        self.optimizer.zero_grad()
        self.weights.refresh()
        total = 0.0
        for task, rows in self._batches(orders, step):
            loss = self._loss(task, self.source.inputs(task, rows, generator)) / self.group.accumulation
            loss.backward()
            total += float(loss.detach())
        self.weights.collect()
        if self.settings.max_grad_norm:
            nn.utils.clip_grad_norm_(self._trained(), self.settings.max_grad_norm)
        self.optimizer.step()
        return total

    def _schedule(self, step: int) -> float:
        """The part of the peak learning rate: a linear warm-up, then a cosine to zero or a constant."""
        total = self.epochs * self.steps
        warm_up = self.settings.warmup_ratio * total
        if step < warm_up:
            return (step + 1) / (warm_up + 1)
        if self.settings.lr_scheduler == "constant":
            return 1.0
        return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(total - warm_up, 1)))

    def _make_optimizer(self, learning_rates: Mapping[str, float]) -> torch.optim.Optimizer:
        trained = self.weights.groups() | {"output": [p for one in self._maps for p in one.parameters()]}
        groups = [
            {"params": parameters, "lr": learning_rates[name], "peak": learning_rates[name]}
            for name, parameters in trained.items()
            if parameters
        ]
        betas = (self.settings.adam_beta1, self.settings.adam_beta2)
        return torch.optim.AdamW(groups, betas=betas, weight_decay=self.settings.weight_decay)

    # -- the loss -------------------------------------------------------------------------------------------------

    def _loss(self, task: int, inputs: Mapping[str, Tensor]) -> Tensor:
        mask = inputs.get("attention_mask")
        with self._captured(self.group.modules[task]) as theirs:
            output = self.source.run_expert(task, inputs)
            target = self.group.features(task, output)
        with self._captured(self.group.student) as ours:
            found = self.group.features(task, self.source.run_student(inputs))
        if self.group.maps[task] is not None:
            found = self.group.maps[task](found)
        variance, inner_variances = self.scales[task]
        loss = self.settings.feature_weight * _mean_square(found - target, mask) / variance
        if self.settings.logit_weight and self.group.taps[task] is not None:
            loss = loss + self.settings.logit_weight * self._divergence(task, inputs, output, found, target, mask)
        for name in self._sites:
            mapped = self.weights.inner(name, task, ours[name].float(), theirs[name].shape[-1])
            error = _mean_square(mapped - theirs[name].float(), mask) / inner_variances[name]
            loss = loss + self.settings.inner_weight / len(self._sites) * error
        return loss

    def _divergence(
        self, task: int, inputs: Mapping[str, Tensor], output: Any, found: Tensor, target: Tensor, mask: Tensor | None
    ) -> Tensor:
        """KL(p ‖ q) of the predictions p that the expert's head makes of its own features, and q of the merged ones."""
        with torch.no_grad():
            expected = self.source.predict(task, inputs, output, target).log_softmax(-1)
        predicted = self.source.predict(task, inputs, output, found).log_softmax(-1)
        return _rows(expected.exp() * (expected - predicted), mask).sum(-1).mean()

    @torch.no_grad()
    def evaluate(self) -> float:
        """The loss on the held-out samples, all in one pass and not augmented."""
        self.weights.refresh()
        total = 0.0
        for task, rows in enumerate(self.held_out):
            for start in range(0, len(rows), self.settings.batch_size):
                part = rows[start : start + self.settings.batch_size]
                loss = self._loss(task, self.source.inputs(task, part, None))
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
            with self._captured(self.group.modules[task]) as theirs:
                targets.append(_rows(self.group.features(task, self.source.run_expert(task, inputs)), mask))
            for name, value in theirs.items():
                inner[name].append(_rows(value.float(), mask))
        return _variance(targets), {name: _variance(values) for name, values in inner.items()}

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

    @contextmanager
    def _captured(self, backbone: nn.Module) -> Iterator[dict[str, Tensor]]:
        """What the layers of the inner sites read during a forward."""
        read: dict[str, Tensor] = {}
        with ExitStack() as stack:
            for name, layer in self._sites.items():
                hook = _reader(read, name)
                handle = backbone.get_submodule(layer).register_forward_pre_hook(hook)
                stack.callback(handle.remove)
            yield read


class _Best:
    """Watches the held-out loss and keeps the best state."""

    def __init__(self, patience: int | None, modules: Sequence[Any]):
        self.patience = patience
        self.loss = math.inf
        self._waited = 0
        self._state: list[Tensor] | None = None

    def is_over(self, loss: float, trained: Sequence[Tensor]) -> bool:
        if loss < self.loss:
            self.loss, self._waited = loss, 0
            self._state = [tensor.detach().clone() for tensor in trained]
        else:
            self._waited += 1
        return self.patience is not None and self._waited >= self.patience

    @torch.no_grad()
    def restore(self, trained: Sequence[Tensor]) -> None:
        if self._state is not None:
            for tensor, value in zip(trained, self._state, strict=True):
                tensor.copy_(value)

    def report(self) -> dict[str, float]:
        return {} if self._state is None else {"held_out_loss": self.loss}


def _reader(read: dict[str, Tensor], name: str):
    def hook(module: nn.Module, args: tuple) -> None:
        read[name] = args[0]

    return hook


def _rows(values: Tensor, mask: Tensor | None) -> Tensor:
    """The vectors of real tokens, (count, channels)."""
    if mask is None or values.ndim != 3 or mask.shape != values.shape[:2]:
        return values.reshape(-1, values.shape[-1])
    return values[mask.bool()]


def _mean_square(difference: Tensor, mask: Tensor | None) -> Tensor:
    return _rows(difference, mask).square().mean()


def _variance(parts: Sequence[Tensor]) -> Tensor:
    """The mean variance of the channels of (count, channels); the mean square of a single row."""
    rows = torch.cat(list(parts))
    spread = rows.var(0, correction=0).mean() if len(rows) > 1 else rows.square().mean()
    return spread.clamp_min(1e-12)
