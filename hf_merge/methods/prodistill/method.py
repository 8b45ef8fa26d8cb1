"""ProDistill: each block is distilled from the experts' blocks, coefficients on the task vectors are trained
(arXiv 2502.12706, algorithm 1)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from ...registry import get_merge_method
from ..base import FLOAT32
from ..block_base import BlockGroup, BlockInputs, BlockMethod
from .coefficients import ElementCoefficients, SharedCoefficients
from .config import ProDistillConfig
from .losses import cosine_distance, spread, squared_error, token_sums


_LOSS = "the loss"
"""The key of a loss among gradients, whose keys are names of parameters or numbers."""


class ProDistill(BlockMethod):
    """min_α Σ_i Σ_{x ∈ D_i} ‖f(h; α) − f_i(h_i)‖² for each block: the student's input h comes from the merged model, the
    teacher's h_i from expert i."""

    requires_base = True

    @classmethod
    def working_memory(cls, shapes: Mapping[str, Sequence[int]], experts: int, settings: ProDistillConfig) -> int:
        sizes = [math.prod(shape) for shape in shapes.values()]
        moments = 2 if settings.granularity == "element" else 0
        loading = 2 * experts + 1  # the experts' blocks, their task vectors, the start
        training = experts + 2 + moments  # task vectors, the start, gradients, the optimizer's state
        reporting = (experts + 1 + moments) * sum(sizes) + (2 * experts + 5) * max(sizes, default=0)
        return FLOAT32 * max(loading * sum(sizes), training * sum(sizes), reporting)

    @classmethod
    def divides_samples(cls, settings: ProDistillConfig) -> bool:
        start = settings.start_config()
        method = get_merge_method(start.merge_type).method_cls
        return not issubclass(method, BlockMethod) or method.divides_samples(start)

    def skip_blocks(self, settings: ProDistillConfig, norms: Callable[[], Mapping[str, float]]) -> set[str]:
        if not settings.skip_blocks:
            return set()
        known = norms()
        return set(sorted(known, key=known.__getitem__)[: settings.skip_blocks])

    def merge_block(self, block: BlockGroup) -> None:
        start = block.settings.start_config()
        method = get_merge_method(start.merge_type).method_cls
        if issubclass(method, BlockMethod):
            method().merge_block(block.under(start))
        for task in range(len(block)):
            block.run_teacher(task)
        coefficients = _coefficients(block)
        block.release_experts()
        if coefficients.optimizer is not None:
            with torch.enable_grad():
                _Training(block, coefficients).run()
        for name, changes in coefficients.changes().items():
            block.parameters[name].report["coefficient_changes"] = changes
        coefficients.freeze()


def _coefficients(block: BlockGroup) -> ElementCoefficients | SharedCoefficients:
    settings: ProDistillConfig = block.settings
    adam = {
        "lr": settings.learning_rate,
        "betas": (settings.adam_beta1, settings.adam_beta2),
        "eps": settings.adam_epsilon,
    }
    if settings.granularity == "element":
        return ElementCoefficients(block.student, block.parameters, adam)
    return SharedCoefficients(block.student, block.parameters, settings.granularity, adam)


class _Training:
    """The training of one block. Several processes hold some rows of every batch each, and sum losses and gradients: an update is that
    of the whole batch."""

    def __init__(self, block: BlockGroup, coefficients: ElementCoefficients | SharedCoefficients):
        self.block = block
        self.settings: ProDistillConfig = block.settings
        self.coefficients = coefficients
        self.optimizer = coefficients.optimizer
        self.batches = block.activations.batches
        # One update takes `accumulation` batches of every task that has as many left.
        self.steps = math.ceil(max(self.batches) / block.accumulation)
        self.loss = cosine_distance if self.settings.loss == "cosine" else squared_error
        self.scales = [self._scale(task) for task in range(len(block))]

    def run(self) -> None:
        """Trains until the epochs are over or nothing is gained any more."""
        block, monitor, settings = self.block, self.block.monitor, self.settings
        monitor.begin_block(block.name, block.student, self.optimizer, settings.epochs, self.steps)
        generator = block.random("order")
        losses: list[float] = []
        best, waited = math.inf, 0
        for epoch in range(settings.epochs):
            losses.append(self._epoch(epoch, generator))
            if losses[-1] < best * (1 - settings.early_stopping_threshold):
                best, waited = losses[-1], 0
            else:
                waited += 1
            if monitor.end_epoch(losses[-1]):
                break
            if settings.early_stopping_patience is not None and waited >= settings.early_stopping_patience:
                break
        monitor.end_block()
        block.report.update(first_loss=losses[0], last_loss=self._evaluate(), epochs=len(losses))

    def _epoch(self, epoch: int, generator: np.random.Generator) -> float:
        """One pass over the samples. Returns its loss."""
        monitor = self.block.monitor
        monitor.begin_epoch()
        orders = [generator.permutation(count) for count in self.batches]
        total = 0.0
        for step in range(self.steps):
            monitor.begin_step()
            part = 0.0
            for inputs in self._of_step(orders, step):
                one = self._loss(inputs)
                one.backward()
                part += float(one.detach())
            summed = self.block.activations.all_reduce({_LOSS: _scalar(part), **self.coefficients.gradients()})
            loss = float(summed.pop(_LOSS))
            rate = self._learning_rate(epoch * self.steps + step)
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            self.coefficients.update(summed)
            del summed  # the gradients, before the next ones are made
            total += loss
            if monitor.end_step(loss, rate):
                break
        return total

    def _of_step(self, orders: list[np.ndarray], step: int) -> Iterator[BlockInputs]:
        count, activations = self.block.accumulation, self.block.activations
        for task, order in enumerate(orders):
            held = activations.held(task)
            for index in map(int, order[step * count : (step + 1) * count]):
                if index in held:
                    yield activations.student(task, index)

    def _loss(self, inputs: BlockInputs) -> Tensor:
        output = self.block.activations.run(self.block.student, inputs)
        target = self.block.activations.target(inputs.task, inputs.index)
        return self.loss(self._rows(inputs, output), self._rows(inputs, target)) / self.scales[inputs.task]

    def _rows(self, inputs: BlockInputs, hidden: Tensor) -> Tensor:
        return inputs.masked(hidden) if self.settings.mask_padding else hidden.reshape(-1, hidden.shape[-1])

    @torch.no_grad()
    def _scale(self, task: int) -> float:
        if self.settings.loss != "relative" or not self.batches[task]:
            return 1.0
        inputs = self.block.student_inputs(task)
        sums = token_sums(self._rows(one, self.block.activations.target(task, one.index)) for one in inputs)
        return spread(self.block.activations.all_reduce(sums))

    @torch.no_grad()
    def _evaluate(self) -> float:
        """The loss over all samples."""
        tasks = range(len(self.block))
        part = sum(float(self._loss(inputs)) for task in tasks for inputs in self.block.student_inputs(task))
        return float(self.block.activations.all_reduce({_LOSS: _scalar(part)})[_LOSS])

    def _learning_rate(self, step: int) -> float:
        rate = self.settings.learning_rate
        if self.settings.lr_scheduler == "cosine":
            rate *= 0.5 * (1 + math.cos(math.pi * step / (self.settings.epochs * self.steps)))
        return rate


def _scalar(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)
