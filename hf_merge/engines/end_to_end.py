"""The end-to-end engine: the merged model is in memory as a whole, differentiable, under the head of every task.

It serves the methods that need gradients through all layers. Its memory is that of the merged model and of what the method
adds; the experts are read parameter by parameter, or run one at a time.
"""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from .. import __version__
from ..checkpoints.names import SaveGroup
from ..data.calibration import CalibrationData
from ..errors import NonFiniteError
from ..methods.base import TensorGroup
from ..methods.block_base import BlockMethod, BlockMonitor
from ..methods.model_base import ModelGroup, ModelMethod
from ..registry import get_merge_method
from .blockwise import BlockwiseEngine
from .calibrated import initial_plan, is_left_to_method, parameter_row, task_model
from .head_fitting import HeadFitter, with_fitted_head
from .options import EngineOptions
from .placement import Placement
from .plan import MergePlan, PlannedParameter
from .planning import build_plan
from .report import MergeReport, peak_memory_bytes
from .streaming import Sink, StateDictSink, StreamingEngine, on_disk
from .task_models import LazyTensors, LoadedModels, MergedValues, as_parameter, build_model, parameter_names


class EndToEndEngine:
    """Runs a plan of a [`ModelMethod`].

    Args:
        plan ([`MergePlan`]): A checked plan.
        placement ([`Placement`]): The model is on the device of `""`.
        data ([`CalibrationData`]): The samples.
        options ([`EngineOptions`], *optional*): How to run.
    """

    def __init__(
        self, plan: MergePlan, placement: Placement, data: CalibrationData, options: EngineOptions | None = None
    ):
        self.plan = plan
        self.options = options or EngineOptions()
        self.device = placement.device_of("")
        self.method: ModelMethod = get_merge_method(plan.config.merge_type).method_cls()
        self.initial = StreamingEngine(initial_plan(plan), placement)
        self.report = MergeReport(dropped=[vars(entry) for entry in plan.dropped], notes=list(plan.notes))
        self.samples = data.load([task_model(source) for source in plan.experts])
        if self.method.requires_labels:
            self.samples = self.samples.labelled([source.config for source in plan.experts])
        self._data, self._placement = data, placement
        self._start: dict[str, Tensor] = {}
        self._results: dict[str, Tensor] = {}

    def run(self, groups: list[SaveGroup], sink: Sink) -> MergeReport:
        """Merges the model, then writes every group that the sink wants.

        Args:
            groups (`list[SaveGroup]`): Parameters that are written together, in the order of writing.
            sink ([`Sink`]): Where the tensors go.
        """
        pending = [group for group in groups if sink.wants(list(group.disk))]
        start = time.perf_counter()
        if pending or self.plan.config.fit_heads:
            self._merge()
        self.report.seconds["model"] = time.perf_counter() - start
        start = time.perf_counter()
        for group in pending:
            merged = with_fitted_head(self.plan, {name: self._results.pop(name) for name in group.names})
            for key, tensor in on_disk(self.plan, group, merged).items():
                sink.write(key, tensor)
        self.report.seconds["merge"] = time.perf_counter() - start
        self.report.peak_memory_bytes = peak_memory_bytes()
        return self.report

    # -- the model ------------------------------------------------------------------------------------------------

    def _merge(self) -> None:
        self.initial.survey()
        self._start = self._block_wise_start()
        merged = {parameter.name: parameter for parameter in self.plan.parameters if self._is_merged(parameter)}
        shared = {parameter.name: self._initial_value(parameter) for parameter in self.plan.parameters}
        group = self._group(MergedValues(self.plan, shared), merged)
        self.options.monitor.begin(1)
        with torch.enable_grad():
            self.method.merge(group)
        self.options.monitor.end()
        self.report.blocks["model"] = group.report
        for name, parameter in merged.items():
            self._results[name] = self._finish(parameter, group.parameters[name], shared[name].detach())
        self._fit_readout()

    def _fit_readout(self) -> None:
        fitter = HeadFitter(self.plan, self.samples, self._results, self.options, self.device)
        if self.plan.config.fit_poolers:
            planned = {parameter.name: parameter for parameter in self.plan.parameters}
            for name, value in fitter.fit_poolers().items():
                self._results[name] = self._rounded(planned[name], value)
        if self.plan.config.fit_heads:
            self.report.heads = fitter.fit_heads()

    def _block_wise_start(self) -> dict[str, Tensor]:
        """The merged parameters where `init` names a block-wise method, which is carried out first; empty otherwise."""
        start = self.plan.config.start_config()
        if not issubclass(get_merge_method(start.merge_type).method_cls, BlockMethod):
            return {}
        start.dtype = "float32"
        plan = build_plan(start, self.plan.experts, self.plan.base).check()
        options = replace(self.options, work_dir=None, output=None, monitor=BlockMonitor())
        sink = StateDictSink()
        report = BlockwiseEngine(plan, self._placement, self._data, options).run(plan.groups, sink)
        self.report.blocks.update(report.blocks)
        return {
            parameter.name: sink.tensors[parameter.name]
            for parameter in plan.parameters
            if parameter.action == "merge"
        }

    def _is_merged(self, parameter: PlannedParameter) -> bool:
        """Whether the method merges a parameter; without a base model's value there is no task vector."""
        has_base = parameter.base is not None or not self.method.requires_base
        return is_left_to_method(self.plan, parameter) and has_base

    def _initial_value(self, parameter: PlannedParameter) -> Tensor:
        """What the merged model starts from; what the method does not merge has its final value."""
        if self._is_merged(parameter) and parameter.name in self._start:
            return as_parameter(self._start[parameter.name], self.device)
        value = self.initial.merge_parameter(parameter.name)
        if self._is_merged(parameter):
            return as_parameter(value, self.device)
        if value.is_floating_point():
            value = self._rounded(parameter, self.initial.follow(parameter, value))
        self._results[parameter.name] = value
        self.report.parameters[parameter.name] = self.initial.report.parameters[parameter.name]
        is_parameter = parameter.name in self._weights
        return as_parameter(value, self.device) if is_parameter else value

    @cached_property
    def _weights(self) -> set[str]:
        """The entries of the merged model that are parameters, not buffers."""
        return parameter_names(self.plan.target)

    def _group(self, values: MergedValues, merged: dict[str, PlannedParameter]) -> ModelGroup:
        config, options, target = self.plan.config, self.options, self.plan.target
        return ModelGroup(
            model=build_model(target.model_class, target.config, values.of_target, self.device),
            parameters={name: self._parameter(parameter) for name, parameter in merged.items()},
            expert_names=tuple(source.name for source in self.plan.experts),
            settings=config,
            models=LoadedModels(
                values,
                self.samples.batches(config.batch_size),
                self.samples.batches(1),
                self.device,
                options.bf16,
            ),
            monitor=options.monitor,
            seed=config.seed if options.seed is None else options.seed,
            accumulation=options.gradient_accumulation_steps,
        )

    def _parameter(self, planned: PlannedParameter) -> TensorGroup:
        has_base = self.plan.base is not None and planned.base is not None
        return TensorGroup(
            name=planned.name,
            kind=planned.kind,
            stored_base=self.plan.base.read(planned.base).to(self.device) if has_base else None,
            stored_experts=LazyTensors(self.plan.experts, planned.experts, self.device),
            expert_names=tuple(source.name for source in self.plan.experts),
            settings=planned.settings,
            seed=self.plan.config.seed,
        )

    def _finish(self, planned: PlannedParameter, group: TensorGroup, value: Tensor) -> Tensor:
        """Rounds a merged parameter once, after the recipes that follow."""
        value = self.initial.follow(planned, value)
        result = self._rounded(planned, value)
        self.report.parameters[planned.name] = parameter_row(planned, group, value)
        return result

    def _rounded(self, planned: PlannedParameter, value: Tensor) -> Tensor:
        result = value.to(planned.info.dtype)
        if not bool(torch.isfinite(result).all()):
            raise NonFiniteError(
                f"Merging '{planned.name}' with '{self.plan.config.merge_type}' gave NaN or infinity: check its settings and the "
                "calibration samples, or turn off bf16."
            )
        return result.cpu()

    @cached_property
    def identity(self) -> str:
        """Identifies what is computed: recipe, models, samples and precision."""
        content: list[Any] = [
            __version__,
            self.plan.config.to_dict(),
            self.plan.to_dict()["parameters"],
            [source.fingerprint() for source in self.plan.sources],
            self.samples.fingerprint(),
            [self.options.bf16, self.options.gradient_accumulation_steps, self.options.seed],
        ]
        return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()
