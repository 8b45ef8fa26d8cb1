"""The streaming engine: reads a parameter of every model, merges it, hands the result to a sink, and forgets it.

Reading, computing and writing overlap. What is in memory at any time is bounded by a few parameters, never by the model.
The engine knows no formulas and the methods know no files.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers.utils import logging as transformers_logging

from ..checkpoints.conversion import SaveGroup
from ..checkpoints.memory import empty_tensor
from ..checkpoints.shards import ShardWriter
from ..checkpoints.source import ModelSource
from ..errors import NonFiniteError
from ..methods.base import ElementwiseMethod, Step, TensorGroup, TensorMethod, whole
from ..registry import get_merge_method
from .division import divide, gather_report
from .forks import can_fork, processors, run_forked
from .pieces import all_finite, one_thread, squared_norm
from .placement import Placement
from .plan import MergePlan, PlannedParameter
from .ranks import Ranks
from .report import MergeReport, peak_memory_bytes, process_memory


logger = logging.getLogger(__name__)

READ_AHEAD = 2**26
"""How many bytes of stored tensors all processes together read ahead of the groups being merged; each at least one group."""
SURVEYED_TOGETHER = 16
"""How many parameters each of several ranks looks at before they exchange what they saw: it bounds what is held of it."""


class Sink(Protocol):
    """Where merged tensors go, by their names on disk."""

    def wants(self, keys: list[str]) -> bool: ...

    def write(self, key: str, tensor: Tensor) -> None: ...


class StateDictSink:
    """A sink that keeps what it is given."""

    def __init__(self):
        self.tensors: dict[str, Tensor] = {}

    def wants(self, keys: list[str]) -> bool:
        return True

    def write(self, key: str, tensor: Tensor) -> None:
        self.tensors[key] = tensor


class Written(NamedTuple):
    """A tensor that was written: its name on disk, and the report's rows of the parameters that it is of."""

    key: str
    rows: dict[str, dict[str, Any]]


@dataclass
class _Filler:
    """A sink that fills shards without finishing them."""

    shards: ShardWriter

    def wants(self, keys: list[str]) -> bool:
        return self.shards.wants(keys)

    def write(self, key: str, tensor: Tensor) -> None:
        self.shards.fill(key, tensor)


@dataclass
class Loaded:
    """The stored tensors of one parameter."""

    experts: list[Tensor]
    base: Tensor | None


