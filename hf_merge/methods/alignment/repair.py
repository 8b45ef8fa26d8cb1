"""REPAIR (arXiv 2211.08403): averaged units vary less than those they are averages of, layer after layer. Every linear layer's
outputs get the mean and the deviation that they have in the experts, on average.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from ..backbone_base import BackboneGroup
from .activations import row_reader
from .spaces import ExpertTransforms


_LARGEST_SCALE = 10.0
"""A unit that hardly varies is not blown up further than this."""


class _Moments:
    """Mean and deviation of the outputs of some layers, (channels,) each."""

    def __init__(self):
        self._count: dict[str, int] = {}
        self._sums: dict[str, Tensor] = {}
        self._squares: dict[str, Tensor] = {}

    def add(self, name: str, values: Tensor) -> None:
        values = values.double()
        self._count[name] = self._count.get(name, 0) + len(values)
        self._sums[name] = self._sums.get(name, 0) + values.sum(0)
        self._squares[name] = self._squares.get(name, 0) + values.square().sum(0)

    def of(self, name: str) -> tuple[Tensor, Tensor]:
        mean = self._sums[name] / self._count[name]
        variance = self._squares[name] / self._count[name] - mean.square()
        return mean.float(), variance.clamp_min(0).sqrt().float()


@torch.no_grad()
def repair(group: BackboneGroup, transforms: Sequence[ExpertTransforms | None]) -> None:
    """Corrects the merged backbone in place, layer after layer in the order of the forward.

    Args:
        group ([`BackboneGroup`]): With samples, and the average of the aligned experts as its student.
        transforms (`Sequence`): The transforms of the experts.
    """
    goals = _goals(group, transforms)
    for names in _stages(group):
        found = _Moments()
        for inputs in _batches(group):
            for name, values in _outputs(group.student, group.source.run_student, names, inputs).items():
                found.add(name, values)
        for name in names:
            _correct(group, name, found.of(name), goals[name])


def _goals(group: BackboneGroup, transforms: Sequence[ExpertTransforms | None]) -> dict[str, tuple[Tensor, Tensor]]:
    """The average of the experts' moments, in merged units."""
    names = list(group.topology.linears)
    moments = []
    for index, one in enumerate(transforms):
        found = _Moments()

        def run(inputs: Mapping[str, Tensor], index: int = index) -> Any:
            return group.source.run_expert(index, inputs)

        for inputs in _batches(group):
            for name, values in _outputs(group.modules[index], run, names, inputs).items():
                to = None if one is None else one.rows(name, values.shape[-1])
                found.add(name, values if to is None else values @ to.mT)
        moments.append({name: found.of(name) for name in names})
    count = len(moments)
    return {
        name: (sum(one[name][0] for one in moments) / count, sum(one[name][1] for one in moments) / count)
        for name in names
    }


def _stages(group: BackboneGroup) -> Iterator[list[str]]:
    """Layers that can be corrected together: those that read one tensor."""
    readers = group.topology.readers()
    seen: set[int] = set()
    for name, site in group.topology.linears.items():
        if site.group is None:
            yield [name]
        elif site.group not in seen:
            seen.add(site.group)
            yield readers[site.group]


def _batches(group: BackboneGroup) -> Iterator[dict[str, Tensor]]:
    """The samples of all tasks."""
    size = group.settings.batch_size
    for task, count in enumerate(group.source.counts):
        for start in range(0, count, size):
            yield group.source.inputs(task, range(start, min(start + size, count)), None)


def _outputs(
    backbone: nn.Module, run: Callable[[Mapping[str, Tensor]], Any], names: Sequence[str], inputs: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """What some layers give for one batch, (real tokens, channels)."""
    read: dict[str, Tensor] = {}
    with ExitStack() as stack:
        for name in names:
            hook = row_reader(read, name, inputs.get("attention_mask"))
            handle = backbone.get_submodule(name).register_forward_hook(
                lambda module, args, output, hook=hook: hook(module, (output,))
            )
            stack.callback(handle.remove)
        run(inputs)
    return read


def _correct(group: BackboneGroup, name: str, found: tuple[Tensor, Tensor], goal: tuple[Tensor, Tensor]) -> None:
    """W → diag(s) W, b → s (b − mean) + goal."""
    site = group.topology.linears[name]
    (mean, deviation), (wanted, spread) = found, goal
    scale = (spread / deviation.clamp_min(1e-12)).clamp_max(_LARGEST_SCALE)
    weight = group.student.get_parameter(f"{name}.weight")
    weight.mul_(scale if site.transposed else scale[:, None])
    if site.has_bias:
        bias = group.student.get_parameter(f"{name}.bias")
        bias.copy_(scale * (bias - mean) + wanted)
