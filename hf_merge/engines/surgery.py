"""The engine of methods that correct features: runs the merged model and each expert on the expert's samples, up to its head."""

from __future__ import annotations

import time

import torch
from torch import Tensor, nn
from typing_extensions import Self

from ..errors import NonFiniteError, UnsupportedModelError
from ..low_rank import Factors
from ..methods.after_base import FeatureGroup, FeatureMethod
from ..modeling.surgery import HeadSurgery
from .after_merge import AfterMergeEngine
from .plan import MergePlan
from .task_models import LoadedModels


def plan_surgery(plan: MergePlan) -> None:
    """Adds what prevents a correction of features, and what a user should know of, to the plan of the merge."""
    name = plan.config.merge_type
    if plan.heads:
        plan.notes.append(
            "the folder itself loads the merge with the first expert's head, without a correction: load each task by its name"
        )
    elif not plan.problems:
        plan.problems.append(
            f"'{name}' corrects what heads that are kept per task read, and there are none: set heads='per_task' if there are heads."
        )


class SurgeryEngine(AfterMergeEngine):
    """Runs a plan of a [`FeatureMethod`]."""

    method: FeatureMethod

    def add(self, merged: dict[str, Tensor]) -> None:
        start = time.perf_counter()
        config, monitor = self.plan.config, self.monitor
        models = self.models(self.shared(merged), config.batch_size)
        monitor.begin(len(self.plan.heads))
        for task, source in enumerate(self.plan.experts):
            head = self.plan.heads.get(source.name)
            if head is None:
                continue
            with models.expert(task) as model:
                layers, expert = self._features(models, model, task, list(head.names))
            found, features = self._features(models, models.student(task), task, layers)
            group = FeatureGroup(
                task=source.name, merged=features, expert=expert, settings=config, monitor=monitor, seed=self.seed
            )
            factors = self.method.correct(group)
            self._check(source.name, factors)
            head.surgery = HeadSurgery(found, Factors(factors.left.cpu(), factors.right.cpu()))
            self.report.heads[source.name] = {"corrected": found, "rows": len(features), **group.report}
            models.release(task)
        monitor.end()
        self.report.seconds["surgery"] = time.perf_counter() - start

    @torch.no_grad()
    def _features(
        self, models: LoadedModels, model: nn.Module, task: int, entries: list[str]
    ) -> tuple[list[str], Tensor]:
        """What the first of a head's linear layers read on the samples of a task.

        Args:
            models ([`LoadedModels`]): Run the model.
            model (`torch.nn.Module`): The merged model or the expert, with the head.
            task (`int`): Which one.
            entries (`list[str]`): The head's parameters, or its layers.

        Returns:
            `tuple`: The layers that read the features, and the features, (rows, channels).
        """
        owners = dict.fromkeys(entry.removesuffix(".weight").removesuffix(".bias") for entry in entries)
        linear = [name for name in owners if isinstance(model.get_submodule(name), nn.Linear)]
        rows: list[Tensor] = []
        layers: list[str] = []
        for index in range(models.batches[task]):
            inputs = models.inputs(task, index)
            with _Reading(model, linear) as reading:
                models.run(model, inputs.arguments)
            if reading.features is None:
                name = self.plan.experts[task]
                raise UnsupportedModelError(
                    f"The head of {name} has no linear layer that its forward calls: there is nowhere to correct features."
                )
            layers = reading.layers
            rows.append(inputs.masked(reading.features).float())
        return layers, torch.cat(rows)

    def _check(self, task: str, factors: Factors) -> None:
        if not bool(torch.isfinite(factors.left).all() and torch.isfinite(factors.right).all()):
            raise NonFiniteError(f"The correction of '{task}' diverged to NaN or infinity: lower the learning rate.")


class _Reading:
    """Notes, within the context, what the first of some layers that is called reads, and which other layers read the same."""

    def __init__(self, model: nn.Module, layers: list[str]):
        self.layers: list[str] = []
        self.features: Tensor | None = None
        self._modules = {name: model.get_submodule(name) for name in layers}
        self._handles: list = []

    def __enter__(self) -> Self:
        for name, module in self._modules.items():
            self._handles.append(module.register_forward_pre_hook(lambda _, args, name=name: self._see(name, args[0])))
        return self

    def _see(self, name: str, features: Tensor) -> None:
        if self.features is None:
            self.features = features
        if features is self.features:
            self.layers.append(name)

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()
