"""Experts with aligned units: the end of the alignment methods, and the beginning of `fs_merge` and `kd`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ...errors import ConfigError
from ..backbone_base import BackboneGroup, FeatureTap
from .activations import UnitStatistics, match_activations, zip_activations
from .matching import WeightMatching
from .spaces import RESIDUAL, ExpertTransforms, Spaces


ZIP_BUDGET = 0.1


def aligned_experts(group: BackboneGroup, init: str) -> list[Mapping[str, Tensor]]:
    """The experts' parameters in common units; the maps to the experts' features are set accordingly.

    Args:
        group ([`BackboneGroup`]): The experts.
        init (`str`): `"git_rebasin"` or `"zipit"`.

    Raises:
        ConfigError: The experts differ in shape, or ZipIt! is asked for more than two.
    """
    spaces = spaces_of(group)
    check_equal_shapes(group, init)
    transforms = by_zipit(group, spaces, ZIP_BUDGET) if init == "zipit" else by_weights(group, spaces)
    return apply_transforms(group, transforms)


def spaces_of(group: BackboneGroup) -> Spaces:
    """The spaces of hidden units of the first expert."""
    shapes = {name: value.shape for name, value in group.experts[0].items()}
    return Spaces.of(group.topology, group.width(0), shapes)


def check_equal_shapes(group: BackboneGroup, what: str) -> None:
    """Permutations need units in equal number."""
    for expert, name in zip(group.experts[1:], group.expert_names[1:], strict=True):
        for key, value in group.experts[0].items():
            if expert[key].shape != value.shape:
                raise ConfigError(
                    f"'{what}' pairs units one by one, but '{key}' is {tuple(value.shape)} in '{group.expert_names[0]}' and "
                    f"{tuple(expert[key].shape)} in '{name}': use 'fs_merge' with init='first'."
                )


@torch.no_grad()
def by_weights(
    group: BackboneGroup, spaces: Spaces, soft: float | None = None, residual: bool = True
) -> list[ExpertTransforms | None]:
    """Every further expert matched to the first by its weights; the first stays."""
    found: list[ExpertTransforms | None] = [None]
    for index in range(1, len(group)):
        widths = (group.width(0), group.width(index))
        matching = WeightMatching(spaces, group.experts[0], group.experts[index], widths, soft, residual)
        found.append(matching.run())
    return found


@torch.no_grad()
def by_activations(group: BackboneGroup, spaces: Spaces, residual: bool = True) -> list[ExpertTransforms | None]:
    """Every further expert matched to the first by its activations."""
    pairs = [(0, index) for index in range(1, len(group))]
    return [None, *(match_activations(UnitStatistics(group, spaces, pair), residual) for pair in pairs)]


@torch.no_grad()
def by_zipit(group: BackboneGroup, spaces: Spaces, budget: float) -> list[ExpertTransforms | None]:
    """Both experts in units that are pairs of theirs."""
    if len(group) != 2:
        raise ConfigError(f"'zipit' pairs the units of two experts, got {len(group)}: use 'git_rebasin'.")
    return list(zip_activations(UnitStatistics(group, spaces, (0, 1)), budget))


@torch.no_grad()
def apply_transforms(
    group: BackboneGroup, transforms: Sequence[ExpertTransforms | None]
) -> list[Mapping[str, Tensor]]:
    """The transformed experts; sets the maps to their features."""
    aligned = []
    for index, (expert, one) in enumerate(zip(group.experts, transforms, strict=True)):
        aligned.append(expert if one is None else one.apply(expert, group.width(index)))
        _set_map(group, index, one)
    return aligned


@torch.no_grad()
def keep_apart(group: BackboneGroup, transforms: Sequence[ExpertTransforms | None]) -> None:
    """Fills `group.apart` with the experts' own values of the parameters that are kept per task: they read and write the merged
    residual stream, and are otherwise as they were."""
    for index, (expert, one) in enumerate(zip(group.experts, transforms, strict=True)):
        alone = None if one is None else one.alone()
        values = expert if alone is None else alone.apply(expert, group.width(index))
        group.apart[index].update({name: values[name] for name in group.apart[index]})
        _set_map(group, index, alone)


def _set_map(group: BackboneGroup, index: int, transforms: ExpertTransforms | None) -> None:
    output_map = group.maps[index]
    if transforms is not None and output_map is not None:
        output_map.weight.copy_(map_to_features(group.taps[index], transforms))


def map_to_features(tap: FeatureTap | None, transforms: ExpertTransforms) -> Tensor:
    """What maps merged features to those that an expert's head reads, (expert's features, merged features).

    Args:
        tap ([`FeatureTap`], *optional*): What the head reads.
        transforms ([`ExpertTransforms`]): Of the expert.
    """
    residual = transforms.units[RESIDUAL].back
    ends = [name for name in transforms.spaces.hidden if name.startswith("out:")]
    if tap is None or tap.field != "pooler_output" or not ends:
        return residual
    if ends[-1] not in transforms.units:
        return torch.eye(len(residual), device=residual.device)
    return transforms.units[ends[-1]].back
