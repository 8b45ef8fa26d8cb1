"""FS-Merge: experts of different initialisation are folded into one backbone (arXiv 2410.01483), and feature distillation into
one student, the baseline that it has to beat."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..alignment.preparation import aligned_experts
from ..backbone_base import BackboneGroup, BackboneMethod, Topology
from ..backbone_blocks import BackboneBlock, BackbonePart
from .block_training import train_block, train_part
from .config import FsMergeConfig, KdConfig
from .supernet import Supernet
from .training import FeatureTraining
from .weights import FoldedWeights, TrainedWeights


class FsMerge(BackboneMethod):
    """Trains M_i and U_i of every layer so that the merged features give, through one linear map for each task, the features of
    that task's expert."""

    requires_data = True
    changes_width = True

    def merge(self, group: BackboneGroup) -> None:
        settings: FsMergeConfig = group.settings
        experts = starting_experts(group)
        if settings.sequential and len(group) > 2:
            self._merge_sequentially(group, experts)
        else:
            self._train(group, experts, start_scales(settings.init, len(group)), "fs_merge")
        if settings.refine_epochs:
            rates = settings.learning_rates(_refine_scale(settings))
            training = FeatureTraining(group, TrainedWeights(group), settings.refine_epochs, rates, "refine")
            group.report["refine"] = training.run()
        group.student.requires_grad_(False)

    def start(
        self,
        topology: Topology,
        experts: Sequence[Mapping[str, Tensor]],
        shapes: Mapping[str, Sequence[int]],
        settings: FsMergeConfig,
    ) -> dict[str, Tensor]:
        return start_weights(topology, experts, shapes, settings.init)

    def merge_block(self, block: BackboneBlock) -> None:
        train_block(block, start_scales(block.settings.init, len(block.experts)))

    def merge_tail(self, tail: BackbonePart) -> None:
        train_part(tail, TrainedWeights(tail))

    def _train(
        self, group: BackboneGroup, experts: Sequence[Mapping[str, Tensor]], scales: Sequence[float], label: str
    ) -> None:
        settings: FsMergeConfig = group.settings
        supernet = Supernet(
            group.topology,
            experts,
            group.shapes(),
            scales,
            settings.form,
            settings.rank,
            group.topology.head_sizes(settings.head_aligned),
            group.seed,
        ).to(group.device)
        training = FeatureTraining(
            group,
            FoldedWeights(group, supernet),
            settings.epochs,
            settings.learning_rates(),
            label,
            settings.fit_maps,
        )
        group.report[label] = training.run()

    def _merge_sequentially(self, group: BackboneGroup, experts: Sequence[Mapping[str, Tensor]]) -> None:
        """FS-Merge seq.: the result so far is the first expert of the next supernet, and keeps its tasks."""
        merged = experts[0]
        for last in range(1, len(group)):
            part = group.first(last + 1)
            scales = start_scales(group.settings.init, 2)
            self._train(part, [merged, experts[last]], scales, f"fs_merge {last} of {len(group) - 1}")
            merged = {name: value.detach().clone() for name, value in group.student.named_parameters()}
            group.report |= part.report


class Kd(BackboneMethod):
    """Trains the parameters of one backbone on the features of all experts, with the same maps, data and schedule as
    [`FsMerge`]."""

    requires_data = True
    changes_width = True

    def merge(self, group: BackboneGroup) -> None:
        settings: KdConfig = group.settings
        group.assign(start_weights(group.topology, starting_experts(group), group.shapes(), settings.init))
        rates = settings.learning_rates()
        training = FeatureTraining(group, TrainedWeights(group), settings.epochs, rates, "kd", settings.fit_maps)
        group.report["kd"] = training.run()
        group.student.requires_grad_(False)


def start_scales(init: str, experts: int) -> tuple[float, ...]:
    """The multiple of the identity that every M starts as."""
    if init == "first":
        return (1.0, *[0.0] * (experts - 1))
    return (1.0 / experts,) * experts


@torch.no_grad()
def start_weights(
    topology: Topology, experts: Sequence[Mapping[str, Tensor]], shapes: Mapping[str, Sequence[int]], init: str
) -> dict[str, Tensor]:
    """The parameters of a backbone that no training has changed: the first expert's, or the average of all.

    Args:
        topology ([`Topology`]): Of the backbone, or of a part.
        experts (`Sequence[Mapping[str, torch.Tensor]]`): The experts' parameters, float32.
        shapes (`Mapping`): Of the merged parameters.
        init (`str`): The recipe's.
    """
    start = Supernet(topology, experts, shapes, start_scales(init, len(experts)), "diagonal")
    return start.to(next(iter(experts[0].values())).device).fold()


def starting_experts(group: BackboneGroup) -> list[Mapping[str, Tensor]]:
    """The experts' weights, with aligned channels where the recipe's `init` says so."""
    init = group.settings.init
    return group.experts if init in ("first", "average") else aligned_experts(group, init)


def _refine_scale(settings: FsMergeConfig) -> float:
    rate = settings.refine_learning_rate
    return 1 / 3 if rate is None else rate / settings.learning_rate
