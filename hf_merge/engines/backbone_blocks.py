"""The engine of methods that merge backbones without a shared base one block after another: one block of the merged model and of
each expert is in memory, and what is outside of the blocks while a forward needs it. A finished block is kept in memory or on
disk, from where a merge that was killed goes on.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoints.names import SaveGroup
from ..checkpoints.source import ModelSource
from ..data.cache import ActivationCache, CachedTensor
from ..data.calibration import CalibrationData
from ..errors import UnsupportedModelError
from ..methods.backbone_base import BackboneMethod, FeatureTap, OutputMap
from ..methods.backbone_blocks import BackboneBlock, BackbonePart, FixedBatches
from ..methods.base import ParameterKind
from ..methods.block_base import BlockInputs
from ..modeling.reentry import main_output
from ..modeling.topology import backbone_of
from ..registry import get_merge_method
from .backbone_plan import is_backbone
from .backbone_results import folded_head, identity_of, make_map, rounded
from .backbone_shape import BackboneShape
from .block_runner import BlockRunner, Key, open_runner
from .block_store import BlockStore
from .calibrated import task_model
from .options import EngineOptions
from .placement import Placement
from .plan import MergePlan
from .report import MergeReport, peak_memory_bytes
from .streaming import Sink, on_disk


_TAIL = "after the last block"


class BackboneBlocksEngine:
    """Runs a plan of a [`BackboneMethod`] whose recipe says `block_wise`.

    Args:
        plan ([`MergePlan`]): A checked plan.
        placement ([`Placement`]): Models run on the device of `""`.
        data ([`CalibrationData`]): The samples.
        options ([`EngineOptions`], *optional*): How to run.

    Raises:
        UnsupportedModelError: A part of the architecture cannot be folded, or its blocks cannot be run one at a time.
    """

    def __init__(
        self, plan: MergePlan, placement: Placement, data: CalibrationData, options: EngineOptions | None = None
    ):
        self.plan = plan
        self.options = options or EngineOptions()
        self.device = placement.device_of("")
        self.method: BackboneMethod = get_merge_method(plan.config.merge_type).method_cls()
        self.report = MergeReport(notes=list(plan.notes))
        self.samples = data.load([task_model(source) for source in plan.experts])
        self._augment = getattr(data, "augment", None)
        dtype = getattr(torch, self.options.cache_dtype) if self.options.cache_dtype else None
        folder = self.options.work_dir and self.options.work_dir.parent
        self.cache = ActivationCache(self.options.cache, self.options.cache_limit, folder, dtype)
        self.store = BlockStore(self.options.work_dir, self.identity)
        self.shape = BackboneShape.of(plan.target)
        self.taps: list[FeatureTap | None] = [BackboneShape.of(source).tap for source in plan.experts]
        self.outside = self._merge_outside()

    def run(self, groups: list[SaveGroup], sink: Sink) -> MergeReport:
        """Merges all blocks, then writes every group that the sink wants.

        Args:
            groups (`list[SaveGroup]`): Parameters that are written together, in the order of writing.
            sink ([`Sink`]): Where the tensors go.
        """
        start = time.perf_counter()
        try:
            maps = self._merge_blocks()
        finally:
            self.cache.close()
        self.report.seconds["blocks"] = time.perf_counter() - start
        start = time.perf_counter()
        results = self._results(maps)
        for group in groups:
            if sink.wants(list(group.disk)):
                merged = {name: results(name) for name in group.names}
                for key, tensor in on_disk(self.plan, group, merged).items():
                    sink.write(key, tensor)
        self.report.seconds["merge"] = time.perf_counter() - start
        self.report.peak_memory_bytes = peak_memory_bytes()
        return self.report

    @cached_property
    def identity(self) -> str:
        """Identifies what is computed: recipe, models, samples and precision."""
        return identity_of(self.plan, self.samples, self._augment, self.options)

    # -- outside of the blocks ------------------------------------------------------------------------------------

    def _merge_outside(self) -> dict[str, Tensor]:
        """Embeddings, norms and other layers outside of the blocks, as the recipe's `init` says; by name within the backbone."""
        topology = self.shape.outside
        names = topology.parameters()
        experts = [
            {name: self._read(source, name).to(self.device, torch.float32) for name in names}
            for source in self.plan.experts
        ]
        shapes = {name: self._merged_info(name).shape for name in names}
        with torch.no_grad():
            return self.method.start(topology, experts, shapes, self.plan.config)

    def _merged_info(self, name: str) -> Any:
        return self.plan.target.parameters[self.plan.target.anatomy.backbone_prefix + name]

    def _read(self, source: ModelSource, name: str) -> Tensor:
        """A parameter of an expert by its name within the backbone."""
        return _value(source, source.anatomy.backbone_prefix + name)

    def _student_value(self, name: str) -> Tensor | None:
        target = self.plan.target
        if not is_backbone(target, name):
            return None
        inner = name.removeprefix(target.anatomy.backbone_prefix)
        if self.store.has(name):
            return self.store.read(name)
        if inner in self.outside:
            return self.outside[inner]
        is_buffer = target.anatomy.parameters[name].kind is ParameterKind.BUFFER
        return _value(self.plan.experts[0], name) if is_buffer else None

    # -- the blocks -----------------------------------------------------------------------------------------------

    def _merge_blocks(self) -> list[OutputMap | None]:
        models = _Models(self)
        self.options.monitor.begin(len(models.student.reentry.blocks) + 1)
        for block in models.student.reentry.blocks:
            models.advance_to(block)
            self._merge_block(models, block)
        outputs = self._merge_tail(models)
        self.options.monitor.end()
        return outputs

    def _merge_block(self, models: _Models, block: str) -> None:
        with models.resident(block) as (student, experts), torch.enable_grad():
            targets = models.push_experts(block)
            names = {inner: f"{block}.{inner}" for inner, _ in student.named_parameters()}
            if block in self.store:
                with torch.no_grad():
                    for inner, name in names.items():
                        student.get_parameter(inner).copy_(self.store.read(name))
                self.report.blocks[block] = self.store.report(block)
            else:
                part = self._block(models, block, student, experts, targets)
                self.method.merge_block(part)
                merged = self._rounded(student, block)
                self.store.put(block, merged, part.report)
                self.report.blocks[block] = part.report
            models.push_student(block)

    def _block(
        self,
        models: _Models,
        block: str,
        student: nn.Module,
        experts: list[nn.Module],
        targets: Mapping[Key, CachedTensor],
    ) -> BackboneBlock:
        topology = self.shape.block
        missing = set(topology.parameters()) ^ {name for name, _ in student.named_parameters()}
        if missing:
            raise UnsupportedModelError(
                f"{self.plan.target} has blocks that differ ('{min(missing)}' in '{block}'): merge it with block_wise=False."
            )

        def predict(task: int, index: int) -> Tensor:
            inputs = models.inputs(task, index)
            return inputs.masked(main_output(models.student.run(student, inputs.args, inputs.kwargs)).float())

        def target(task: int, index: int) -> Tensor:
            return models.inputs(task, index).masked(targets[task, index].load(self.device))

        return BackboneBlock(
            block,
            student,
            FixedBatches(models.counts, predict, target),
            self._block_maps(),
            topology=topology,
            experts=[{name: value.detach() for name, value in one.named_parameters()} for one in experts],
            head_sizes=topology.head_sizes(getattr(self.plan.config, "head_aligned", None)),
            **self._common(),
        )

    def _common(self) -> dict[str, Any]:
        config, options = self.plan.config, self.options
        return {
            "settings": config,
            "monitor": options.monitor,
            "seed": config.seed if options.seed is None else options.seed,
            "accumulation": options.gradient_accumulation_steps,
        }

    def _block_maps(self) -> list[OutputMap]:
        """Fresh maps: a merge that goes on after a finished block then does what an uninterrupted one does."""
        merged = self.plan.target.config.hidden_size
        return [OutputMap(merged, source.config.hidden_size, True).to(self.device) for source in self.plan.experts]

    @torch.no_grad()
    def _rounded(self, module: nn.Module, prefix: str) -> dict[str, Tensor]:
        """The parameters of a finished part, by module name, rounded once. The module gets what is kept: what comes next then sees
        the model that is saved."""
        kept = {}
        for inner, parameter in module.named_parameters():
            name = f"{prefix}.{inner}"
            dtype = self.plan.target.parameters[name].dtype
            kept[name] = rounded(self.plan, name, parameter.detach(), dtype)
            parameter.copy_(kept[name])
        return kept

    def _merge_tail(self, models: _Models) -> list[OutputMap | None]:
        """Trains what comes after the last block, with the maps to what each head reads."""
        maps = [
            make_map(source.shell, tap, self.plan.target.config.hidden_size, source.config.hidden_size, self.device)
            for source, tap in zip(self.plan.experts, self.taps, strict=True)
        ]
        targets = models.features_of_experts(self.taps)
        with models.student.outside_resident(), torch.enable_grad():
            tail = nn.ModuleDict(_owners(backbone_of(models.student.model), list(self.outside)))
            predict = models.features_of_student(self.taps)
            batches = FixedBatches(models.counts, predict, lambda task, index: targets[task, index])
            part = BackbonePart(_TAIL, tail, batches, maps, **self._common())
            self.method.merge_tail(part)
            model = backbone_of(models.student.model)
            self.outside = {name: model.get_parameter(name).detach().clone() for name in self.outside}
            self.report.blocks[_TAIL] = part.report
        return maps

    # -- the result -----------------------------------------------------------------------------------------------

    def _results(self, maps: list[OutputMap | None]):
        """Gives the value of a parameter by module name; fills in the heads of the plan."""
        plan = self.plan
        for source, tap, output_map in zip(plan.experts, self.taps, maps, strict=True):
            head = plan.heads.get(source.name)
            if head is not None:
                names = {*head.names, *(f"{layer}.{leaf}" for layer in tap.layers for leaf in ("weight", "bias"))}
                known = {name: _value(source, name) for name in names if name in source.anatomy.parameters}
                head.values = folded_head(source.shell, known, head.names, tap, output_map)
        first = plan.heads.get(plan.target.name)
        planned = {parameter.name: parameter for parameter in plan.parameters}

        def result(name: str) -> Tensor:
            parameter = planned[name]
            value = self._student_value(name) if is_backbone(plan.target, name) else first.values[name]
            self.report.parameters[name] = {
                "kind": parameter.kind.value,
                "action": parameter.action,
                "method": plan.config.merge_type,
                "norm": float(torch.linalg.vector_norm(value.float())),
            }
            return rounded(plan, name, value, parameter.info.dtype)

        return result


