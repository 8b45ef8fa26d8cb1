"""What a merge takes, from its plan: bytes read and written, peak memory of every device, disk. Time is measured by `timing.py`.

The memory of the streaming engine is that of its loop, gone through without reading anything; that of the block-wise engine is
in `estimate_blocks.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..checkpoints.names import SaveGroup
from ..checkpoints.storage import StateDictStorage
from ..methods.base import FLOAT32, ElementwiseMethod, TensorMethod
from ..methods.groups import LARGE_PIECE
from ..registry import get_merge_method
from .forks import MOST_PROCESSES, free_memory, processors
from .pipeline import READ_AHEAD
from .placement import CPU, Placement
from .plan import MergePlan, PlannedParameter
from .reading import held_bytes, is_filled, sources_of, stays_in_files
from .report import process_memory
from .transfer import STAGED, copies_ahead


NOT_FORKED = "num_proc={} has no effect: this merge is not divided among forks"
FORK = 35 << 20
"""Bytes of a fork beside what it merges: what Python writes when it reads, and what the fork touches of the libraries; measured."""


@dataclass
class Estimate:
    """What a merge is expected to take. Print it to read it.

    **Attributes**:
        - **bytes_read** (`int`) -- From the models' files, surveys included.
        - **bytes_written** (`int`) -- Of the result.
        - **disk** (`int`) -- Bytes on the disk of the output before the merge is complete: the result, and finished blocks.
        - **memory** (`dict[str, int]`) -- The peak of each device in bytes; on `"cpu"` with the process as it is now. Empty where
          it is not known.
        - **num_proc** (`int`) -- How many processes of this machine merge.
        - **seconds** (`float`, *optional*) -- Wall time, extrapolated from merging small random tensors on this machine.
        - **notes** (`list[str]`) -- What the figures leave out.
    """

    bytes_read: int
    bytes_written: int
    disk: int
    memory: dict[str, int] = field(default_factory=dict)
    num_proc: int = 1
    seconds: float | None = None
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [
            f"  estimate: reads {size(self.bytes_read)}, writes {size(self.bytes_written)}, needs {size(self.disk)} of disk"
        ]
        if self.memory:
            devices = ", ".join(f"{size(nbytes)} on {device}" for device, nbytes in self.memory.items())
            processes = f", in {self.num_proc} processes" if self.num_proc > 1 else ""
            lines.append(f"  estimate: peak memory {devices}{processes}")
        if self.seconds is not None:
            lines.append(f"  estimate: about {duration(self.seconds)}")
        return "\n".join(lines + [f"  estimate: {note}" for note in self.notes])

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready data."""
        return dict(vars(self))


def together(estimates: Sequence[Estimate]) -> Estimate:
    """What several merges take, one after another, when their results make one folder."""
    devices = {device for one in estimates for device in one.memory}
    is_known = all(one.memory for one in estimates)
    seconds = [one.seconds for one in estimates]
    return Estimate(
        sum(one.bytes_read for one in estimates),
        sum(one.bytes_written for one in estimates),
        sum(one.disk for one in estimates),
        memory={device: max(one.memory.get(device, 0) for one in estimates) for device in devices} if is_known else {},
        num_proc=max(one.num_proc for one in estimates),
        seconds=sum(seconds) if None not in seconds else None,
        notes=list(dict.fromkeys(note for one in estimates for note in one.notes)),
    )


