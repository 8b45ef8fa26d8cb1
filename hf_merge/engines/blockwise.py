"""The block-wise engine: merges one block after another from the activations of calibration samples.

The merged model and each expert run their own forward up to the next block; one block of the base and of each expert is in
memory at a time, and a finished block is kept in its output dtype, in memory or on disk. What is outside of the blocks is
merged without data first.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from .. import __version__
from ..checkpoints.conversion import SaveGroup
from ..checkpoints.source import ModelSource
from ..data.cache import CachedTensor
from ..data.calibration import CalibrationData
from ..errors import NonFiniteError, UnsupportedModelError
from ..methods.base import TensorGroup
from ..methods.block_base import BlockActivations, BlockGroup, BlockInputs, BlockMethod
from ..modeling.reentry import main_output
from ..modeling.residency import return_memory
from ..registry import get_merge_method
from .block_runner import BlockRunner, Key, open_runner
from .block_store import BlockStore
from .calibrated import initial_plan, is_left_to_method, parameter_row, task_model
from .head_fitting import HeadFitter, LazyParameters, with_fitted_head
from .options import EngineOptions
from .placement import Placement
from .plan import MergePlan, PlannedParameter
from .report import MergeReport, peak_memory_bytes
from .streaming import Sink, StreamingEngine, on_disk


class BlockwiseEngine:
    """Runs a plan of a [`BlockMethod`].

    Args:
        plan ([`MergePlan`]): A checked plan.
        placement ([`Placement`]): Models run on the device of `""`.
        data ([`CalibrationData`]): The samples.
        options ([`EngineOptions`], *optional*): How to run.
    """

    def __init__(
        self, plan: MergePlan, placement: Placement, data: CalibrationData, options: EngineOptions | None = None
    ):
        self.plan = plan
        self.options = options or EngineOptions()
        self.device = placement.device_of("")
        self.method: BlockMethod = get_merge_method(plan.config.merge_type).method_cls()
        self.initial = StreamingEngine(initial_plan(plan), placement)
        self.report = MergeReport(dropped=[vars(entry) for entry in plan.dropped], notes=list(plan.notes))
        self._by_name = {parameter.name: parameter for parameter in plan.parameters}
        self._outside: dict[str, Tensor] = {}
        self.samples = data.load([task_model(source) for source in plan.experts])
        self.cache = self.options.open_cache()
        self.store = BlockStore(self.options.work_dir, self.identity)

    def run(self, groups: list[SaveGroup], sink: Sink) -> MergeReport:
        """Merges all blocks, then writes every group that the sink wants.

        Args:
            groups (`list[SaveGroup]`): Parameters that are written together, in the order of writing.
            sink ([`Sink`]): Where the tensors go.
        """
        start = time.perf_counter()
        self.initial.survey()
        self.report.seconds["survey"] = time.perf_counter() - start
        start = time.perf_counter()
        try:
            self._merge_blocks()
        finally:
            self.cache.close()
        self._fit_readout()
        self.report.seconds["blocks"] = time.perf_counter() - start
        start = time.perf_counter()
        for group in groups:
            if sink.wants(list(group.disk)):
                merged = with_fitted_head(self.plan, {name: self._result(name) for name in group.names})
                for key, tensor in on_disk(self.plan, group, merged).items():
                    sink.write(key, tensor)
        self.report.seconds["merge"] = time.perf_counter() - start
        self.report.peak_memory_bytes = peak_memory_bytes()
        return self.report

    # -- the blocks -----------------------------------------------------------------------------------------------

    def _merge_blocks(self) -> None:
        models = _Models(self)
        if self.options.self_check:
            models.reference.check()
        skipped = self.method.skip_blocks(self.plan.config, lambda: self._block_norms(models.blocks))
        self.options.monitor.begin(len(models.blocks) - len(skipped))
        reached = set()
        while (stage := models.next_stage()) is not None:
            reached.add(stage.block)
            self._merge_block(models, stage, stage.block in skipped)
            return_memory()
        self.options.monitor.end()
        missed = [block for block in models.blocks if block not in reached]
        if missed:
            self.report.notes.append(
                f"No calibration sample reaches {', '.join(missed)}: merged by '{self.initial.plan.config.merge_type}'"
            )

    def _merge_block(self, models: _Models, stage: _Stage, is_skipped: bool) -> None:
        with models.resident(stage.block) as (student, experts):
            activations = _Activations(models, stage, student, experts)
            if stage.block in self.store:
                for name in self._merged_names(stage.block):
                    student.get_parameter(name.removeprefix(f"{stage.block}.")).copy_(self.store.read(name))
                self._note(stage.block, self.store.report(stage.block))
            elif is_skipped:
                self._note(stage.block, {"block": {"skipped": True}, "parameters": {}})
                self._round(student, stage.block)
            else:
                group = self._group(stage.block, student, experts, activations)
                group.on_release = lambda: models.release_experts(stage.block)
                self.method.merge_block(group)
                self._finish_block(group)
            activations.push()

    def _fit_readout(self) -> None:
        merged = LazyParameters(list(self._by_name), self._result)
        fitter = HeadFitter(self.plan, self.samples, merged, self.options, self.device)
        if self.plan.config.fit_poolers:
            for name, value in fitter.fit_poolers().items():
                self._outside[name] = self._rounded(self._by_name[name], value)
        if self.plan.config.fit_heads:
            self.report.heads = fitter.fit_heads()

    def _merged_names(self, block: str) -> list[str]:
        """The parameters of a block that the method merges."""
        return [
            parameter.name
            for parameter in self.plan.parameters
            if parameter.name.startswith(f"{block}.") and is_left_to_method(self.plan, parameter)
        ]

    def _group(
        self, block: str, student: nn.Module, experts: Sequence[nn.Module], activations: _Activations
    ) -> BlockGroup:
        names = tuple(source.name for source in self.plan.experts)
        parameters = {}
        for name in self._merged_names(block):
            planned = self._by_name[name]
            inner = name.removeprefix(f"{block}.")
            base = self.plan.base.read(planned.base).to(self.device) if planned.base is not None else None
            parameters[inner] = TensorGroup(
                name=name,
                kind=planned.kind,
                stored_base=base,
                stored_experts=[expert.get_parameter(inner).data for expert in experts],
                expert_names=names,
                settings=planned.settings,
                seed=self.plan.config.seed,
            )
        return BlockGroup(
            name=block,
            student=student,
            experts=experts,
            parameters=parameters,
            expert_names=names,
            settings=self.plan.config,
            activations=activations,
            depth=max((self._by_name[group.name].depth for group in parameters.values()), default=0.0),
            monitor=self.options.monitor,
            seed=self.plan.config.seed if self.options.seed is None else self.options.seed,
            accumulation=self.options.gradient_accumulation_steps,
        )

    @torch.no_grad()
    def _finish_block(self, group: BlockGroup) -> None:
        """Rounds the merged parameters once, keeps them, and gives the student what was kept: the next blocks then see the model
        that is saved."""
        merged, rows = {}, {}
        for inner, parameter in group.parameters.items():
            planned = self._by_name[parameter.name]
            student = group.student.get_parameter(inner)
            value = self.initial.follow(planned, student.detach())
            merged[parameter.name] = self._rounded(planned, value)
            student.copy_(merged[parameter.name])
            rows[parameter.name] = parameter_row(planned, parameter, value)
        report = {"block": group.report, "parameters": rows}
        self.store.put(group.name, merged, report)
        self._note(group.name, report)

    def _note(self, block: str, report: dict[str, Any]) -> None:
        self.report.blocks[block] = report["block"]
        self.report.parameters.update(report["parameters"])

    def _round(self, student: nn.Module, block: str) -> None:
        for name in self._merged_names(block):
            parameter = student.get_parameter(name.removeprefix(f"{block}."))
            parameter.copy_(parameter.to(self._by_name[name].info.dtype))

    def _rounded(self, planned: PlannedParameter, value: Tensor) -> Tensor:
        result = value.to(planned.info.dtype)
        if not bool(torch.isfinite(result).all()):
            raise NonFiniteError(
                f"Merging '{planned.name}' with '{self.plan.config.merge_type}' gave NaN or infinity: check its settings and the "
                "calibration samples."
            )
        return result.cpu()

    def _block_norms(self, blocks: Sequence[str]) -> dict[str, float]:
        """The root of Σ_i ‖τ_i‖² of every block."""
        squares = dict.fromkeys(blocks, 0.0)
        for block in blocks:
            for name in self._merged_names(block):
                planned = self._by_name[name]
                base = self.plan.base.read(planned.base).float()
                for source, inner in zip(self.plan.experts, planned.experts, strict=True):
                    squares[block] += float(torch.linalg.vector_norm(source.read(inner).float() - base)) ** 2
        return {block: square**0.5 for block, square in squares.items()}

    # -- the values of the merged model ---------------------------------------------------------------------------

    def student_value(self, name: str, blocks: frozenset[str]) -> Tensor | None:
        """What the merged model starts from: outside of blocks its final values."""
        if name not in self._by_name:
            name = self.plan.target.tied_stand_in(name) or name
        planned = self._by_name.get(name)
        if planned is None:
            return None
        if any(name.startswith(f"{block}.") for block in blocks):
            value = self.initial.merge_parameter(name)
            return value if is_left_to_method(self.plan, planned) else value.to(planned.info.dtype)
        if name not in self._outside:
            self._outside[name] = self._result(name)
        return self._outside[name]

    def _result(self, name: str) -> Tensor:
        """The final value of a parameter, in its output dtype."""
        if self.store.has(name):
            return self.store.read(name)
        if name in self._outside:
            return self._outside[name]
        planned = self._by_name[name]
        value = self.initial.merge_parameter(name)
        result = self._rounded(planned, self.initial.follow(planned, value)) if value.is_floating_point() else value
        self.report.parameters[name] = self.initial.report.parameters[name]
        return result

    @cached_property
    def identity(self) -> str:
        """Identifies what is computed: recipe, models, samples and precision."""
        content = [
            __version__,
            self.plan.config.to_dict(),
            self.plan.to_dict()["parameters"],
            [source.fingerprint() for source in self.plan.sources],
            self.samples.fingerprint(),
            [self.options.bf16, self.options.gradient_accumulation_steps, self.options.cache_dtype, self.options.seed],
        ]
        return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


@dataclass(frozen=True)
class _Stage:
    """The next block, and the batches of each task that have reached it."""

    block: str
    keys: list[list[Key]]


class _Models:
    """The merged model and the experts, as they run through the blocks together."""

    def __init__(self, engine: BlockwiseEngine):
        plan, options = engine.plan, engine.options
        self.engine = engine
        self.method = engine.method
        batches = engine.samples.batches(plan.config.batch_size)
        self.batches = {(task, i): batch for task, one in enumerate(batches) for i, batch in enumerate(one)}
        common = (engine.cache, engine.device, options.bf16)
        target = plan.target
        blocks: set[str] = set()
        self.student = open_runner(
            "the merged model",
            target.model_class,
            target.config,
            lambda name: engine.student_value(name, frozenset(blocks)),
            self.batches if self.method.reads_student else {},
            *common,
        )
        blocks.update(self.student.reentry.blocks)
        self.experts = [
            open_runner(
                str(source),
                source.model_class,
                source.config,
                _reader(source),
                {key: batch for key, batch in self.batches.items() if self.method.reads_teachers and key[0] == task},
                *common,
            )
            for task, source in enumerate(plan.experts)
        ]
        self._expert_names = [_translation(target, self.student, s, r) for s, r in zip(plan.experts, self.experts)]
        reference = plan.experts[0]
        first = {key: batch for key, batch in self.batches.items() if key[0] == 0}
        self.reference = open_runner(
            str(reference), reference.model_class, reference.config, _reader(reference), first, *common[:2], False
        )

    @property
    def blocks(self) -> list[str]:
        """All blocks by the merged model's names, in order."""
        return list(self.student.reentry.blocks)

    def next_stage(self) -> _Stage | None:
        """Runs everything up to its next block and picks the first of these blocks."""
        found: dict[Key, str] = self.student.advance() if self.method.reads_student else {}
        if self.method.reads_teachers:
            theirs = {}
            for names, runner in zip(self._expert_names, self.experts, strict=True):
                back = {theirs: ours for ours, theirs in names.items()}
                theirs.update({key: back[block] for key, block in runner.advance().items()})
            if self.method.reads_student and theirs != found:
                raise UnsupportedModelError("The experts and the merged model run their blocks in different orders.")
            found = theirs
        if not found:
            return None
        block = min(found.values(), key=self.student.reentry.order.__getitem__)
        tasks = range(len(self.experts))
        return _Stage(block, [[key for key in found if key[0] == task and found[key] == block] for task in tasks])

    def release_experts(self, block: str) -> None:
        """Frees the weights of a block of each expert before its time."""
        for names, runner in zip(self._expert_names, self.experts, strict=True):
            runner.release_block(names[block])

    @contextmanager
    def resident(self, block: str) -> Iterator[tuple[nn.Module, list[nn.Module]]]:
        """One block of the merged model and of each expert, with its weights."""
        with ExitStack() as stack, torch.no_grad():
            student = stack.enter_context(self.student.block_resident(block))
            experts = [
                stack.enter_context(runner.block_resident(names[block]))
                for names, runner in zip(self._expert_names, self.experts, strict=True)
            ]
            yield student, experts


