"""The streaming engine: reads a parameter of every model, merges it, hands the result to a sink, and forgets it.

Reading, computing and writing overlap, and so do the devices, each of which has a thread that merges its parameters. What is in memory
at any time is bounded by a few parameters, never by the model. The engine knows no formulas and the methods know no files.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from ..checkpoints.memory import empty_tensor, keep_freed_blocks
from ..checkpoints.names import SaveGroup
from ..checkpoints.shards import ShardWriter
from ..checkpoints.stored import StoredTensor
from ..errors import NonFiniteError
from ..methods.base import Step, TensorGroup, TensorMethod, mean_steps, whole
from ..progress import progress
from ..registry import get_merge_method
from ..threads import one_thread
from .division import divide, gather_report
from .forks import can_fork, processors
from .norms import StepNorms, describe_non_finite, in_range, squared_norms
from .pieces import all_finite
from .pipeline import Loaded, Pipeline, Sink, Written
from .placement import CPU, Placement
from .plan import MergePlan, PlannedParameter
from .ranks import Ranks
from .reading import held_bytes, in_pieces, is_filled, sources_of, stays_in_files
from .report import MergeReport, peak_memory_bytes
from .results import FiledResult, HeldResult, PartSink, Result


logger = logging.getLogger(__name__)

SURVEYED_TOGETHER = 16
"""How many parameters each of several ranks looks at before they exchange what they saw: it bounds what is held of it."""


class StateDictSink:
    """A sink that keeps what it is given."""

    def __init__(self):
        self.tensors: dict[str, Tensor] = {}

    def wants(self, keys: list[str]) -> bool:
        return True

    def write(self, key: str, tensor: Tensor) -> None:
        self.tensors[key] = tensor


class StreamingEngine(Pipeline):
    """Runs a plan of data-free methods.

    **Attributes**:
        - **identity** (`str`) -- What the result depends on beside the plan: nothing.
        - **ranks** ([`Ranks`]) -- Those that run the same plan together, each with a sink that wants a part of it.
        - **num_proc** (`int`) -- How many processes of this machine merge into a folder, where [`~StreamingEngine.can_fork`].

    Args:
        plan ([`MergePlan`]): A checked plan.
        placement ([`Placement`]): Where the arithmetic of each parameter is done.
    """

    identity = ""

    def __init__(self, plan: MergePlan, placement: Placement):
        super().__init__(plan, placement)
        self.ranks = Ranks()
        self._methods: dict[str, TensorMethod] = {}

    def run(self, groups: list[SaveGroup], sink: Sink) -> MergeReport:
        """Merges every group that the sink wants and writes it. The report is that of all ranks.

        Args:
            groups (`list[SaveGroup]`): Parameters that are written together, in the order of writing.
            sink ([`Sink`]): Where the tensors go.
        """
        keep_freed_blocks()
        self.place(self.placement.over(self.plan, groups))
        pending = [group for group in groups if sink.wants(list(group.disk))]
        start = time.perf_counter()
        if any(self.ranks.gather(bool(pending))):
            self.survey()
        self.report.seconds["survey"] = time.perf_counter() - start
        start = time.perf_counter()
        self.report.peak_memory_bytes = peak_memory_bytes()
        sizes = {key: info.nbytes for group in pending for key, info in group.disk.items()}
        with progress(sum(sizes.values()), "Merging") as bar:
            if self.num_proc > 1 and len(pending) > 1 and isinstance(sink, ShardWriter) and self.can_fork():
                self._merge_forked(pending, sink, lambda written: bar.update(sizes[written.key]))
            else:
                self._merge(self.placement.by_device(pending), sink, lambda written: bar.update(sizes[written.key]))
        self._sort_rows(pending)
        self.report.seconds["merge"] = time.perf_counter() - start
        for part in gather_report(self.ranks, self.report, self._noticed()):
            self._notice(part)
        for remark in self.remarks():
            logger.warning(remark)
            self.report.notes.append(remark)
        return self.report

    def place(self, placement: Placement) -> None:
        """Changes where parameters are merged from now on."""
        self.placement = placement

    def _sort_rows(self, groups: list[SaveGroup]) -> None:
        """Brings the report's rows into the order of writing, whichever thread or process was first."""
        rows = self.report.parameters
        for name in dict.fromkeys(name for group in groups for name in group.names):
            rows[name] = rows.pop(name)

    def _noticed(self) -> dict[str, Any]:
        return {merge_type: method.noticed() for merge_type, method in self._methods.items()}

    def _notice(self, noticed: Mapping[str, Any]) -> None:
        for merge_type, what in noticed.items():
            self._method(merge_type).notice(what)

    def remarks(self) -> list[str]:
        """What the methods noticed over the whole merge."""
        return [remark for _, method in sorted(self._methods.items()) for remark in method.remarks()]

    # -- several processes ----------------------------------------------------------------------------------------

    def can_fork(self) -> bool:
        """Whether forks of this process can merge a part of the parameters: in pieces, which need no threads, from files or memory that forks can read, on the CPU."""
        return (
            can_fork()
            and all(source.is_as_stored and source.storage.is_on_cpu for source in self.plan.sources)
            and all(self.placement.device_of(name) == CPU for name in self._by_name)
            and all(
                parameter.action == "copy" or (in_pieces(parameter) and not parameter.then)
                for parameter in self.plan.parameters
            )
        )

    # -- reading --------------------------------------------------------------------------------------------------

    def read(self, parameter: PlannedParameter) -> Loaded:
        """The stored tensors of a parameter, in the order of the experts; where it is merged in pieces, still in their files."""
        in_files = stays_in_files(self.plan, parameter, self._device_of(parameter.name))
        stored = [
            source.stored(name) if in_files else source.read(name) for source, name in sources_of(self.plan, parameter)
        ]
        has_base = parameter.action != "copy" and len(stored) > len(parameter.experts)
        return Loaded(stored[:-1], stored[-1]) if has_base else Loaded(stored, None)

    # -- computing ------------------------------------------------------------------------------------------------

    def _method(self, merge_type: str) -> TensorMethod:
        with self._opening:
            if merge_type not in self._methods:
                method = self._methods[merge_type] = get_merge_method(merge_type).method_cls()
                method.has_spare_thread = self.num_proc < processors()
            return self._methods[merge_type]

    def _group(self, parameter: PlannedParameter, loaded: Loaded) -> TensorGroup:
        transfer = self._transfer(self._device_of(parameter.name))

        def bring(stored: Tensor | StoredTensor) -> Tensor | StoredTensor:
            if isinstance(stored, Tensor):  # it may be on another device, whose memory was too small
                return transfer.send(stored)
            return stored.to(stored.dtype) if held_bytes(self.plan, parameter) else stored

        sent = loaded.mapped(bring)
        return TensorGroup(
            name=parameter.name,
            kind=parameter.kind,
            stored_base=sent.base,
            stored_experts=sent.experts,
            expert_names=tuple(source.name for source in self.plan.experts),
            settings=parameter.settings,
            seed=self.plan.config.seed,
        )

    def survey(self) -> None:
        """Shows the whole model to the methods that ask for it."""
        by_method: dict[str, list[PlannedParameter]] = {}
        for parameter in self._surveyed():
            by_method.setdefault(parameter.settings.merge_type, []).append(parameter)
        for merge_type, parameters in by_method.items():
            method, settings = self._method(merge_type), parameters[0].settings
            for round in range(method.rounds(settings)):
                method.conclude(self._observations(method, parameters, round), round, settings)

    def _surveyed(self) -> list[PlannedParameter]:
        """The parameters that methods which ask for it are shown before the merge."""
        return [parameter for parameter in self.plan.parameters if parameter.action == "merge"]

    def _observations(
        self, method: TensorMethod, parameters: list[PlannedParameter], round: int
    ) -> Iterator[tuple[str, Any]]:
        total = sum(parameter.info.nbytes for parameter in parameters)
        together = SURVEYED_TOGETHER * self.ranks.size if self.ranks.size > 1 else len(parameters)
        with progress(total, f"Surveying ({round + 1})") as bar:
            for first in range(0, len(parameters), together):
                batch = parameters[first : first + together]
                for parameter, observation in zip(batch, self._observe(method, batch, round)):
                    yield parameter.name, observation
                    bar.update(parameter.info.nbytes)

    def _observe(self, method: TensorMethod, parameters: list[PlannedParameter], round: int) -> Iterator[Any]:
        """What a method observes, parameter by parameter, each of which one of the ranks looks at."""
        own = divide([parameter.info.nbytes for parameter in parameters], self.ranks.size)[self.ranks.rank]
        groups = [SaveGroup([parameters[index].name], {}, True) for index in own]
        observations = (
            self._on_device(self._by_name[name], tensors, partial(method.observe, round=round))
            for _, loaded in self._read_ahead(groups)
            for name, tensors in loaded.items()
        )
        if self.ranks.size == 1:
            return observations
        return chain.from_iterable(self.ranks.gather(list(observations)))

    @torch.no_grad()
    def finish(self, parameter: PlannedParameter, loaded: Loaded, rounded: bool = True) -> Tensor:
        """The merged value on the CPU, in its output dtype when `rounded`, else in that of the arithmetic."""
        row = self._begin(parameter)
        if parameter.action == "copy":
            stored = loaded.experts[0] if loaded.experts else loaded.base
            row["from"] = parameter.copy_from
            # A copy: a tensor of a model in memory must not become part of the result.
            return checked(parameter.name, stored.to("cpu", parameter.info.dtype, copy=True), parameter.copy_from)
        result, facts = self._on_device(parameter, loaded, lambda group: self._computed(parameter, group, rounded))
        row.update(facts)
        return result

    def _computed(
        self, parameter: PlannedParameter, group: TensorGroup, rounded: bool
    ) -> tuple[Tensor, dict[str, float]]:
        """The merged value on the CPU, and what the report says about it."""
        result = empty_tensor(parameter.info.shape, parameter.info.dtype if rounded else group.dtype)
        return result, self._compute(parameter, group, HeldResult(result))

    def _compute(self, parameter: PlannedParameter, group: TensorGroup, result: Result) -> dict[str, float]:
        """Merges a parameter into its result. Returns what the report says about it."""
        with one_thread() if in_pieces(parameter) and group.device == CPU else nullcontext():
            norms = [self._finish_step(parameter, group, result, step) for step in self._steps(parameter, group)]
        # What overflows the dtype of the result may have been corrected by a later step.
        if not all(in_range(one.own, result.dtype) for one in norms) and not all(map(all_finite, result.parts())):
            raise NonFiniteError(describe_non_finite(self.plan, parameter, group, torch.zeros(())))
        facts = {"norm": math.sqrt(max(0.0, math.fsum(one.added for one in norms)))}
        if group.stored_base is not None:
            facts["task_vector_norm"] = math.sqrt(max(0.0, math.fsum(one.distance for one in norms)))
        return facts | group.report

    def _steps(self, parameter: PlannedParameter, group: TensorGroup) -> Iterable[Step]:
        """The computation of a parameter, in steps."""
        if parameter.action == "mean":
            steps = mean_steps(group)
        else:
            steps = self._method(parameter.settings.merge_type).steps(group)
        if not parameter.then:
            return steps
        return [Step(group, lambda: self._follow(parameter, group, whole(group, steps)))]

    @torch.no_grad()
    def _finish_step(self, parameter: PlannedParameter, group: TensorGroup, result: Result, step: Step) -> StepNorms:
        """Merges one step into its place in the result, rounded once."""
        merged, base, start = step.merge(), step.group.base, step.group.offset
        norm, distance = squared_norms(merged, base, step.places)
        old_norm = old_distance = 0.0
        if step.places is None:
            result.put(merged.reshape(-1), start)
        else:
            entries, places = result.get(start, step.group.shape.numel()), step.places.to("cpu")
            old = entries[places].to(merged.device, merged.dtype)
            old_norm, old_distance = squared_norms(old, base, step.places)
            entries[places] = merged.to("cpu", entries.dtype)
            result.put(entries, start)
        if not in_range(norm, result.dtype) and not all_finite(merged):
            raise NonFiniteError(describe_non_finite(self.plan, parameter, group, merged))
        return StepNorms(norm, norm - old_norm, distance - old_distance)

    def _begin(self, parameter: PlannedParameter) -> dict[str, Any]:
        """The report's row of a parameter, with its method."""
        row = self._row(parameter)
        if parameter.action == "merge":
            row["method"] = parameter.settings.merge_type
        return row

    def _row(self, parameter: PlannedParameter) -> dict[str, Any]:
        """Begins the report's row of a parameter."""
        row: dict[str, Any] = {
            "kind": parameter.kind.value,
            "action": parameter.action,
            "treatment": parameter.treatment,
            "sources": {"experts": parameter.experts, "base": parameter.base},
        }
        if parameter.name in self._out_of_memory:
            row["out_of_memory"] = str(self._out_of_memory[parameter.name])
        self.report.parameters[parameter.name] = row
        return row

    def _follow(self, parameter: PlannedParameter, group: TensorGroup, merged: Tensor) -> Tensor:
        """The further recipes on a result: the result is their only expert, the base model stays."""
        for step in parameter.then:
            again = replace(group, stored_experts=[merged], expert_names=("merged",), settings=step)
            merged = self._method(step.merge_type)(again)
        return merged

    def follow(self, parameter: PlannedParameter, merged: Tensor) -> Tensor:
        """Applies the further recipes of a parameter to a value that was merged elsewhere."""
        if not parameter.then:
            return merged
        return self._on_device(parameter, self.read(parameter), lambda group: self._follow(parameter, group, merged))

    @torch.no_grad()
    def merge_parameter(self, name: str, rounded: bool = False) -> Tensor:
        """Reads and merges one parameter now, in its output dtype when `rounded`, else in that of the arithmetic."""
        parameter = self._by_name[name]
        return self.finish(parameter, self.read(parameter), rounded)

    # -- writing --------------------------------------------------------------------------------------------------

    def _fills(self, group: SaveGroup) -> bool:
        parameters = [self._by_name[name] for name in group.names]
        return type(self).finish is StreamingEngine.finish and is_filled(
            self.plan, parameters, group.is_plain, self._device_of(group.names[0])
        )

    @torch.no_grad()
    def _fill(self, group: SaveGroup, loaded: Mapping[str, Loaded], sink: PartSink) -> None:
        ((name, tensors),) = loaded.items()
        ((key, info),) = group.disk.items()
        parameter = self._by_name[name]
        row = self._begin(parameter)
        result = FiledResult(sink, key, info.numel, info.dtype)
        row.update(self._compute(parameter, self._group(parameter, tensors), result))

    def _write(
        self, group: SaveGroup, merged: Mapping[str, Tensor], sink: Sink, tell: Callable[[Written], Any]
    ) -> None:
        rows = {name: self.report.parameters[name] for name in group.names}  # told once
        for key, tensor in on_disk(self.plan, group, merged).items():
            sink.write(key, tensor)
            tell(Written(key, rows))
            rows = {}


def checked(name: str, tensor: Tensor, model: str) -> Tensor:
    """`tensor`, copied from `model`, or [`NonFiniteError`] when it holds NaN or infinity in its output dtype."""
    if not all_finite(tensor):
        dtype = str(tensor.dtype).removeprefix("torch.")
        raise NonFiniteError(
            f"The parameter '{name}' of '{model}' holds NaN or infinity, or is too large for {dtype}."
        )
    return tensor


def on_disk(plan: MergePlan, group: SaveGroup, merged: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a save group under their names on disk."""
    if group.is_plain:
        return {next(iter(group.disk)): merged[group.names[0]]}
    return plan.target.converter.to_disk(merged)
