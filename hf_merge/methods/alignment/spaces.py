"""The spaces of hidden units in a backbone, and the transforms that bring an expert's units to those of a reference.

A space is written by the rows of some layers and read by the columns of others: the residual stream, the inside of each MLP,
the heads of each attention layer. A transform of a space is a pair of matrices, `to` (merged units, expert's units) and `back`
(expert's units, merged units); for a permutation one is the other's transpose. Transforming an expert means
W → to W back for every layer, which is the folded form of FS-Merge without training.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..backbone_base import AttentionSite, LinearSite, Topology, linear_matrix


RESIDUAL = "residual"


@dataclass(frozen=True)
class Transform:
    """How the units of one space are brought to another model's.

    Args:
        to (`torch.Tensor`): (merged units, expert's units): rows of weights, biases and norms.
        back (`torch.Tensor`): (expert's units, merged units): columns of weights.
    """

    to: Tensor
    back: Tensor

    @classmethod
    def permutation(cls, order: Tensor) -> Transform:
        """Merged unit k is the expert's unit `order[k]`."""
        to = torch.eye(len(order), device=order.device)[order]
        return cls(to, to.mT)

    @classmethod
    def identity(cls, merged: int, units: int, device: torch.device) -> Transform:
        """Unit k is unit k; further ones are cut or zero."""
        to = torch.eye(merged, units, device=device)
        return cls(to, to.mT)


@dataclass
class Space:
    """A space of hidden units that are all alike.

    Args:
        name (`str`): `"residual"`, or the layer that reads it.
        writers (`list[str]`): Layers whose rows are its units.
        readers (`list[str]`): Layers whose columns are its units.
    """

    name: str
    writers: list[str] = field(default_factory=list)
    readers: list[str] = field(default_factory=list)


@dataclass
class Spaces:
    """All spaces of a backbone.

    Args:
        topology ([`Topology`]): Of the backbone.
        residual ([`Space`]): The residual stream.
        hidden (`dict[str, Space]`): Inside of MLPs, and outputs that no layer of the backbone reads, by name.
        attention (`dict[str, AttentionSite]`): By output layer.
    """

    topology: Topology
    residual: Space
    hidden: dict[str, Space]
    attention: dict[str, AttentionSite]

    @classmethod
    def of(cls, topology: Topology, width: int, shapes: Mapping[str, torch.Size]) -> Spaces:
        """Sorts the layers of a backbone.

        Args:
            topology ([`Topology`]): Of the backbone.
            width (`int`): Of the residual stream.
            shapes (`Mapping`): Of its parameters.
        """
        attention = {site.output: site for site in topology.attention}
        hidden = {name: Space(name, list(writers), [name]) for name, writers in topology.elementwise.items()}
        inside = {writer for space in hidden.values() for writer in space.writers}
        heads = {part.layer for site in attention.values() for part in (*site.matched, site.values)}
        residual = Space(RESIDUAL)
        for name, site in topology.linears.items():
            out, columns = linear_shape(site, shapes[f"{name}.weight"])
            is_inner_reader = name in hidden or name in attention
            if not is_inner_reader and site.group is not None and columns == width:
                residual.readers.append(name)
            if is_inner_reader and out == width:
                residual.writers.append(name)
            elif not is_inner_reader and name not in inside | heads:
                hidden[f"out:{name}"] = Space(f"out:{name}", [name], [])
        return cls(topology, residual, hidden, attention)


def linear_shape(site: LinearSite, shape: torch.Size) -> tuple[int, int]:
    """(out, in) of a layer."""
    return (shape[1], shape[0]) if site.transposed else (shape[0], shape[1])


@dataclass
class HeadOrder:
    """How the heads of an attention layer are rearranged.

    Args:
        groups (`torch.Tensor`): Merged group k of heads that share keys and values is the expert's group `groups[k]`.
        values, matched (`torch.Tensor`): (groups, head size): the order of channels within the heads of a merged group, of the
            values, and of queries and keys.
    """

    groups: Tensor
    values: Tensor
    matched: Tensor


class ExpertTransforms:
    """The transforms of one expert in all spaces.

    Args:
        spaces ([`Spaces`]): Of the backbone.
    """

    def __init__(self, spaces: Spaces):
        self.spaces = spaces
        self.units: dict[str, Transform] = {}
        self.heads: dict[str, HeadOrder] = {}

    def alone(self) -> ExpertTransforms:
        """What brings layers that are not merged to the merged residual stream: each of its units gets the mean of the expert's
        units that it stands for, and what is inside of the layers stays."""
        residual = self.units[RESIDUAL]
        transforms = ExpertTransforms(self.spaces)
        to = residual.to / residual.to.sum(1, keepdim=True).clamp_min(1.0)
        transforms.units[RESIDUAL] = Transform(to, residual.back)
        return transforms

    def apply(self, expert: Mapping[str, Tensor], width: int) -> dict[str, Tensor]:
        """The expert's parameters in the reference's units.

        Args:
            expert (`Mapping`): Its parameters.
            width (`int`): Of its residual stream.
        """
        residual = self.units[RESIDUAL]
        topology = self.spaces.topology
        result = dict(expert)
        for name in topology.tables:
            if expert[name].shape[-1] == width:
                result[name] = expert[name] @ residual.to.mT
        for name in topology.convolutions:
            weight = expert[f"{name}.weight"]
            if weight.shape[0] == width:
                result[f"{name}.weight"] = (residual.to @ weight.flatten(1)).reshape(-1, *weight.shape[1:])
                if f"{name}.bias" in expert:
                    result[f"{name}.bias"] = residual.to @ expert[f"{name}.bias"]
        for name in topology.direct:
            if expert[name].shape == (width,):
                result[name] = residual.to @ expert[name]
        for name, site in topology.linears.items():
            result |= self._linear(name, site, expert)
        return result

    def _linear(self, name: str, site: LinearSite, expert: Mapping[str, Tensor]) -> dict[str, Tensor]:
        weight = linear_matrix(site, expert[f"{name}.weight"])
        to, back = self.rows(name, len(weight)), self.columns(name)
        weight = weight if to is None else to @ weight
        weight = weight if back is None else weight @ back
        result = {f"{name}.weight": weight.mT if site.transposed else weight}
        if site.has_bias:
            bias = expert[f"{name}.bias"]
            result[f"{name}.bias"] = bias if to is None else to @ bias
        return result

    def columns(self, name: str) -> Tensor | None:
        """What a layer's weight is multiplied with from the right."""
        if name in self.spaces.hidden:
            return self.units[name].back if name in self.units else None
        if name in self.heads:
            order = self.heads[name]
            return Transform.permutation(_output_order(self.spaces.attention[name], order)).back
        return self.units[RESIDUAL].back if name in self.spaces.residual.readers else None

    def rows(self, name: str, count: int) -> Tensor | None:
        """What a layer's weight is multiplied with from the left."""
        if name in self.spaces.residual.writers:
            return self.units[RESIDUAL].to
        for space in self.spaces.hidden.values():
            if name in space.writers:
                return self.units[space.name].to if space.name in self.units else None
        order = None
        for output, site in self.spaces.attention.items():
            if output in self.heads:
                order = _row_order(site, self.heads[output], name, count, order)
        return None if order is None else Transform.permutation(order).to


def head_groups(site: AttentionSite) -> list[list[int]]:
    """Query heads by the head of values that they share."""
    starts = list(dict.fromkeys(site.values.starts))
    return [[head for head, start in enumerate(site.values.starts) if start == first] for first in starts]


def _output_order(site: AttentionSite, order: HeadOrder) -> Tensor:
    """The order of the columns of the output layer."""
    groups, size = head_groups(site), site.head_size
    result = torch.arange(len(site.values.starts) * size, device=order.groups.device)
    for new, heads in enumerate(groups):
        for target, source in zip(heads, groups[int(order.groups[new])], strict=True):
            result[target * size : (target + 1) * size] = source * size + order.values[new]
    return result


def _row_order(site: AttentionSite, order: HeadOrder, layer: str, count: int, known: Tensor | None) -> Tensor | None:
    """The order of the rows of a layer that gives queries, keys or values; a fused layer gives several."""
    groups, size = head_groups(site), site.head_size
    for part, inner in [(site.values, order.values), *((part, order.matched) for part in site.matched)]:
        if part.layer != layer:
            continue
        if known is None:
            known = torch.arange(count, device=order.groups.device)
        for new, heads in enumerate(groups):
            for target, source in zip(heads, groups[int(order.groups[new])], strict=True):
                first = part.starts[target]
                known[first : first + size] = part.starts[source] + inner[new]
    return known
