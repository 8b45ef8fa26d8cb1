"""The engine of methods that keep what every expert has beyond the merge."""

from __future__ import annotations

import time

import torch
from torch import Tensor, nn

from ..errors import UnsupportedModelError
from ..methods.after_base import ExclusiveMethod, RoutingGroup
from ..modeling.exclusive import Part, is_matrix, takes_part
from ..modeling.reentry import CHECK_TOLERANCE
from .after_merge import AfterMergeEngine
from .plan import MergePlan, PlannedParameter
from .task_models import LoadedModels, MergedValues, build_model
from .twin_parts import TwinParts, pooled_features


def plan_twin(plan: MergePlan) -> None:
    """Adds what prevents routing, and what a user should know of, to the plan of the merge."""
    if any(getattr(source.config, "is_encoder_decoder", False) for source in plan.experts):
        plan.problems.append(
            f"'{plan.config.merge_type}' routes by the last hidden state of the input, and in an encoder-decoder that is the output's."
        )
    shared = [p for p in plan.parameters if p.action in ("merge", "mean") and not _has_parts(plan, p)]
    if shared and not plan.problems:
        plan.notes.append(
            f"{len(shared)} parameter(s), such as '{shared[0].name}', are the shared merge's for all tasks: they belong to no linear layer, "
            "embedding, convolution or LayerNorm"
        )


def _has_parts(plan: MergePlan, parameter: PlannedParameter) -> bool:
    path, _, leaf = parameter.name.rpartition(".")
    return parameter.action in ("merge", "mean") and takes_part(plan.target.shell.get_submodule(path), leaf)


class TwinEngine(AfterMergeEngine):
    """Runs a plan of an [`ExclusiveMethod`]."""

    method: ExclusiveMethod

    @torch.no_grad()
    def add(self, merged: dict[str, Tensor]) -> None:
        start = time.perf_counter()
        tasks = [source.name for source in self.plan.experts]
        shared = self.shared(merged)
        models = self.models(shared, self.plan.config.batch_size)
        called = self._called(models)
        parts: dict[str, dict[str, Part]] = {task: {} for task in tasks}
        for parameter in self.plan.parameters:
            if _has_parts(self.plan, parameter) and parameter.name.rpartition(".")[0] in called:
                for index, task in enumerate(tasks):
                    parts[task][parameter.name] = self._part(parameter, index, merged[parameter.name])
        self.report.seconds["parts"] = time.perf_counter() - start
        start = time.perf_counter()
        group = self._routing_group(models)
        self.monitor.begin(1)
        router = self.method.router(group)
        self.monitor.end()
        self.report.blocks["router"] = group.report
        self.report.seconds["router"] = time.perf_counter() - start
        self.plan.twin = TwinParts(parts, router.cpu())
        self._check(models, shared)

    def _called(self, models: LoadedModels) -> set[str]:
        """The modules that the forward calls, and that samples reach; others cannot add anything to what they give."""
        called: set[str] = set()
        for task in range(len(self.plan.experts)):
            model = models.student(task)
            hooks = [
                module.register_forward_pre_hook(lambda module, _, name=name: called.add(name))
                for name, module in model.named_modules()
            ]
            models.run(model, models.inputs(task, 0).arguments)
            for hook in hooks:
                hook.remove()
        planned = [p.name for p in self.plan.parameters if _has_parts(self.plan, p)]
        missed = [name for name in planned if name.rpartition(".")[0] not in called]
        if missed:
            self.report.notes.append(
                f"{len(missed)} parameter(s), such as '{missed[0]}', are the shared merge's for all tasks: no sample's forward calls their "
                "layers"
            )
        return called

    def _check(self, models: LoadedModels, shared: MergedValues) -> None:
        """Compares routing with weights that are formed, on one batch that is all of the second task.

        Raises:
            UnsupportedModelError: They differ: a layer is not called as a module, or not once for each sample.
        """
        twin, target, inputs = self.plan.twin, self.plan.target, models.inputs(0, 0)
        task = list(twin.parts)[1]
        routed = build_model(target.model_class, target.config, shared.of_target, self.device)
        TwinParts(twin.parts, _Always(1, len(twin.parts))).install(routed)
        values = {name: twin.added(task, name, value.detach()) for name, value in shared.shared.items()}
        whole = MergedValues(self.plan, values)
        formed = build_model(target.model_class, target.config, whole.of_target, self.device)
        try:
            found, expected = (next(iter(model(**inputs.arguments).values())) for model in (routed, formed))
        except RuntimeError as error:
            raise self._cannot_route(str(error)) from error
        deviation = float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-12))
        if not deviation <= CHECK_TOLERANCE:
            raise self._cannot_route(f"it differs from that with the weights of '{task}' by {deviation:.1e}")

    def _cannot_route(self, reason: str) -> UnsupportedModelError:
        return UnsupportedModelError(
            f"A {self.plan.target.model_class.__name__} cannot mix weights for each sample ({reason}): a part of it is not called once for "
            "each sample. Exclude its parameters (exclude=[...])."
        )

    def _part(self, parameter: PlannedParameter, index: int, merged: Tensor) -> Part:
        """θ_t − θ* of one parameter, compressed where it is a matrix."""
        path, _, leaf = parameter.name.rpartition(".")
        value = self.plan.experts[index].read(parameter.experts[index]).to(self.device, torch.float32)
        part = value - merged.to(value)
        if not is_matrix(self.plan.target.shell.get_submodule(path), leaf):
            return part.cpu()
        factors = self.method.compress(part, self.plan.config)
        energy = float(part.square().sum())
        row = self.report.parameters.setdefault(parameter.name, {})
        kept = factors.norm() ** 2 / energy if energy else 1.0
        row[f"kept.{self.plan.experts[index].name}"] = kept
        factors.left, factors.right = factors.left.cpu(), factors.right.cpu()
        return factors

    def _routing_group(self, models: LoadedModels) -> RoutingGroup:
        features, tasks = [], []
        for task in range(len(self.plan.experts)):
            for index in range(models.batches[task]):
                inputs = models.inputs(task, index)
                features.append(pooled_features(models.student(task), inputs.arguments))
                tasks += [task] * inputs.count
            models.release(task)
        return RoutingGroup(
            features=torch.cat(features),
            tasks=torch.tensor(tasks, device=self.device),
            count=len(self.plan.experts),
            settings=self.plan.config,
            monitor=self.monitor,
            seed=self.seed,
        )


class _Always(nn.Module):
    """A router that sends everything to one task."""

    def __init__(self, task: int, count: int):
        super().__init__()
        self.register_buffer("weights", nn.functional.one_hot(torch.tensor(task), count).float())

    def forward(self, features: Tensor) -> Tensor:
        return self.weights.expand(len(features), -1)


def _as_float(value: Tensor) -> Tensor:
    return value.float() if value.is_floating_point() else value
