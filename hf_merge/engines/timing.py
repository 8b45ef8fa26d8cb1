"""How long a data-free merge will take: small random tensors are merged by the same engine with the same settings, and what they
take is extrapolated by entries. No weight is read."""

from __future__ import annotations

import math
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ..checkpoints.storage import TensorInfo
from ..kinds import ParameterKind
from ..methods.base import LinearMethod
from ..registry import get_merge_method
from .estimate import Estimate, surveys
from .forks import processors
from .pipeline import Loaded
from .placement import Placement
from .plan import MergePlan, PlannedParameter
from .reading import sources_of
from .streaming import StreamingEngine


TRIAL_SECONDS = 0.05
"""Trials grow until one takes so long."""

LARGEST_TRIAL = 2048
"""The largest matrix of a trial has so many rows and columns."""

ASSUMED_RATE = 1e9
"""Bytes per second of a disk that cannot be tried."""

_STACKED = (ParameterKind.EXPERT_LINEAR, ParameterKind.TRANSPOSED_EXPERT_LINEAR)


def merge_seconds(plan: MergePlan, placement: Placement, estimate: Estimate, folder: Path | None = None) -> float:
    """The wall time of a streamed merge: reading, computing and writing overlap as far as there are processors for them.

    Args:
        plan ([`MergePlan`]): A plan of data-free methods.
        placement ([`Placement`]): Where the arithmetic is done.
        estimate ([`Estimate`]): What is read, and how many processes merge.
        folder (`Path`, *optional*): Where the result goes; the disk of the system's temporary folder is tried when not given.
    """
    reading, writing = disk_rates(folder)
    read, compute, write = estimate.bytes_read / reading, compute_seconds(plan, placement), plan.nbytes / writing
    at_once = min(2 + estimate.num_proc, processors())
    return max(read, compute / estimate.num_proc, write, (read + compute + write) / at_once)


def compute_seconds(plan: MergePlan, placement: Placement) -> float:
    """The time of the arithmetic alone, of the device that takes the longest. Parameters that are treated alike share a trial."""
    placement = placement.over(plan, plan.groups)
    engine = _Trials(plan, placement)
    costs: dict[tuple, tuple[float, float]] = {}
    seconds: dict[torch.device, float] = {}
    for parameter in plan.parameters:
        if parameter.info.nbytes:
            treatment, device = _treatment(plan, placement, parameter), placement.device_of(parameter.name)
            if treatment not in costs:
                costs[treatment] = engine.cost(parameter)
            overhead, rate = costs[treatment]
            seconds[device] = seconds.get(device, 0.0) + overhead + rate * _work(parameter, parameter.info.shape)
    return max(seconds.values(), default=0.0)


def _treatment(plan: MergePlan, placement: Placement, parameter: PlannedParameter) -> tuple:
    """What decides about the time of a parameter beside its shape."""
    steps = tuple(step.merge_type for step in (parameter.settings, *parameter.then))
    dtypes = tuple(source.parameters[name].dtype for source, name in sources_of(plan, parameter))
    kind = parameter.kind if parameter.action == "merge" else None
    device = placement.device_of(parameter.name).type
    return parameter.action, kind, steps, dtypes, parameter.info.dtype, device, min(len(parameter.info.shape), 2)


def _work(parameter: PlannedParameter, shape: Sequence[int]) -> float:
    """What the time is proportional to: entries; for methods on matrices, entries times the smaller dimension."""
    entries = float(math.prod(shape))
    method = get_merge_method(parameter.settings.merge_type).method_cls
    on_matrices = parameter.action == "merge" and issubclass(method, LinearMethod) and parameter.kind in method.kinds
    return entries * min(shape[-2:]) if on_matrices else entries


class _Trials(StreamingEngine):
    """Merges random tensors in the place of a plan's parameters."""

    def cost(self, parameter: PlannedParameter) -> tuple[float, float]:
        """Seconds of any parameter that is treated so, and seconds by unit of [`_work`]."""
        # The first time does not count: things are loaded and compiled on first use.
        _, overhead = self._twice(parameter, _trial_shape(parameter, 2))
        side = 256
        while True:
            shape = _trial_shape(parameter, side)
            seconds = min(self._twice(parameter, shape))
            if seconds >= TRIAL_SECONDS or side >= LARGEST_TRIAL:
                return overhead, max(0.0, seconds - overhead) / _work(parameter, shape)
            side *= 2

    def _twice(self, parameter: PlannedParameter, shape: tuple[int, ...]) -> tuple[float, float]:
        loaded = self._random(parameter, shape)
        return self._seconds(parameter, shape, loaded), self._seconds(parameter, shape, loaded)

    def _seconds(self, parameter: PlannedParameter, shape: tuple[int, ...], loaded: Loaded) -> float:
        trial = replace(parameter, info=TensorInfo(shape, parameter.info.dtype))
        start = time.perf_counter()
        if rounds := surveys(parameter):
            method, group = self._method(parameter.settings.merge_type), self._group(trial, loaded)
            for round in range(rounds):
                seen = [(trial.name, method.observe(group, round))]
                method.conclude(iter(seen), round, parameter.settings)
        self.finish(trial, loaded)
        return time.perf_counter() - start

    def _random(self, parameter: PlannedParameter, shape: tuple[int, ...]) -> Loaded:
        """Tensors like a base model's and its fine-tunes', in the dtypes of the models."""
        generator = torch.Generator().manual_seed(0)
        start = torch.randn(shape, generator=generator).mul_(0.02)
        stored: list[Tensor] = []
        sources = sources_of(self.plan, parameter)
        for source, name in sources:
            change = 0.0 if source is self.plan.base else torch.randn(shape, generator=generator).mul_(1e-3)
            stored.append((start + change).to(source.parameters[name].dtype))
        has_base = sources[-1][0] is self.plan.base
        return Loaded(stored[:-1], stored[-1]) if has_base else Loaded(stored, None)


def _trial_shape(parameter: PlannedParameter, side: int) -> tuple[int, ...]:
    """A shape of side² entries with as many dimensions as the parameter's."""
    dimensions = len(parameter.info.shape)
    if dimensions < 2:
        return (side * side,) * dimensions
    if parameter.kind in _STACKED:
        return (*(1,) * (dimensions - 2), side, side)
    return (side, side, *(1,) * (dimensions - 2))


def disk_rates(folder: Path | None = None) -> tuple[float, float]:
    """Bytes per second that the disk of a folder reads, from the system's cache, and writes, to the disk.

    Args:
        folder (`Path`, *optional*): A folder that exists, or whose parent does; the system's temporary folder when not given.
    """
    place = tempfile.gettempdir() if folder is None else next(path for path in folder.parents if path.is_dir())
    content = bytes(1 << 25)
    try:
        with tempfile.TemporaryFile(dir=place) as file:
            start = time.perf_counter()
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            written = time.perf_counter()
            file.seek(0)
            file.read()
            read = time.perf_counter()
    except OSError:
        return ASSUMED_RATE, ASSUMED_RATE
    return len(content) / (read - written), len(content) / (written - start)
