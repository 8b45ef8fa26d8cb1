"""The block-wise engine: merges one block after another from the activations of calibration samples.

The merged model and each expert run their own forward up to the next block; one block of the base and of each expert is in
memory at a time, and a finished block is kept in its output dtype, in memory or on disk. What is outside of the blocks is
merged without data first.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
import time
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import __version__
from ..checkpoints.folder import space_problems
from ..checkpoints.names import SaveGroup
from ..checkpoints.shards import partial_of
from ..data.calibration import CalibrationData
from ..errors import NonFiniteError, PlanError
from ..methods.base import TensorGroup
from ..methods.block_base import BlockGroup, BlockMethod
from ..modeling.residency import return_memory
from ..registry import get_merge_method
from .block_models import BlockModels, Stage, StageActivations
from .block_store import BlockStore
from .calibrated import initial_plan, is_left_to_method, parameter_row, task_model
from .data_parallel import RankMonitor, check_samples, own_batches
from .division import gather_report
from .estimate_blocks import activations_on_disk, finished_blocks
from .head_fitting import HeadFitter, LazyParameters, with_fitted_head
from .options import EngineOptions
from .placement import Placement
from .plan import MergePlan, PlannedParameter
from .report import MergeReport, peak_memory_bytes
from .sample_sizes import Samples
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
        self.ranks = self.options.ranks
        self.device = placement.device_of("")
        self.method: BlockMethod = get_merge_method(plan.config.merge_type).method_cls()
        self.initial = StreamingEngine(initial_plan(plan), placement)
        self.initial.ranks = self.ranks
        self.report = MergeReport(dropped=[vars(entry) for entry in plan.dropped], notes=list(plan.notes))
        self._by_name = {parameter.name: parameter for parameter in plan.parameters}
        self._outside: dict[str, Tensor] = {}
        self.samples = data.load([task_model(source) for source in plan.experts])
        if self.ranks.is_first:
            self._check_disks()
        self.cache = self.options.open_cache()
        self.monitor = self.options.monitor if self.ranks.size == 1 else RankMonitor(self.options.monitor, self.ranks)
        self.store = BlockStore(self.options.work_dir, self.identity, writes=self.ranks.is_first)

    def _check_disks(self) -> None:
        """The size of the samples is known now, so that their activations are counted, too.

        Raises:
            PlanError: A disk is too small.
        """
        plan, options = self.plan, self.options
        kept = activations_on_disk(plan, Samples.of(self.samples, plan.target.config), options)
        sizes = {options.work_dir or Path(tempfile.gettempdir(), "activations"): kept}
        if options.work_dir is not None:
            sizes[options.work_dir] += finished_blocks(plan)
        if options.output is not None:
            sizes[partial_of(options.output)] = plan.nbytes
        problems = space_problems(sizes) if kept else []
        if problems:
            raise PlanError(problems)

    def run(self, groups: list[SaveGroup], sink: Sink) -> MergeReport:
        """Merges all blocks, then writes every group that the sink wants. Ranks hold a part of the samples each, and rank 0 the
        finished blocks, which the others read from its work folder. The report is that of all ranks.

        Args:
            groups (`list[SaveGroup]`): Parameters that are written together, in the order of writing.
            sink ([`Sink`]): Where the tensors go.
        """
        start = time.perf_counter()
        check_samples(self.ranks, self.samples, self.options)
        self.store.follow(self.ranks.gather(self.store.finished)[0])
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
        gather_report(self.ranks, self.report, {})
        return self.report

    # -- the blocks -----------------------------------------------------------------------------------------------

    def _merge_blocks(self) -> None:
        batches = own_batches(self.ranks, self.samples.batches(self.plan.config.batch_size))
        models = BlockModels(
            self.plan, self.method, batches, self.student_value, self.cache, self.device, self.options
        )
        if self.options.self_check and self.ranks.is_first:
            models.reference.check()
        skipped = self.ranks.on_first(
            lambda: self.method.skip_blocks(self.plan.config, lambda: self._block_norms(models.blocks))
        )
        self.monitor.begin(len(models.blocks) - len(skipped))
        reached = set()
        while (stage := models.next_stage()) is not None:
            reached.add(stage.block)
            self._merge_block(models, stage, stage.block in skipped)
            return_memory()
        self.monitor.end()
        missed = [block for block in models.blocks if block not in reached]
        if missed:
            self.report.notes.append(
                f"No calibration sample reaches {', '.join(missed)}: merged by '{self.initial.plan.config.merge_type}'"
            )

    def _merge_block(self, models: BlockModels, stage: Stage, is_skipped: bool) -> None:
        with models.resident(stage.block) as (student, experts):
            activations = StageActivations(models, stage, student, experts)
            if stage.block in self.store:
                self._take_finished(stage.block, student)
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
        self, block: str, student: nn.Module, experts: Sequence[nn.Module], activations: StageActivations
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
            monitor=self.monitor,
            seed=self.plan.config.seed if self.options.seed is None else self.options.seed,
            accumulation=self.options.gradient_accumulation_steps,
        )

    @torch.no_grad()
    def _finish_block(self, group: BlockGroup) -> None:
        """Rounds the merged parameters once, keeps them, and gives the student what was kept: the next blocks then see the model
        that is saved. What rank 0 keeps is what all ranks see."""
        if self.ranks.is_first:
            self._keep(group)
        self.ranks.gather(None)
        self.store.follow([group.name])
        self._take_finished(group.name, group.student)

    def _take_finished(self, block: str, student: nn.Module) -> None:
        for name in self._merged_names(block):
            student.get_parameter(name.removeprefix(f"{block}.")).copy_(self.store.read(name))
        self._note(block, self.store.report(block))

    def _keep(self, group: BlockGroup) -> None:
        merged, rows = {}, {}
        for inner, parameter in group.parameters.items():
            planned = self._by_name[parameter.name]
            value = self.initial.follow(planned, group.student.get_parameter(inner).detach())
            merged[parameter.name] = self._rounded(planned, value)
            rows[parameter.name] = parameter_row(planned, parameter, value)
        self.store.put(group.name, merged, {"block": group.report, "parameters": rows})

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
