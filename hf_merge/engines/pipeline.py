"""The way of parameters through a merge: read, brought to a device, merged there, written. One thread for each of these, several of them
where there are several devices or processes; it knows nothing of what merging is."""

from __future__ import annotations

import logging
import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from ..checkpoints.names import SaveGroup
from ..checkpoints.shards import ShardWriter
from ..methods.groups import TensorGroup
from .forks import run_forked
from .placement import CPU, Placement
from .plan import MergePlan, PlannedParameter
from .reading import stays_in_files
from .report import MergeReport, peak_memory_bytes, process_memory
from .results import PartSink
from .transfer import Transfer, copies_ahead
from .workers import one_ahead, read_ahead, run_together


T = TypeVar("T")

logger = logging.getLogger(__name__)

READ_AHEAD = 2**26
"""How many bytes of stored tensors are read ahead of the groups being merged, for each device, by all processes of a merge together; each
reads at least one group ahead."""


_SHARES = 16
"""A parameter that is more than one of so many shares of what each process merges is large."""


class Sink(Protocol):
    """Where merged tensors go, by their names on disk."""

    def wants(self, keys: list[str]) -> bool: ...

    def write(self, key: str, tensor: Tensor) -> None: ...


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

    def fill_part(self, key: str, entries: Tensor, start: int) -> None:
        self.shards.fill_part(key, entries, start)

    def filled_part(self, key: str, start: int, count: int) -> Tensor:
        return self.shards.filled_part(key, start, count)

    def complete(self, key: str) -> None:
        """Left to the process that this one is a fork of."""


@dataclass
class Loaded:
    """The stored tensors of one parameter."""

    experts: list[Tensor]
    base: Tensor | None

    def mapped(self, function: Callable[[Tensor], Tensor]) -> Loaded:
        """The same with a function applied to what is computed with."""
        return Loaded([*map(function, self.experts)], None if self.base is None else function(self.base))