class _Activations(BlockActivations):
    """What reaches one block."""

    def __init__(self, models: _Models, stage: _Stage, student: nn.Module, experts: Sequence[nn.Module]):
        self.models = models
        self.stage = stage
        self.batches = [len(keys) for keys in stage.keys]
        self._student = student
        self._experts = experts
        self._targets: dict[Key, CachedTensor] = {}
        decoder = models.engine.plan.target.shell.config.is_encoder_decoder and _in_decoder(models, stage.block)
        self._is_decoder = bool(decoder)

    def student(self, task: int, index: int) -> BlockInputs:
        return self._inputs(self.models.student, task, index)

    def teacher(self, task: int, index: int) -> BlockInputs:
        return self._inputs(self.models.experts[task], task, index)

    def _inputs(self, runner: BlockRunner, task: int, index: int) -> BlockInputs:
        key = self.stage.keys[task][index]
        call = runner.call(key)
        hidden = next(
            v for v in (*call.args, *call.kwargs.values()) if isinstance(v, Tensor) and v.is_floating_point()
        )
        mask = self.models.batches[key].token_mask(hidden.shape, self._is_decoder)
        return BlockInputs(task, index, call.args, call.kwargs, mask if mask is None else mask.to(hidden.device))

    def run(self, module: nn.Module, inputs: BlockInputs) -> Tensor:
        return main_output(self.models.student.run(module, inputs.args, inputs.kwargs)).float()

    def run_teacher(self, task: int, index: int) -> None:
        key = self.stage.keys[task][index]
        if key not in self._targets:
            self._targets[key] = self.models.experts[task].push(key, self._experts[task])

    def target(self, task: int, index: int) -> Tensor:
        return self._targets[self.stage.keys[task][index]].load(self.models.engine.device)

    def push(self) -> None:
        """Takes every batch through the block."""
        for task, keys in enumerate(self.stage.keys):
            for index, key in enumerate(keys):
                if self.models.method.reads_teachers:
                    self.run_teacher(task, index)
                if self.models.method.reads_student:
                    self.models.student.push(key, self._student)
        self._targets.clear()


def _in_decoder(models: _Models, block: str) -> bool:
    decoder = models.student.model.get_decoder()
    module = models.student.reentry.blocks[block]
    return any(module is other for other in decoder.modules())


def _reader(source: ModelSource):
    def read(name: str) -> Tensor | None:
        stored = name if name in source.parameters else source.tied_stand_in(name)
        return None if stored is None else source.read(stored)

    return read


def _translation(
    target: ModelSource, student: BlockRunner, source: ModelSource, runner: BlockRunner
) -> dict[str, str]:
    """The blocks of the merged model by name -> those of an expert, whose class may be another over the same backbone."""
    theirs = {source.anatomy.canonical(name): name for name in runner.reentry.blocks}
    return {name: theirs[target.anatomy.canonical(name)] for name in student.reentry.blocks}
