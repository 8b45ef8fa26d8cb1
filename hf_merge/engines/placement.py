"""Where the arithmetic of each parameter is done."""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch

from ..errors import ConfigError


class Placement:
    """Maps module names to devices.

    Args:
        device_map (`str` or `dict`, *optional*): `None` or `"cpu"`: the CPU. `"auto"`: the accelerator when there is one; in a job
            of several processes, that of this process (`LOCAL_RANK`).
            `"cuda:0"` and the like: that device. A dictionary from module-name prefixes to devices, as accelerate makes them
            (`""` for all; `"disk"` means the CPU here, since results go to disk anyway).

    Raises:
        ConfigError: A device does not exist here.
    """

    def __init__(self, device_map: str | torch.device | Mapping[str, str | int] | None = None):
        if isinstance(device_map, Mapping):
            self._map = {prefix: _device(device) for prefix, device in device_map.items()}
        else:
            self._map = {"": _device("cpu" if device_map is None else device_map)}
        self._map.setdefault("", torch.device("cpu"))

    def device_of(self, name: str) -> torch.device:
        """The device of a parameter: that of the longest prefix of its name."""
        while name not in self._map:
            name = name.rpartition(".")[0]
        return self._map[name]


def _accelerator() -> torch.device:
    """The accelerator of this process, which shares a host with others where a launcher says so."""
    kind, local_rank = torch.accelerator.current_accelerator(), os.environ.get("LOCAL_RANK")
    if local_rank is None:
        return kind
    return torch.device(kind.type, int(local_rank) % torch.accelerator.device_count())


def _device(device: str | int | torch.device) -> torch.device:
    if device == "auto":
        return _accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    if device == "disk":
        return torch.device("cpu")
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"Invalid device in device_map: {device!r} ({reason}). Use 'cpu', 'auto' or a device of this machine."
        ) from error
    return found
