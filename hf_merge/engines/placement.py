"""Where the arithmetic of each parameter is done."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence

import torch

from ..checkpoints.names import SaveGroup
from ..errors import ConfigError
from .plan import MergePlan


CPU = torch.device("cpu")

_COMPUTED = ("merge", "mean")


class Placement:
    """Maps module names to devices.

    Args:
        device_map (`str` or `dict`, *optional*): `None` or `"cpu"`: the CPU. `"auto"`: the accelerators of this process, among which
            [`~Placement.over`] divides a plan; in a job of several processes, that of this one (`LOCAL_RANK`).
            `"cuda:0"` and the like: that device. A dictionary from module-name prefixes to devices, as accelerate makes them
            (`""` for all; `"disk"` means the CPU here, since results go to disk anyway).

    Raises:
        ConfigError: A device does not exist here.
    """

    def __init__(self, device_map: str | torch.device | Mapping[str, str | int] | None = None):
        given = device_map if isinstance(device_map, Mapping) else {"": "cpu" if device_map is None else device_map}
        self._map = {prefix: _device(device) for prefix, device in given.items()}
        self._map.setdefault("", CPU)
        automatic = {prefix for prefix, device in given.items() if device == "auto"}
        self._balanced = automatic if automatic and accelerators() else set()

    def device_of(self, name: str) -> torch.device:
        """The device of a parameter: that of the longest prefix of its name. For `"auto"`, before a plan is divided: the current
        accelerator."""
        return self._map[self._prefix(name)]

    def by_device(self, groups: Iterable[SaveGroup]) -> dict[torch.device, list[SaveGroup]]:
        """Groups of a placement [`~Placement.over`] a plan by the device that those of their parameters which are computed have."""
        parts: dict[torch.device, list[SaveGroup]] = {}
        for group in groups:
            devices = map(self.device_of, group.names)
            parts.setdefault(next((device for device in devices if device != CPU), CPU), []).append(group)
        return parts

    def over(self, plan: MergePlan, groups: Iterable[SaveGroup]) -> Placement:
        """The devices of all parameters of a plan.

        Parameters that are written together are merged on one device, that of the first of them. What `"auto"` places is divided
        among the accelerators so that each merges about the same number of bytes. What is copied stays on the CPU.

        Args:
            plan ([`MergePlan`]): A plan without problems.
            groups (`Iterable[SaveGroup]`): What is written together.
        """
        if all(device == CPU for device in self._map.values()):
            return self
        found = Placement()
        found._map, found._balanced = dict(self._map), self._balanced
        computed = {one.name: one.info.nbytes for one in plan.parameters if one.action in _COMPUTED}
        to_balance: list[list[str]] = []
        for group in groups:
            names = [name for name in group.names if name in computed]
            found._map |= dict.fromkeys(group.names, CPU)
            if names and self._prefix(names[0]) in self._balanced:
                to_balance.append(names)
            elif names:
                found._map |= dict.fromkeys(names, self.device_of(names[0]))
        sizes = [sum(computed[name] for name in names) for names in to_balance]
        for names, device in zip(to_balance, balance(sizes, accelerators()), strict=True):
            found._map |= dict.fromkeys(names, device)
        return found

    def _prefix(self, name: str) -> str:
        while name not in self._map:
            name = name.rpartition(".")[0]
        return name


def balance(sizes: Sequence[int], devices: Sequence[torch.device]) -> list[torch.device]:
    """A device for each of some things, the largest ones first, always the one that has the least.

    Args:
        sizes (`Sequence[int]`): Of the things, in bytes.
        devices (`Sequence[torch.device]`): At least one, unless there are no things.
    """
    loads, chosen = [0] * len(devices), list(devices[:1]) * len(sizes)
    for index in sorted(range(len(sizes)), key=lambda index: -sizes[index]):
        least = loads.index(min(loads))
        loads[least] += sizes[index]
        chosen[index] = devices[least]
    return chosen


def accelerators() -> list[torch.device]:
    """The accelerators of this process, which shares a host with others where a launcher says so; empty without one."""
    if not torch.accelerator.is_available():
        return []
    kind, count = torch.accelerator.current_accelerator().type, torch.accelerator.device_count()
    local_rank = os.environ.get("LOCAL_RANK")
    own = range(count) if local_rank is None else [int(local_rank) % count]
    return [torch.device(kind, index) for index in own]


def _device(device: str | int | torch.device) -> torch.device:
    if device == "auto":
        found = accelerators() or [CPU]
        return found[0] if len(found) == 1 else torch.accelerator.current_accelerator()
    if device == "disk":
        return CPU
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"Invalid device in device_map: {device!r} ({reason}). Use 'cpu', 'auto' or a device of this machine."
        ) from error
    return found
