"""What the modules of a model say about its parameters, as plain data: kind, depth, backbone or head, ties. `shell.py` reads it off a
model without weights."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property

import torch

from ..kinds import ParameterKind


@dataclass(frozen=True)
class ParameterInfo:
    """What the shell says about one entry of the state dict.

    Args:
        name (`str`): The module name.
        kind ([`ParameterKind`]): From the type of the owning module.
        depth (`float`): 0 at the input, 1 at the output of the block stack it belongs to.
        shape (`tuple[int]`): Its shape under the model's config.
        is_task_head (`bool`): Outside the backbone and not the output embedding: a classifier and its like.
    """

    name: str
    kind: ParameterKind
    depth: float
    shape: tuple[int, ...]
    is_task_head: bool


@dataclass
class Anatomy:
    """What is known of a class under a config.

    Args:
        backbone_prefix (`str`): What the names of the backbone's parameters begin with; empty where there is nothing around it.
        parameters (`dict[str, ParameterInfo]`): Every entry of the state dict, tied duplicates included, in the model's own order.
        ties (`dict[str, str]`): Tied parameters by the config: target name -> source name.
        absent (`list[str]`): Regular expressions: parameters that checkpoints may lack.
        float32 (`dict[str, list[str]]`): Regular expressions by dtype: parameters that transformers keeps in float32 in a model of it.
    """

    backbone_prefix: str
    parameters: dict[str, ParameterInfo]
    ties: dict[str, str]
    absent: list[str]
    float32: dict[str, list[str]]

    def canonical(self, name: str) -> str:
        """The name under which parameters of different classes over one backbone meet: `bert.x` and `x` are the same."""
        if self.backbone_prefix:
            return name[len(self.backbone_prefix) :] if name.startswith(self.backbone_prefix) else f"<head>.{name}"
        return name

    @cached_property
    def by_canonical(self) -> dict[str, str]:
        """Canonical name -> module name, for every entry of the state dict."""
        return {self.canonical(name): name for name in self.parameters}

    def may_be_absent(self, name: str) -> bool:
        """Whether checkpoints may lack a parameter: transformers itself expects it, or it belongs to a readout that none may have."""
        kind = self.parameters[name].kind
        return kind in (ParameterKind.BUFFER, ParameterKind.HEAD) or any(
            re.search(pattern, name) for pattern in self.absent
        )

    def stays_in_float32(self, name: str, dtype: torch.dtype) -> bool:
        """Whether transformers loads the parameter in float32 although the model is loaded in `dtype`."""
        return any(re.search(pattern, name) for pattern in self.float32.get(str(dtype), ()))
