"""What the engines of methods that add to a finished merge share: the plan of the inner recipe, and its result in memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

from torch import Tensor

from ..checkpoints.names import SaveGroup
from ..data.calibration import CalibrationData
from ..methods.block_base import BlockMonitor
from ..registry import get_merge_method
from .calibrated import task_model
from .options import EngineOptions
from .placement import Placement
from .plan import MergePlan
from .report import MergeReport, peak_memory_bytes
from .streaming import Sink, StateDictSink, on_disk
from .task_models import LoadedModels, MergedValues, as_parameter, parameter_names


def outer_plan(config: Any, inner: MergePlan) -> MergePlan:
    """The plan of a recipe that adds to another one's result: what is merged, and into what, is the inner plan's."""
    return replace(inner, config=config, notes=list(inner.notes), problems=list(inner.problems))


def inner_plan(plan: MergePlan) -> MergePlan:
    """The plan of the inner recipe. Heads and parameters are the same objects."""
    return replace(plan, config=plan.config.inner_config())


class AfterMergeEngine:
    """Carries out the inner recipe, keeps its result in memory, and adds to it.

    Args:
        plan ([`MergePlan`]): A checked plan.
        inner (`Engine`): Of its inner recipe.
        placement ([`Placement`]): Models run on the device of `""`.
        data ([`CalibrationData`]): The samples.
        options ([`EngineOptions`], *optional*): How to run.
    """

    def __init__(
        self,
        plan: MergePlan,
        inner: Any,
        placement: Placement,
        data: CalibrationData,
        options: EngineOptions | None = None,
    ):
        self.plan, self.inner = plan, inner
        self.options = options or EngineOptions()
        self.device = placement.device_of("")
        self.method = get_merge_method(plan.config.merge_type).method_cls()
        self.samples = data.load([task_model(source) for source in plan.experts])
        self.report = MergeReport()

    @cached_property
    def identity(self) -> str:
        """What the result depends on beside the plan: the samples, and how they are run."""
        return repr([self.inner.identity, self.samples.fingerprint(), self.options.bf16, self.options.seed])

    def run(self, groups: list[SaveGroup], sink: Sink) -> MergeReport:
        """Merges, adds, then writes every group that the sink wants.

        Args:
            groups (`list[SaveGroup]`): Parameters that are written together, in the order of writing.
            sink ([`Sink`]): Where the tensors go.
        """
        merged = StateDictSink()
        self.report = self.inner.run(self.plan.groups, merged)
        self.add(merged.tensors)
        for group in groups:
            if sink.wants(list(group.disk)):
                values = {name: merged.tensors[name] for name in group.names}
                for key, tensor in on_disk(self.plan, group, values).items():
                    sink.write(key, tensor)
        self.report.peak_memory_bytes = peak_memory_bytes()
        return self.report

    def add(self, merged: dict[str, Tensor]) -> None:
        """Adds to the merged parameters, which are by module name, in their output dtype, on the CPU."""
        raise NotImplementedError(f"{type(self).__name__} does not implement add")

    @property
    def monitor(self) -> BlockMonitor:
        """Is told about training, unless the inner merge's training was told of already."""
        inner = self.plan.config.inner_config()
        trains = get_merge_method(inner.merge_type).method_cls.needs_data(inner)
        return BlockMonitor() if trains else self.options.monitor

    @property
    def seed(self) -> int:
        return self.plan.config.seed if self.options.seed is None else self.options.seed

    def shared(self, merged: dict[str, Tensor]) -> MergedValues:
        """The merged values on the device, parameters in float32, to be shared by models."""
        weights = parameter_names(self.plan.target)
        values = {n: as_parameter(value, self.device) if n in weights else value for n, value in merged.items()}
        return MergedValues(self.plan, values)

    def models(self, shared: MergedValues, batch_size: int) -> LoadedModels:
        """The merged model under the head of every task, and the experts."""
        batches: Sequence[Any] = self.samples.batches(batch_size)
        return LoadedModels(shared, batches, batches, self.device, self.options.bf16)
