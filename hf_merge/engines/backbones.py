"""The engine of the methods for experts that share no base model: the experts' backbones and the merged one are in memory, the
map to each expert's features is folded into its head.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from ..checkpoints.names import SaveGroup
from ..checkpoints.source import ModelSource
from ..data.batching import collate
from ..data.calibration import CalibrationData
from ..methods.backbone_base import BackboneGroup, BackboneMethod, FeatureSource, FeatureTap
from ..modeling.heads import find_attention, find_elementwise
from ..modeling.precision import mixed_precision
from ..modeling.topology import backbone_of, example_inputs, trace
from ..registry import get_merge_method
from .backbone_plan import is_backbone
from .backbone_results import folded_head, identity_of, make_map, rounded
from .calibrated import task_model
from .options import EngineOptions
from .placement import Placement
from .plan import MergePlan
from .report import MergeReport, peak_memory_bytes
from .streaming import Sink, on_disk
from .task_models import build_model, expert_values


if TYPE_CHECKING:
    from transformers import PreTrainedModel


class BackboneEngine:
    """Runs a plan of a [`BackboneMethod`].

    Args:
        plan ([`MergePlan`]): A checked plan.
        placement ([`Placement`]): The models are on the device of `""`.
        data ([`CalibrationData`], *optional*): The samples, for methods that need some.
        options ([`EngineOptions`], *optional*): How to run.

    Raises:
        UnsupportedModelError: A part of the architecture cannot be folded.
    """

    def __init__(
        self,
        plan: MergePlan,
        placement: Placement,
        data: CalibrationData | None = None,
        options: EngineOptions | None = None,
    ):
        self.plan = plan
        self.options = options or EngineOptions()
        self.device = placement.device_of("")
        self.method: BackboneMethod = get_merge_method(plan.config.merge_type).method_cls()
        self.report = MergeReport(notes=list(plan.notes))
        self.models = [self._load(source) for source in plan.experts]
        self.topologies = [trace(model, example_inputs(model)) for model in self.models]
        self.topologies[0].attention = find_attention(self.models[0], self.topologies[0])
        self.topologies[0].elementwise = find_elementwise(self.models[0], self.topologies[0])
        self.samples = data.load([task_model(source) for source in plan.experts]) if data is not None else None
        self._augment = getattr(data, "augment", None)

    def _load(self, source: ModelSource) -> PreTrainedModel:
        return build_model(source.model_class, source.config, expert_values(source, self.device), self.device)

    def run(self, groups: list[SaveGroup], sink: Sink) -> MergeReport:
        """Merges the backbones, then writes every group that the sink wants.

        Args:
            groups (`list[SaveGroup]`): Parameters that are written together, in the order of writing.
            sink ([`Sink`]): Where the tensors go.
        """
        start = time.perf_counter()
        group = self._group()
        self.options.monitor.begin(1)
        with torch.enable_grad():
            self.method.merge(group)
        self.options.monitor.end()
        self.report.blocks["backbone"] = group.report
        self.report.seconds["backbone"] = time.perf_counter() - start
        start = time.perf_counter()
        results = self._results(group)
        for one in groups:
            if sink.wants(list(one.disk)):
                for key, tensor in on_disk(self.plan, one, {name: results[name] for name in one.names}).items():
                    sink.write(key, tensor)
        self.report.seconds["merge"] = time.perf_counter() - start
        self.report.peak_memory_bytes = peak_memory_bytes()
        return self.report

    def _group(self) -> BackboneGroup:
        target = self.plan.target
        student = backbone_of(build_model(target.model_class, target.config, lambda name: None, self.device))
        backbones = [backbone_of(model) for model in self.models]
        taps = [topology.tap for topology in self.topologies]
        width = target.config.hidden_size
        return BackboneGroup(
            topology=self.topologies[0],
            student=student,
            experts=[{name: value.detach() for name, value in one.named_parameters()} for one in backbones],
            modules=backbones,
            taps=taps,
            maps=[
                make_map(model, tap, width, model.config.hidden_size, self.device)
                for model, tap in zip(self.models, taps, strict=True)
            ],
            expert_names=tuple(source.name for source in self.plan.experts),
            settings=self.plan.config,
            source=self._source(student) if self.samples is not None else None,
            monitor=self.options.monitor,
            seed=self.plan.config.seed if self.options.seed is None else self.options.seed,
            accumulation=self.options.gradient_accumulation_steps,
            apart=self._apart(),
        )

    def _apart(self) -> list[dict[str, Tensor]]:
        """The parameters of the backbone that every expert keeps for itself."""
        found = []
        for source, model in zip(self.plan.experts, self.models, strict=True):
            head, prefix = self.plan.heads.get(source.name), source.anatomy.backbone_prefix
            names = [name for name in head.names if is_backbone(source, name)] if head is not None else []
            found.append({name.removeprefix(prefix): model.get_parameter(name).detach() for name in names})
        return found

    def _source(self, student: nn.Module) -> _LoadedSource:
        return _LoadedSource(
            self.samples.samples,
            self.samples.paddings,
            student,
            self.models,
            [topology.tap for topology in self.topologies],
            self._augment,
            self.device,
            self.options.bf16,
        )

    # -- the result -----------------------------------------------------------------------------------------------

    def _results(self, group: BackboneGroup) -> dict[str, Tensor]:
        """The merged backbone and the first expert's head, by module name; fills in the heads of the plan."""
        target = self.plan.target
        backbone = dict(group.student.named_parameters()) | dict(group.student.named_buffers())
        results = {}
        for task, (source, model) in enumerate(zip(self.plan.experts, self.models, strict=True)):
            head = self.plan.heads.get(source.name)
            if head is not None:
                prefix = source.anatomy.backbone_prefix
                head.values = {prefix + name: value for name, value in group.apart[task].items()}
                names = [name for name in head.names if name not in head.values]
                if names:
                    state = model.state_dict()
                    head.values |= folded_head(model, state, names, group.taps[task], group.maps[task])
        first = self.plan.heads.get(target.name)
        prefix = target.anatomy.backbone_prefix
        for planned in self.plan.parameters:
            if first is None or planned.name not in first.names:
                value = backbone[planned.name.removeprefix(prefix)].detach()
            else:
                value = first.values[planned.name]
            results[planned.name] = rounded(self.plan, planned.name, value, planned.info.dtype)
            self.report.parameters[planned.name] = {
                "kind": planned.kind.value,
                "action": planned.action,
                "method": self.plan.config.merge_type,
                "norm": float(torch.linalg.vector_norm(value.float())),
            }
        return results

    @cached_property
    def identity(self) -> str:
        """Identifies what is computed: recipe, models, samples and precision."""
        return identity_of(self.plan, self.samples, self._augment, self.options)


