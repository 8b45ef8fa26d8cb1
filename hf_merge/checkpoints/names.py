"""How tensors on disk and parameters of a model belong together, as plain data. `conversion.py` finds it out, with transformers."""

from __future__ import annotations

from dataclasses import dataclass, field

from .storage import TensorInfo


@dataclass
class ConversionGroup:
    """Tensors on disk that become parameters of the model together.

    Args:
        targets (`dict[str, TensorInfo]`): The parameters, by module name.
        sources (`list[str]`): The names on disk.
        patterns (`list[str]`): For each source the pattern of the converter that matched it; empty for a plain renaming.
    """

    targets: dict[str, TensorInfo]
    sources: list[str]
    patterns: list[str] = field(default_factory=list)


@dataclass
class NameMap:
    """How the files of one checkpoint map to the parameters of its model."""

    groups: list[ConversionGroup]
    unexpected: list[str]
    missing: list[str]
    ignorable: list[str]


@dataclass
class SaveGroup:
    """Parameters that are written together, and the tensors on disk that they become.

    Args:
        names (`list[str]`): Module names.
        disk (`dict[str, TensorInfo]`): Names on disk.
        is_plain (`bool`): One parameter that is one tensor: nothing to convert.
    """

    names: list[str]
    disk: dict[str, TensorInfo]
    is_plain: bool
