"""Shells whose weights come and go: the real class with real buffers, its parameters on the meta device until they are needed."""

from __future__ import annotations

import copy
import ctypes
import os
from collections.abc import Callable, Iterable
from functools import cache
from typing import TYPE_CHECKING

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn


if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


Reader = Callable[[str], Tensor | None]
"""Gives the value of an entry of the state dict, or `None` when nothing is stored for it."""


def build_runnable_shell(model_class: type[PreTrainedModel], config: PretrainedConfig) -> PreTrainedModel:
    """A model in float32 and evaluation mode, with parameters on the meta device and buffers that are real.

    Args:
        model_class (`type`): Its class.
        config ([`~transformers.PretrainedConfig`]): Its config, which is not changed.
    """
    config = copy.deepcopy(config)
    # The layers of a mixture one by one: methods look at what each of them reads. Other implementations fuse them.
    config._experts_implementation = "eager"
    with init_empty_weights():
        model = model_class._from_config(config, dtype=torch.float32)
    return model.eval().requires_grad_(False)


def entries_of(module: nn.Module) -> list[str]:
    """The names of the parameters and of the buffers that are saved, tied ones included."""
    return list(module.state_dict(keep_vars=True))


def materialise(model: nn.Module, names: Iterable[str], read: Reader, device: torch.device) -> None:
    """Gives entries of the state dict their values, in float32 where they are floating-point.

    Args:
        model (`torch.nn.Module`): A shell.
        names (`Iterable[str]`): Module names. Entries that are stored nowhere become zero.
        read (`Callable`): Gives the values.
        device (`torch.device`): Where to.
    """
    for name in names:
        path, _, leaf = name.rpartition(".")
        owner = model.get_submodule(path)
        current = owner._parameters.get(leaf, owner._buffers.get(leaf))
        stored = read(name)
        if stored is None and current.device.type != "meta":
            continue
        value = torch.zeros(current.shape, dtype=current.dtype) if stored is None else stored
        value = value.to(device, torch.float32 if value.is_floating_point() else value.dtype)
        if leaf in owner._parameters:
            owner._parameters[leaf] = nn.Parameter(value, requires_grad=False)
        else:
            owner._buffers[leaf] = value


def release(model: nn.Module, names: Iterable[str]) -> None:
    """Puts parameters back on the meta device, and their memory back to the system. Buffers stay."""
    for name in names:
        path, _, leaf = name.rpartition(".")
        owner = model.get_submodule(path)
        parameter = owner._parameters.get(leaf)
        if parameter is not None:
            owner._parameters[leaf] = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)
    return_memory()


def move_buffers(model: nn.Module, device: torch.device) -> None:
    """Moves the buffers to a device; parameters stay where they are."""
    if device.type == "cpu":
        return
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(device)


def return_memory() -> None:
    """Gives freed memory back to the system. glibc keeps what lies between tensors that are still alive, which adds up when large
    tensors come and go with every block."""
    trim = getattr(_c_library(), "malloc_trim", None)
    if trim is not None:
        trim(0)


@cache
def _c_library() -> ctypes.CDLL | None:
    return ctypes.CDLL(None) if os.name == "posix" else None