class _LoadedSource(FeatureSource):
    """Samples and models on one device.

    Args:
        samples (`Sequence`): The samples of every expert.
        paddings (`Sequence`): What each argument is padded with, by expert.
        student (`torch.nn.Module`): The merged backbone.
        models (`Sequence`): The experts with their heads.
        taps (`Sequence`): What their heads read.
        augment (`Callable`, *optional*): `(task, arguments, generator) -> arguments`, for batches of training.
        device (`torch.device`): Where they are.
        bf16 (`bool`): Whether models run in bfloat16 (autocast).
    """

    def __init__(self, samples, paddings, student, models, taps, augment, device, bf16):
        self._samples, self._paddings = samples, paddings
        self._student, self._models, self._taps = student, models, taps
        self._augment, self._device, self._bf16 = augment, device, bf16
        self.counts = [len(one) for one in samples]

    def inputs(self, task: int, rows: Sequence[int], generator: np.random.Generator | None) -> dict[str, Tensor]:
        batch = collate([self._samples[task][int(row)] for row in rows], self._paddings[task])
        arguments = {name: value.to(self._device) for name, value in batch.inputs.items() if name != "labels"}
        return arguments if self._augment is None or generator is None else self._augment(task, arguments, generator)

    def _autocast(self) -> AbstractContextManager[None]:
        return mixed_precision(self._device, self._bf16)

    def run_student(self, inputs: Mapping[str, Tensor]) -> Any:
        with self._autocast():
            return self._student(**inputs)

    @torch.no_grad()
    def run_expert(self, task: int, inputs: Mapping[str, Tensor]) -> Any:
        with self._autocast():
            return backbone_of(self._models[task])(**inputs)

    def predict(self, task: int, inputs: Mapping[str, Tensor], output: Any, features: Tensor) -> Tensor:
        tap: FeatureTap = self._taps[task]
        if tap.token is not None:
            whole = getattr(output, tap.field).detach().float().clone()
            whole[:, tap.token] = features
            features = whole
        output = type(output)(**{**output, tap.field: features})
        model = self._models[task]
        with self._autocast(), _returning(backbone_of(model), output):
            return next(iter(model(**inputs).values())).float()


@contextmanager
def _returning(module: nn.Module, output: Any):
    """The module gives this output, whatever it is called with."""
    module.forward = lambda *args, **kwargs: output
    try:
        yield
    finally:
        del module.forward
