"""Git Re-Basin, ZipIt! and fusion by optimal transport: the experts' units are brought into correspondence, then averaged."""

from __future__ import annotations

from typing import Any

from ..backbone_base import BackboneGroup, BackboneMethod
from .config import OtFusionConfig, ZipItConfig
from .preparation import (
    apply_transforms,
    by_activations,
    by_weights,
    by_zipit,
    check_equal_shapes,
    keep_apart,
    spaces_of,
)
from .repair import repair
from .spaces import ExpertTransforms, Spaces


class AlignmentMethod(BackboneMethod):
    """Averages the experts in common units."""

    def merge(self, group: BackboneGroup) -> None:
        transforms = self.transforms(group, spaces_of(group))
        aligned = apply_transforms(group, transforms)
        names = group.shapes()
        group.assign({name: sum(expert[name] for expert in aligned) / len(aligned) for name in names})
        if group.settings.repair:
            repair(group, transforms)
        if any(group.apart):
            keep_apart(group, transforms)

    def transforms(self, group: BackboneGroup, spaces: Spaces) -> list[ExpertTransforms | None]:
        """The transforms of all experts; `None` for one that stays as it is."""
        raise NotImplementedError(f"{type(self).__name__} does not implement transforms")


class GitRebasin(AlignmentMethod):
    """Permutations, by weights or activations."""

    @classmethod
    def needs_data(cls, settings: Any) -> bool:
        return settings.matching == "activations" or settings.repair

    def transforms(self, group: BackboneGroup, spaces: Spaces) -> list[ExpertTransforms | None]:
        check_equal_shapes(group, "git_rebasin")
        if group.settings.matching == "activations":
            return by_activations(group, spaces, group.settings.residual)
        return by_weights(group, spaces, residual=group.settings.residual)


class ZipIt(AlignmentMethod):
    """Pairs of units across and within two models."""

    requires_data = True
    max_experts = 2

    def transforms(self, group: BackboneGroup, spaces: Spaces) -> list[ExpertTransforms | None]:
        settings: ZipItConfig = group.settings
        check_equal_shapes(group, "zipit")
        return by_zipit(group, spaces, settings.budget)


class OtFusion(AlignmentMethod):
    """Soft assignments by transport of weights."""

    @classmethod
    def needs_data(cls, settings: Any) -> bool:
        return settings.repair

    def transforms(self, group: BackboneGroup, spaces: Spaces) -> list[ExpertTransforms | None]:
        settings: OtFusionConfig = group.settings
        return by_weights(group, spaces, soft=settings.regularization, residual=settings.residual)