class StreamingEngine:
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
        self.plan = plan
        self.placement = placement
        self.ranks = Ranks()
        self.num_proc = 1
        self.report = MergeReport(dropped=[vars(entry) for entry in plan.dropped], notes=list(plan.notes))
        self._methods: dict[str, TensorMethod] = {}
        self._by_name = {parameter.name: parameter for parameter in plan.parameters}

    def run(self, groups: list[SaveGroup], sink: Sink) -> MergeReport:
        """Merges every group that the sink wants and writes it. The report is that of all ranks.

        Args:
            groups (`list[SaveGroup]`): Parameters that are written together, in the order of writing.
            sink ([`Sink`]): Where the tensors go.
        """
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
                self._merge(pending, sink, lambda written: bar.update(sizes[written.key]))
        self.report.seconds["merge"] = time.perf_counter() - start
        for part in gather_report(self.ranks, self.report, self._noticed()):
            self._notice(part)
        for remark in self.remarks():
            logger.warning(remark)
            self.report.notes.append(remark)
        return self.report

    def _merge(self, groups: Iterable[SaveGroup], sink: Sink, tell: Callable[[Written], Any]) -> None:
        """Merges groups, writes their tensors and tells of each that is written."""
        with ThreadPoolExecutor(1, "hf_merge-write") as writer:
            writing: Future | None = None
            for group, loaded in self._read_ahead(groups):
                merged = {name: self.finish(self._by_name[name], tensors) for name, tensors in loaded.items()}
                del loaded  # before the next ones are read
                if writing is not None:
                    writing.result()
                writing = writer.submit(self._write, group, merged, sink, tell)
            if writing is not None:
                writing.result()
        self.report.peak_memory_bytes = peak_memory_bytes()

    def _noticed(self) -> dict[str, Any]:
        return {merge_type: method.noticed() for merge_type, method in self._methods.items()}

    def _notice(self, noticed: Mapping[str, Any]) -> None:
        for merge_type, what in noticed.items():
            self._method(merge_type).notice(what)

    def remarks(self) -> list[str]:
        """What the methods noticed over the whole merge."""
        return [remark for method in self._methods.values() for remark in method.remarks()]

    # -- several processes ----------------------------------------------------------------------------------------

    def can_fork(self) -> bool:
        """Whether forks of this process can merge a part of the parameters: in pieces, which need no threads, from files, on the CPU."""
        return (
            can_fork()
            and all(type(source) is ModelSource for source in self.plan.sources)
            and all(self.placement.device_of(name).type == "cpu" for name in self._by_name)
            and all(
                parameter.action == "copy" or (self._in_pieces(parameter) and not parameter.then)
                for parameter in self.plan.parameters
            )
        )

    def _merge_forked(self, groups: list[SaveGroup], sink: ShardWriter, tell: Callable[[Written], Any]) -> None:
        """[`~StreamingEngine._merge`] in this process and in forks of it, which all fill the same files."""

        def work(part: Iterator[SaveGroup], tell: Callable[[Written], None]) -> tuple[dict, int]:
            before = process_memory()
            self._merge(part, _Filler(sink), tell)
            return self._noticed(), self.report.peak_memory_bytes - before

        def told(written: Written) -> None:
            rows.update(written.rows)
            sink.complete(written.key)
            tell(written)

        rows = self.report.parameters
        _, *others = run_forked(min(self.num_proc, len(groups)), groups, work, told)
        for noticed, grown in others:
            self._notice(noticed)
            self.report.peak_memory_bytes += grown
        self.report.parameters = {name: rows[name] for group in groups for name in group.names}

    # -- reading --------------------------------------------------------------------------------------------------

    def _read_ahead(self, groups: Iterable[SaveGroup]) -> Iterator[tuple[SaveGroup, dict[str, Loaded]]]:
        """The groups with their tensors, the next ones being read while the current one is used."""
        with ThreadPoolExecutor(1, "hf_merge-read") as reader:
            waiting: list[tuple[SaveGroup, Future]] = []
            remaining = iter(groups)
            following = next(remaining, None)
            try:
                while waiting or following is not None:
                    while following is not None and (
                        not waiting or self._stored_bytes(waiting, following) <= READ_AHEAD // self.num_proc
                    ):
                        waiting.append((following, reader.submit(self._read_group, following.names)))
                        following = next(remaining, None)
                    group, future = waiting.pop(0)
                    yield group, future.result()
                    del future
            finally:
                for _, future in waiting:
                    future.cancel()

    def _stored_bytes(self, waiting: list[tuple[SaveGroup, Future]], following: SaveGroup) -> int:
        names = [name for group, _ in waiting for name in group.names] + following.names
        return sum(self._by_name[name].info.nbytes for name in names) * len(self.plan.sources)

    def _read_group(self, names: list[str]) -> dict[str, Loaded]:
        return {name: self.read(self._by_name[name]) for name in names}

    def read(self, parameter: PlannedParameter) -> Loaded:
        """The stored tensors of a parameter, in the order of the experts."""
        base = self.plan.base
        if parameter.action == "copy":
            if parameter.copy_from == "base":
                return Loaded([], base.read(parameter.base))
            source = next(source for source in self.plan.experts if source.name == parameter.copy_from)
            index = self.plan.experts.index(source) if len(parameter.experts) > 1 else 0
            return Loaded([source.read(parameter.experts[index])], None)
        experts = [source.read(name) for source, name in zip(self.plan.experts, parameter.experts, strict=True)]
        return Loaded(experts, base.read(parameter.base) if parameter.base is not None and base is not None else None)

    # -- computing ------------------------------------------------------------------------------------------------

    def _method(self, merge_type: str) -> TensorMethod:
        if merge_type not in self._methods:
            method = self._methods[merge_type] = get_merge_method(merge_type).method_cls()
            method.has_spare_thread = self.num_proc < processors()
        return self._methods[merge_type]

    def _group(self, parameter: PlannedParameter, loaded: Loaded) -> TensorGroup:
        device = self.placement.device_of(parameter.name)
        return TensorGroup(
            name=parameter.name,
            kind=parameter.kind,
            stored_base=loaded.base.to(device) if loaded.base is not None else None,
            stored_experts=[tensor.to(device) for tensor in loaded.experts],
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
            method.observe(self._group(self._by_name[name], tensors), round)
            for _, loaded in self._read_ahead(groups)
            for name, tensors in loaded.items()
        )
        if self.ranks.size == 1:
            return observations
        return chain.from_iterable(self.ranks.gather(list(observations)))

    @torch.no_grad()
    def finish(self, parameter: PlannedParameter, loaded: Loaded, rounded: bool = True) -> Tensor:
        """The merged value on the CPU, in its output dtype when `rounded`, else in that of the arithmetic."""
        row = self._row(parameter)
        if parameter.action == "copy":
            stored = loaded.experts[0] if loaded.experts else loaded.base
            row["from"] = parameter.copy_from
            # A copy: a tensor of a model in memory must not become part of the result.
            return checked(parameter.name, stored.to("cpu", parameter.info.dtype, copy=True), parameter.copy_from)
        group = self._group(parameter, loaded)
        if parameter.action == "merge":
            row["method"] = parameter.settings.merge_type
        result = empty_tensor(parameter.info.shape, parameter.info.dtype if rounded else group.dtype)
        with one_thread() if self._in_pieces(parameter) else nullcontext():
            steps = self._steps(parameter, group)
            norms = [self._finish_step(parameter, group, result.view(-1), step) for step in steps]
        # What overflows the dtype of the result may have been corrected by a later step.
        if not all(one.own < _largest_square(result.dtype) for one in norms) and not all_finite(result):
            raise NonFiniteError(self._describe_non_finite(parameter, group, torch.zeros(())))
        row["norm"] = math.sqrt(max(0.0, math.fsum(one.added for one in norms)))
        if group.stored_base is not None:
            row["task_vector_norm"] = math.sqrt(max(0.0, math.fsum(one.distance for one in norms)))
        row.update(group.report)
        return result

    def _in_pieces(self, parameter: PlannedParameter) -> bool:
        """Whether the parameter is merged in many short operations."""
        method = get_merge_method(parameter.settings.merge_type).method_cls
        return parameter.action == "mean" or issubclass(method, ElementwiseMethod)

    def _steps(self, parameter: PlannedParameter, group: TensorGroup) -> Iterable[Step]:
        """The computation of a parameter, in steps."""
        if parameter.action == "mean":
            steps = (Step(piece, piece.mean) for piece in group.pieces())
        else:
            steps = self._method(parameter.settings.merge_type).steps(group)
        if not parameter.then:
            return steps
        return [Step(group, lambda: self._follow(parameter, group, whole(group, steps)))]

    @torch.no_grad()
    def _finish_step(self, parameter: PlannedParameter, group: TensorGroup, result: Tensor, step: Step) -> StepNorms:
        """Merges one step into its place in the result, rounded once."""
        merged, base = step.merge(), step.group.base
        norm, distance = self._norms(merged, base, step.places)
        if step.places is not None:
            entries = result[(step.places + step.group.offset).to(result.device)].to(merged.device, merged.dtype)
            old_norm, old_distance = self._norms(entries, base, step.places)
        else:
            old_norm = old_distance = 0.0
        step.put(merged, result)
        if not norm < _largest_square(result.dtype) and not all_finite(merged):
            raise NonFiniteError(self._describe_non_finite(parameter, group, merged))
        return StepNorms(norm, norm - old_norm, distance - old_distance)

    @staticmethod
    def _norms(merged: Tensor, base: Tensor | None, places: Tensor | None) -> tuple[float, float]:
        """The squared norms of merged values and of their distance to the base model's."""
        if base is None:
            return squared_norm(merged), 0.0
        return squared_norm(merged), squared_norm(merged - (base if places is None else base.reshape(-1)[places]))

    def _row(self, parameter: PlannedParameter) -> dict[str, Any]:
        """Begins the report's row of a parameter."""
        row: dict[str, Any] = {
            "kind": parameter.kind.value,
            "action": parameter.action,
            "treatment": parameter.treatment,
            "sources": {"experts": parameter.experts, "base": parameter.base},
        }
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
        return self._follow(parameter, self._group(parameter, self.read(parameter)), merged)

    @torch.no_grad()
    def merge_parameter(self, name: str, rounded: bool = False) -> Tensor:
        """Reads and merges one parameter now, in its output dtype when `rounded`, else in that of the arithmetic."""
        parameter = self._by_name[name]
        return self.finish(parameter, self.read(parameter), rounded)

    def _describe_non_finite(self, parameter: PlannedParameter, group: TensorGroup, merged: Tensor) -> str:
        sources = [
            source for source, tensor in zip(self.plan.experts, group.experts()) if not torch.isfinite(tensor).all()
        ]
        if sources:
            return f"The parameter '{parameter.name}' of {', '.join(map(str, sources))} holds NaN or infinity."
        if group.base is not None and not torch.isfinite(group.base).all():
            return f"The parameter '{parameter.name}' of the base model holds NaN or infinity."
        if torch.isfinite(merged).all():
            dtype = str(parameter.info.dtype).removeprefix("torch.")
            return f"The merged parameter '{parameter.name}' is too large for {dtype}: pass dtype='bfloat16' or 'float32'."
        return f"Merging '{parameter.name}' with '{parameter.settings.merge_type}' gave NaN or infinity: check its settings."

    # -- writing --------------------------------------------------------------------------------------------------

    def _write(
        self, group: SaveGroup, merged: Mapping[str, Tensor], sink: Sink, tell: Callable[[Written], Any]
    ) -> None:
        rows = {name: self.report.parameters[name] for name in group.names}
        for key, tensor in on_disk(self.plan, group, merged).items():
            sink.write(key, tensor)
            tell(Written(key, rows))


class StepNorms(NamedTuple):
    """The squared norm of the values of a step, and what the step adds to the squared norms of the parameter and of its distance to the
    base model's."""

    own: float
    added: float
    distance: float


def _largest_square(dtype: torch.dtype) -> float:
    """No entry of a tensor whose squared norm is below this is out of the range of `dtype`."""
    largest = torch.finfo(dtype).max if dtype.is_floating_point else 0.0
    return largest * largest


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


def progress(total: int, phase: str) -> tqdm:
    """A progress bar in bytes, hidden when transformers' progress bars are."""
    hidden = not transformers_logging.is_progress_bar_enabled()
    return tqdm(total=total, desc=phase, unit="B", unit_scale=True, disable=hidden or None)
