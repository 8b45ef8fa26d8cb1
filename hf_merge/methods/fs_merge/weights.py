"""What is trained, and how it becomes the parameters of the merged backbone: the parameters themselves (`kd`), or the factors
of a supernet (`fs_merge`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ..backbone_base import BackboneGroup, OutputMap
from ..backbone_blocks import BackbonePart
from .supernet import Supernet


class TrainedWeights:
    """What is trained, and how it becomes the parameters of the merged backbone. This one trains the parameters themselves.

    Args:
        group ([`BackboneGroup`] or [`BackbonePart`]): What is merged.
    """

    def __init__(self, group: BackboneGroup | BackbonePart):
        self.group = group
        group.student.requires_grad_(True)
        self._probes = nn.ModuleDict()

    def groups(self) -> dict[str, list[nn.Parameter]]:
        """The trained tensors by learning rate: `"matrix"` and `"vector"`."""
        groups: dict[str, list[nn.Parameter]] = {"matrix": [], "vector": []}
        for parameter in self.group.student.parameters():
            groups["vector" if parameter.ndim == 1 else "matrix"].append(parameter)
        groups["matrix"] += self._probes.parameters()
        return groups

    def refresh(self) -> None:
        """Writes the merged parameters into the backbone."""

    def collect(self) -> None:
        """Turns the gradients of the backbone's parameters into those of the trained tensors."""

    def inner(self, name: str, task: int, hidden: Tensor, width: int) -> Tensor:
        """What the merged channels that a layer reads correspond to in an expert: a map that is trained along and thrown away.

        Args:
            name (`str`): The group of layers.
            task (`int`): The expert.
            hidden (`torch.Tensor`): (..., merged channels).
            width (`int`): The expert's channels.
        """
        return self._probes[f"{name}:{task}"](hidden)

    def unfitted(self) -> dict[str, list[int]]:
        """The maps of [`~TrainedWeights.inner`] that may begin with any values: the experts by group of layers."""
        tasks: dict[str, list[int]] = {}
        for key in self._probes:
            name, _, task = key.rpartition(":")
            tasks.setdefault(name, []).append(int(task))
        return tasks

    def fit(self, name: str, task: int, matrix: Tensor) -> None:
        """Gives such a map its values, (expert's channels, merged channels)."""
        self._probes[f"{name}:{task}"].set_values(matrix, None)

    def add_probes(self, widths: Mapping[str, Sequence[int]], merged: Mapping[str, int]) -> None:
        """Makes the maps of [`~TrainedWeights.inner`] where there are none."""
        for name, experts in widths.items():
            for task, width in enumerate(experts):
                self._probes[f"{name}:{task}"] = OutputMap(merged[name], width, False)
        self._probes.to(next(self.group.student.parameters()).device)


class FoldedWeights(TrainedWeights):
    """Trains the factors of a supernet. The backbone's parameters are leaves of autograd: their gradients, gathered over all
    batches of an update, go back through the fold once.

    Args:
        group ([`BackboneGroup`] or [`BackbonePart`]): What is merged.
        supernet ([`Supernet`]): Of the experts.
    """

    def __init__(self, group: BackboneGroup | BackbonePart, supernet: Supernet):
        super().__init__(group)
        self.supernet = supernet
        self._folded: dict[str, Tensor] = {}

    def groups(self) -> dict[str, list[nn.Parameter]]:
        return self.supernet.parameter_groups()

    def refresh(self) -> None:
        self._folded = self.supernet.fold()
        self.group.assign(self._folded)

    def collect(self) -> None:
        weights = {name: self.group.student.get_parameter(name) for name in self._folded}
        reached = [
            name for name, weight in weights.items() if weight.grad is not None and self._folded[name].requires_grad
        ]
        torch.autograd.backward([self._folded[name] for name in reached], [weights[name].grad for name in reached])
        for weight in weights.values():
            weight.grad = None

    def inner(self, name: str, task: int, hidden: Tensor, width: int) -> Tensor:
        """U_i x: what expert i's layers read in the supernet."""
        factor = self.supernet.inputs[name][task]
        return factor.left(hidden.reshape(-1, hidden.shape[-1]).mT).mT.reshape(*hidden.shape[:-1], -1)

    def unfitted(self) -> dict[str, list[int]]:
        """U of the experts whose M is zero: what they read plays no part yet."""
        if len(self.supernet.experts) != len(self.group.maps):
            return {}  # One of them is a merge of several tasks' experts.
        silent = [task for task, scale in enumerate(self.supernet.scales) if not scale]
        return dict.fromkeys(self.supernet.inputs, silent)

    def fit(self, name: str, task: int, matrix: Tensor) -> None:
        self.supernet.inputs[name][task].fit(matrix)

    def add_probes(self, widths: Mapping[str, Sequence[int]], merged: Mapping[str, int]) -> None:
        """The supernet has such maps already."""
