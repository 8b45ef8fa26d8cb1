"""Correspondence by activations: the units of two models that behave alike on the same samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from ..backbone_base import AttentionSite, BackboneGroup
from .matching import WeightMatching, assign
from .spaces import RESIDUAL, ExpertTransforms, HeadOrder, Spaces, Transform, head_groups


class UnitStatistics:
    """Correlations of the units of two experts in every space, over the samples of all tasks.

    Args:
        group ([`BackboneGroup`]): With samples.
        spaces ([`Spaces`]): Of the backbone.
        pair (`tuple[int, int]`): The experts.
    """

    def __init__(self, group: BackboneGroup, spaces: Spaces, pair: tuple[int, int]):
        self.group, self.spaces, self.pair = group, spaces, pair
        self._sites = self._layers()
        self._sums: dict[str, Tensor] = {}
        self._products: dict[str, Tensor] = {}
        self._count: dict[str, int] = {}
        self._run()

    def _layers(self) -> dict[str, str]:
        """One layer for every tensor that is looked at, and the space that the tensor belongs to."""
        layers = {}
        for names in self.group.topology.readers().values():
            first = names[0]
            if first in self.spaces.residual.readers:
                layers[first] = RESIDUAL
            elif first in self.spaces.hidden or first in self.spaces.attention:
                layers[first] = first
        return layers

    @torch.no_grad()
    def _run(self) -> None:
        source, size = self.group.source, self.group.settings.batch_size
        for task, count in enumerate(source.counts):
            for start in range(0, count, size):
                inputs = source.inputs(task, range(start, min(start + size, count)), None)
                ours, theirs = (self._read(index, inputs) for index in self.pair)
                for layer, space in self._sites.items():
                    self._add(space, torch.cat([ours[layer], theirs[layer]], 1))

    def _read(self, index: int, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        read: dict[str, Tensor] = {}
        mask = inputs.get("attention_mask")
        with ExitStack() as stack:
            for layer in self._sites:
                module = self.group.modules[index].get_submodule(layer)
                stack.callback(module.register_forward_pre_hook(row_reader(read, layer, mask)).remove)
            self.group.source.run_expert(index, inputs)
        return read

    def _add(self, space: str, values: Tensor) -> None:
        values = values.double()
        self._sums[space] = self._sums.get(space, 0) + values.sum(0)
        self._products[space] = self._products.get(space, 0) + values.mT @ values
        self._count[space] = self._count.get(space, 0) + len(values)

    def correlation(self, space: str) -> Tensor:
        """(units of both, units of both)."""
        count = self._count[space]
        mean = self._sums[space] / count
        covariance = self._products[space] / count - torch.outer(mean, mean)
        deviation = covariance.diagonal().clamp_min(1e-12).sqrt()
        return (covariance / torch.outer(deviation, deviation)).float()


def match_activations(statistics: UnitStatistics, residual: bool = True) -> ExpertTransforms:
    """Permutations of the second expert's units by the correlation with the first's. Channels of queries and keys, which no
    layer reads, are matched by weights.

    Args:
        statistics ([`UnitStatistics`]): Of the two.
        residual (`bool`): Also match the residual stream.
    """
    spaces = statistics.spaces
    transforms = ExpertTransforms(spaces)
    for name in (RESIDUAL, *spaces.hidden):
        if name.startswith("out:"):
            continue
        cross = _cross(statistics.correlation(name))
        keeps = name == RESIDUAL and not residual
        order = torch.arange(len(cross), device=cross.device) if keeps else assign(cross)
        transforms.units[name] = Transform.permutation(order)
    first, second = statistics.pair
    group = statistics.group
    widths = (group.width(first), group.width(second))
    weights = WeightMatching(spaces, group.experts[first], group.experts[second], widths)
    weights.transforms = transforms
    for name, site in spaces.attention.items():
        order, values = _match_heads(site, _cross(statistics.correlation(name)))
        transforms.heads[name] = HeadOrder(order, values, weights.matched_channels(site, order))
    return transforms


def _match_heads(site: AttentionSite, cross: Tensor) -> tuple[Tensor, Tensor]:
    """The order of groups of heads, and of the channels of their values."""
    groups, size = head_groups(site), site.head_size
    blocks = cross.reshape(len(site.values.starts), size, len(site.values.starts), size)
    similarity = torch.zeros(len(groups), len(groups))
    for a, ours in enumerate(groups):
        for b, theirs in enumerate(groups):
            block = sum(blocks[x, :, y] for x, y in zip(ours, theirs, strict=True))
            order = assign(block)
            similarity[a, b] = block[torch.arange(size), order].sum()
    order = assign(similarity)
    values = []
    for new, ours in enumerate(groups):
        theirs = groups[int(order[new])]
        values.append(assign(sum(blocks[x, :, y] for x, y in zip(ours, theirs, strict=True))))
    return order, torch.stack(values)


def zip_units(correlation: Tensor, budget: float) -> tuple[Transform, Transform]:
    """The pairs of ZipIt!: units of both models, most correlated first; at most a part of each model's units is paired with units
    of the same model.

    Args:
        correlation (`torch.Tensor`): (2 d, 2 d).
        budget (`float`): That part.

    Returns:
        `tuple`: The transforms of the two experts; half of their sum is the merge.
    """
    units = len(correlation) // 2
    limits = [int(budget * units)] * 2
    values, free = correlation.triu(1) + torch.full_like(correlation, -2).tril(), [True] * (2 * units)
    pairs = []
    for flat in values.flatten().argsort(descending=True).tolist():
        first, second = divmod(flat, 2 * units)
        if first >= second or not (free[first] and free[second]):
            continue
        model = first // units if first // units == second // units else None
        if model is not None:
            if not limits[model]:
                continue
            limits[model] -= 1
        free[first] = free[second] = False
        pairs.append((first, second))
        if len(pairs) == units:
            break
    pairs += _leftovers(free, units - len(pairs))
    to = torch.zeros(units, 2 * units)
    for index, pair in enumerate(pairs):
        to[index, list(pair)] = 1.0
    to = to.to(correlation.device)
    ours, theirs = to[:, :units], to[:, units:]
    return Transform(ours, ours.mT), Transform(theirs, theirs.mT)


def _leftovers(free: Sequence[bool], missing: int) -> list[tuple[int, int]]:
    """Pairs of what the budget kept apart."""
    rest = [unit for unit, is_free in enumerate(free) if is_free]
    return [(rest[2 * k], rest[2 * k + 1]) for k in range(missing)]


def zip_activations(statistics: UnitStatistics, budget: float) -> tuple[ExpertTransforms, ExpertTransforms]:
    """ZipIt! for two experts; heads of attention are matched across models only.

    Args:
        statistics ([`UnitStatistics`]): Of the two.
        budget (`float`): The part of a model's units that may be paired with each other.
    """
    spaces = statistics.spaces
    ours, theirs = ExpertTransforms(spaces), match_activations(statistics)
    for name in (RESIDUAL, *spaces.hidden):
        if not name.startswith("out:"):
            ours.units[name], theirs.units[name] = zip_units(statistics.correlation(name), budget)
    return ours, theirs


def _cross(correlation: Tensor) -> Tensor:
    units = len(correlation) // 2
    return correlation[:units, units:]


def row_reader(read: dict[str, Tensor], layer: str, mask: Tensor | None):
    """A hook that keeps what a layer reads, the vectors of real tokens only, float32.

    Args:
        read (`dict`): Where to, by layer.
        layer (`str`): The layer's name.
        mask (`torch.Tensor`, *optional*): Which tokens are real, (samples, tokens).
    """

    def hook(module: nn.Module, args: tuple) -> None:
        value = args[0].float()
        rows = value.reshape(-1, value.shape[-1])
        if mask is not None and value.ndim == 3 and mask.shape == value.shape[:2]:
            rows = value[mask.bool()]
        read[layer] = rows

    return hook