def size(nbytes: int) -> str:
    """Bytes in words, in units of 1000."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9)):
        if nbytes >= scale:
            return f"{nbytes / scale:.1f} {unit}"
    return f"{nbytes / 1e6:.1f} MB"


def duration(seconds: float) -> str:
    """Seconds in words."""
    if seconds < 120:
        return f"{max(seconds, 1):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def traffic(plan: MergePlan, by_parameter: bool = True) -> Estimate:
    """What a merge reads and writes.

    Args:
        plan ([`MergePlan`]): A plan without problems.
        by_parameter (`bool`): Whether what the plan names for every parameter is read, once and once more for each survey; else
            every model as a whole.
    """
    if by_parameter:
        heads = sum(info.nbytes for head in plan.heads.values() for info in head.outputs.values())
        read = heads + sum(stored_bytes(plan, one) * (1 + surveys(one)) for one in plan.parameters)
    else:
        read = sum(info.nbytes for source in plan.sources for info in source.parameters.values())
    estimate = Estimate(read, plan.nbytes, plan.nbytes)
    if not all(source.is_as_stored for source in plan.sources):
        estimate.notes.append("adapters, nested recipes and other vocabularies are counted as models of full size")
    return estimate


def surveys(parameter: PlannedParameter) -> int:
    """How many times a parameter is read before it is merged."""
    method = get_merge_method(parameter.settings.merge_type).method_cls
    if parameter.action != "merge" or not issubclass(method, TensorMethod):
        return 0
    return method().rounds(parameter.settings)


def stored_bytes(plan: MergePlan, parameter: PlannedParameter) -> int:
    """Bytes of the stored tensors of a parameter."""
    return sum(source.parameters[name].nbytes for source, name in sources_of(plan, parameter))


def loaded_bytes(plan: MergePlan, parameter: PlannedParameter) -> int:
    """The same without tensors that are in memory anyway."""
    return sum(
        source.parameters[name].nbytes
        for source, name in sources_of(plan, parameter)
        if not isinstance(source.storage, StateDictStorage) or source.is_adapter
    )


def read_bytes(plan: MergePlan, parameter: PlannedParameter, device: torch.device) -> int:
    """The same without what is read in pieces while it is merged on a device, which the working memory has."""
    if stays_in_files(plan, parameter, device):
        return held_bytes(plan, parameter)
    return loaded_bytes(plan, parameter)


def working_memory(plan: MergePlan, parameter: PlannedParameter, on_cpu: bool = True) -> int:
    """Bytes that the method holds beside stored tensors and result while it merges a parameter."""
    if parameter.action != "merge":
        return 0
    held = 0
    for settings, experts in ((parameter.settings, len(plan.experts)), *((step, 1) for step in parameter.then)):
        method = get_merge_method(settings.merge_type).method_cls
        one = method.working_memory(parameter.kind, parameter.info.shape, experts, settings)
        if not on_cpu and issubclass(method, ElementwiseMethod):
            one += FLOAT32 * min(parameter.info.numel, LARGE_PIECE) * (experts + 6)
        held = max(held, one)
    return held + (2 * FLOAT32 * parameter.info.numel if parameter.then else 0)


def streaming_memory(
    plan: MergePlan, placement: Placement, groups: Sequence[SaveGroup], num_proc: int = 1
) -> dict[str, int]:
    """The peak of every device over the loop of [`StreamingEngine.run`], of all processes together.

    Args:
        plan ([`MergePlan`]): A plan of data-free methods.
        placement ([`Placement`]): Where the arithmetic is done.
        groups (`Sequence[SaveGroup]`): What is written, in order.
        num_proc (`int`): How many processes merge.
    """
    placement = placement.over(plan, groups)
    parts = placement.by_device(groups)
    peaks = {"cpu": process_memory() + (num_proc - 1) * FORK}
    for device, part in parts.items():
        # Nobody knows which of several devices is how far: all of them are counted at their peak.
        for name, nbytes in _peaks(plan, placement, device, part, num_proc if len(parts) == 1 else 1).items():
            peaks[name] = peaks.get(name, 0) + nbytes
    return peaks


def _peaks(
    plan: MergePlan, placement: Placement, device: torch.device, groups: Sequence[SaveGroup], num_proc: int
) -> dict[str, int]:
    """The peaks of the host and of one device over the groups of that device."""
    held, total = [0] * num_proc, 0
    peaks = dict.fromkeys(("cpu", str(device)), 0)
    timeline = _timeline(plan, placement, device, groups, num_proc)
    for _, process, on_host, on_device in sorted(timeline, key=lambda event: event[0]):
        total += on_host - held[process]
        held[process] = on_host
        peaks["cpu"] = max(peaks["cpu"], total)
        if device != CPU:
            peaks[str(device)] = max(peaks[str(device)], on_device)
    peaks["cpu"] += 2 * STAGED if copies_ahead(device) else 0
    return peaks


def _timeline(
    plan: MergePlan, placement: Placement, device: torch.device, groups: Sequence[SaveGroup], num_proc: int
) -> Iterator[tuple[int, int, int, int]]:
    """When a process begins with a group, counted in bytes, and what the host and the device hold until the next one: the group as
    stored and as a result, what the method holds, the groups that are read or copied ahead, and the result before, which is being
    written."""
    by_name = {parameter.name: parameter for parameter in plan.parameters}
    written = [sum(by_name[name].info.nbytes for name in group.names) for group in groups]
    results = [
        0 if is_filled(plan, [by_name[name] for name in group.names], group.is_plain, device) else nbytes
        for group, nbytes in zip(groups, written, strict=True)
    ]
    parts: list[list[int]] = [[] for _ in range(num_proc)]
    clocks = [0] * num_proc
    starts = []
    for index, result in enumerate(written):
        process = clocks.index(min(clocks))  # the one that asks first
        parts[process].append(index)
        starts.append(clocks[process])
        clocks[process] += result
    ahead = int(copies_ahead(device))
    for process, part in enumerate(parts):
        loaded = [sum(read_bytes(plan, by_name[name], device) for name in groups[index].names) for index in part]
        read = _read_by_then([written[index] * len(plan.sources) for index in part], ahead, READ_AHEAD // num_proc)
        there = [
            _on_device(plan, placement, device, [by_name[name] for name in groups[index].names]) for index in part
        ]
        before = 0
        for place, index in enumerate(part):
            working, stored = there[place]
            on_device = working + stored + sum(arriving for _, arriving in there[place + 1 : place + 1 + ahead])
            on_host = sum(loaded[place + ahead : read[place]]) + before
            on_host += results[index] * (1 if groups[index].is_plain else 2) + (working if device == CPU else 0)
            yield starts[index], process, on_host, on_device
            before = results[index]
        yield clocks[process], process, 0, 0


def _read_by_then(sizes: Sequence[int], ahead: int, limit: int) -> list[int]:
    """How many groups have been read when each of them is merged and so many more are asked for, by the rule of `read_ahead`."""
    read = waiting = 0
    found = []
    for asked, nbytes in enumerate(sizes):
        while read < len(sizes) and (read <= asked or waiting + sizes[read] <= limit):
            waiting += sizes[read]
            read += 1
        waiting -= nbytes
        found.append(read)
    return found[ahead:] + [len(sizes)] * ahead


def count_processes(
    plan: MergePlan, placement: Placement, groups: Sequence[SaveGroup], num_proc: int | str | None, ranks: int = 1
) -> int:
    """How many processes of this machine a merge uses.

    Args:
        plan, placement, groups: As in [`streaming_memory`].
        num_proc (`int` or `str`, *optional*): A number; `"auto"` for one on each processor, up to [`MOST_PROCESSES`] and as many as half
            of the free memory is enough for, and one in a job of several ranks; `None` for one.
        ranks (`int`): How many there are.
    """
    if num_proc != "auto":
        return num_proc or 1
    most = min(processors(), MOST_PROCESSES, len(groups))
    if ranks > 1 or most < 2:
        return 1
    each = streaming_memory(plan, placement, groups)["cpu"] - process_memory()
    return max(1, min(most, free_memory() // 2 // max(each, 1)))


def _on_device(
    plan: MergePlan, placement: Placement, device: torch.device, parameters: Sequence[PlannedParameter]
) -> tuple[int, int]:
    """What methods hold while they merge parameters one after another, and the stored tensors beside those on the host."""
    working = max((working_memory(plan, one, device == CPU) for one in parameters), default=0)
    sent = [stored_bytes(plan, one) for one in parameters if placement.device_of(one.name) == device != CPU]
    return working, sum(sent) if copies_ahead(device) else max(sent, default=0)