class Pipeline(ABC):
    """Takes groups of parameters from the models to a sink. A subclass says how one parameter is read and merged, and how a group is
    written.

    Args:
        plan ([`MergePlan`]): A checked plan.
        placement ([`Placement`]): Where the arithmetic of each parameter is done.
    """

    def __init__(self, plan: MergePlan, placement: Placement):
        self.plan = plan
        self.placement = placement
        self.num_proc = 1
        self.report = MergeReport(dropped=[vars(entry) for entry in plan.dropped], notes=list(plan.notes))
        self._by_name = {parameter.name: parameter for parameter in plan.parameters}
        self._opening = threading.Lock()
        self._transfers: dict[torch.device, Transfer] = {}
        self._out_of_memory: dict[str, torch.device] = {}

    @abstractmethod
    def read(self, parameter: PlannedParameter) -> Loaded:
        """The stored tensors of a parameter."""

    @abstractmethod
    def finish(self, parameter: PlannedParameter, loaded: Loaded, rounded: bool = True) -> Tensor:
        """The merged value on the CPU."""

    @abstractmethod
    def _group(self, parameter: PlannedParameter, loaded: Loaded) -> TensorGroup:
        """What a method is given, on the device of the parameter."""

    @abstractmethod
    def _write(
        self, group: SaveGroup, merged: Mapping[str, Tensor], sink: Sink, tell: Callable[[Written], Any]
    ) -> None:
        """Writes the merged parameters of a group and tells of each tensor."""

    def _fills(self, group: SaveGroup) -> bool:
        """Whether the parameter of a group is written piece by piece while it is merged, by [`~Pipeline._fill`]."""
        return False

    def _fill(self, group: SaveGroup, loaded: Mapping[str, Loaded], sink: PartSink) -> None:
        """Merges the parameter of a group into its place in a file."""
        raise NotImplementedError(f"{type(self).__name__} does not implement _fill")

    def _complete(self, group: SaveGroup, sink: ShardWriter | _Filler, tell: Callable[[Written], Any]) -> None:
        """Tells that the parameter of a group is in its place."""
        (key,) = group.disk
        sink.complete(key)
        tell(Written(key, {name: self.report.parameters[name] for name in group.names}))

    @abstractmethod
    def _noticed(self) -> dict[str, Any]:
        """What methods noticed, see [`TensorMethod.noticed`]."""

    @abstractmethod
    def _notice(self, noticed: Mapping[str, Any]) -> None:
        """Tells the methods what they noticed in another process."""

    # -- several devices ------------------------------------------------------------------------------------------

    def _merge(
        self, parts: Mapping[torch.device, Iterable[SaveGroup]], sink: Sink, tell: Callable[[Written], Any]
    ) -> None:
        """Merges the groups of every device, writes their tensors and tells of each that is written."""
        with ThreadPoolExecutor(1, "hf_merge-write") as writer:
            run_together(
                [partial(self._merge_part, device, part, sink, tell, writer) for device, part in parts.items()]
            )
        self.report.peak_memory_bytes = peak_memory_bytes()

    def _merge_part(
        self,
        device: torch.device,
        groups: Iterable[SaveGroup],
        sink: Sink,
        tell: Callable[[Written], Any],
        writer: ThreadPoolExecutor,
        stop: threading.Event,
    ) -> None:
        """Merges the groups of one device until something else fails; one result at a time waits to be written. What is written while
        it is merged leaves to the writer what may take long, the end of a file."""
        takes_parts = isinstance(sink, (ShardWriter, _Filler))
        writing: deque[Future] = deque()
        with closing(self._on_their_way(device, groups)) as arriving:
            for group, loaded in arriving:
                if stop.is_set():
                    return
                fills = takes_parts and self._fills(group)
                if fills:
                    self._fill(group, loaded, sink)
                else:
                    merged = {name: self.finish(self._by_name[name], tensors) for name, tensors in loaded.items()}
                del loaded  # before the next ones are read
                while writing and (writing[0].done() or not fills):
                    writing.popleft().result()
                if fills:
                    writing.append(writer.submit(self._complete, group, sink, tell))
                else:
                    writing.append(writer.submit(self._write, group, merged, sink, tell))
        while writing:
            writing.popleft().result()

    # -- several processes ----------------------------------------------------------------------------------------

    def _merge_forked(self, groups: list[SaveGroup], sink: ShardWriter, tell: Callable[[Written], Any]) -> None:
        """[`~Pipeline._merge`] in this process and in forks of it, which all fill the same files."""

        def work(part: Iterator[SaveGroup], tell: Callable[[Written], None]) -> tuple[dict, int]:
            before = process_memory()
            self._merge({CPU: part}, _Filler(sink), tell)
            return self._noticed(), self.report.peak_memory_bytes - before

        def told(written: Written) -> None:
            rows.update(written.rows)
            sink.complete(written.key)
            tell(written)

        rows = self.report.parameters
        _, *others = run_forked(min(self.num_proc, len(groups)), self._in_turn(groups), work, told)
        for noticed, grown in others:
            self._notice(noticed)
            self.report.peak_memory_bytes += grown

    def _in_turn(self, groups: list[SaveGroup]) -> list[SaveGroup]:
        """The groups in the order in which they are given out: first what would leave the other processes waiting, were it the last."""
        sizes = [sum(info.nbytes for info in group.disk.values()) for group in groups]
        limit = sum(sizes) // (_SHARES * self.num_proc)
        large = [group for group, nbytes in zip(groups, sizes, strict=True) if nbytes > limit]
        return large + [group for group, nbytes in zip(groups, sizes, strict=True) if nbytes <= limit]

    # -- reading and copying --------------------------------------------------------------------------------------

    def _on_their_way(
        self, device: torch.device, groups: Iterable[SaveGroup]
    ) -> Generator[tuple[SaveGroup, dict[str, Loaded]], None, None]:
        """The groups with their tensors, on the device where that is done ahead."""
        read = self._read_ahead(groups)
        return one_ahead(self._sent_ahead(device, read)) if copies_ahead(device) else read

    def _sent_ahead(
        self, device: torch.device, read: Iterable[tuple[SaveGroup, dict[str, Loaded]]]
    ) -> Generator[tuple[SaveGroup, dict[str, Loaded]], None, None]:
        send = self._transfer(device).send_ahead
        for group, loaded in read:
            for name, tensors in loaded.items():
                if self._device_of(name) == device:
                    # What does not fit beside the group before is sent when that one is gone.
                    with suppress(torch.OutOfMemoryError):
                        loaded[name] = tensors.mapped(send)
            yield group, loaded

    def _read_ahead(self, groups: Iterable[SaveGroup]) -> Generator[tuple[SaveGroup, dict[str, Loaded]], None, None]:
        if all(stays_in_files(self.plan, one, self._device_of(one.name)) for one in self.plan.parameters):
            return ((group, self._read_group(group)) for group in groups)  # which reads nothing yet
        return read_ahead(groups, self._read_group, self._stored_bytes, READ_AHEAD // self.num_proc)

    def _stored_bytes(self, group: SaveGroup) -> int:
        return sum(self._by_name[name].info.nbytes for name in group.names) * len(self.plan.sources)

    def _read_group(self, group: SaveGroup) -> dict[str, Loaded]:
        return {name: self.read(self._by_name[name]) for name in group.names}

    # -- devices --------------------------------------------------------------------------------------------------

    def _transfer(self, device: torch.device) -> Transfer:
        with self._opening:
            if device not in self._transfers:
                self._transfers[device] = Transfer(device)
            return self._transfers[device]

    def _device_of(self, name: str) -> torch.device:
        return CPU if name in self._out_of_memory else self.placement.device_of(name)

    def _on_device(self, parameter: PlannedParameter, loaded: Loaded, compute: Callable[[TensorGroup], T]) -> T:
        """What is computed of a parameter on its device; on the CPU when the memory of the device is too small for it."""
        device = self._device_of(parameter.name)
        try:
            return compute(self._group(parameter, loaded))
        except torch.OutOfMemoryError:
            if device == CPU:
                raise
        # Only here: the error holds the tensors that filled the memory.
        self._transfer(device).empty_cache()
        self._out_of_memory[parameter.name] = device
        if parameter.name in self.report.parameters:
            self.report.parameters[parameter.name]["out_of_memory"] = str(device)
        logger.warning("'%s' does not fit into the memory of %s: it is merged on the CPU.", parameter.name, device)
        return compute(self._group(parameter, loaded))