class _Models:
    """The merged model and the experts, as they run through the blocks together."""

    def __init__(self, engine: BackboneBlocksEngine):
        plan, options = engine.plan, engine.options
        batches = engine.samples.batches(plan.config.batch_size)
        self.device = engine.device
        self.batches = {(task, i): batch for task, one in enumerate(batches) for i, batch in enumerate(one)}
        self.counts = [len(one) for one in batches]
        common = (engine.cache, engine.device, options.bf16)
        target = plan.target
        self.student = open_runner(
            "the merged model", target.model_class, target.config, engine._student_value, self.batches, *common
        )
        self.experts = [
            open_runner(
                str(source),
                source.model_class,
                source.config,
                lambda name, source=source: _value(source, name),
                {key: batch for key, batch in self.batches.items() if key[0] == task},
                *common,
            )
            for task, source in enumerate(plan.experts)
        ]
        self._names = []
        for source, runner in zip(plan.experts, self.experts, strict=True):
            theirs = {source.anatomy.canonical(name): name for name in runner.reentry.blocks}
            self._names.append({name: theirs[target.anatomy.canonical(name)] for name in self.student.reentry.blocks})

    def advance_to(self, block: str) -> None:
        """Runs every batch up to a block.

        Raises:
            UnsupportedModelError: It reaches another one.
        """
        reached = set(self.student.advance().values())
        expected = {block}
        for names, runner in zip(self._names, self.experts, strict=True):
            reached |= {ours for ours, theirs in names.items() if theirs in set(runner.advance().values())}
        if reached != expected:
            raise UnsupportedModelError(
                f"{self.student.label} does not run its blocks one after another ({', '.join(sorted(reached))} where '{block}' was "
                "expected): merge it with block_wise=False."
            )

    @contextmanager
    def resident(self, block: str) -> Iterator[tuple[nn.Module, list[nn.Module]]]:
        """One block of the merged model and of each expert, with its weights."""
        with ExitStack() as stack:
            student = stack.enter_context(self.student.block_resident(block))
            pairs = zip(self._names, self.experts, strict=True)
            yield student, [stack.enter_context(runner.block_resident(names[block])) for names, runner in pairs]

    def push_experts(self, block: str) -> dict[Key, CachedTensor]:
        """Takes every batch through the experts' blocks. Returns the outputs."""
        return {
            key: self.experts[key[0]].push(key, self.experts[key[0]].reentry.blocks[self._names[key[0]][block]])
            for key in self.batches
        }

    def push_student(self, block: str) -> None:
        """Takes every batch through the merged block."""
        for key in self.batches:
            self.student.push(key, self.student.reentry.blocks[block])

    def inputs(self, task: int, index: int) -> BlockInputs:
        """What the merged model hands to the block."""
        call = self.student.call((task, index))
        hidden = next(
            v for v in (*call.args, *call.kwargs.values()) if isinstance(v, Tensor) and v.is_floating_point()
        )
        mask = self.batches[task, index].token_mask(hidden.shape, False)
        return BlockInputs(task, index, call.args, call.kwargs, mask if mask is None else mask.to(hidden.device))

    @torch.no_grad()
    def features_of_experts(self, taps: list[FeatureTap | None]) -> dict[Key, Tensor]:
        """What the experts' heads read, by batch: (count, channels)."""
        found = {}
        for task, runner in enumerate(self.experts):
            with runner.outside_resident():
                for index in range(self.counts[task]):
                    found[task, index] = self._features(runner, (task, index), taps[task])
        return found

    def features_of_student(self, taps: list[FeatureTap | None]):
        """The same of the merged model, differentiable, as a function of task and batch."""
        return lambda task, index: self._features(self.student, (task, index), taps[task])

    def _features(self, runner: BlockRunner, key: Key, tap: FeatureTap | None) -> Tensor:
        output = runner.final_output(key, backbone_of(runner.model))
        values = (output.last_hidden_state if tap is None else tap.read(output)).float()
        mask = self.batches[key].token_mask(values.shape, False) if values.ndim == 3 else None
        rows = values.reshape(-1, values.shape[-1])
        return rows if mask is None else rows[mask.flatten().to(rows.device)]


def _value(source: ModelSource, name: str) -> Tensor | None:
    stored = name if name in source.parameters else source.tied_stand_in(name)
    return None if stored is None else source.read(stored)


def _owners(backbone: nn.Module, names: list[str]) -> dict[str, nn.Module]:
    """The modules that own some parameters, by name; module dictionaries take no dots."""
    paths = dict.fromkeys(name.rpartition(".")[0] for name in names)
    return {path.replace(".", "/") or "backbone": _Alone(backbone.get_submodule(path)) for path in paths}


class _Alone(nn.Module):
    """The parameters that a module owns itself, without those of its children."""

    def __init__(self, module: nn.Module):
        super().__init__()
        for name, parameter in module._parameters.items():
            if parameter is not None:
                self.register_parameter(name, parameter)
