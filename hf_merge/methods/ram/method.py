"""Reinforced Agent Merging, RAM and RAM+ (arXiv 2601.13572)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..base import TensorGroup, TensorMethod


Overlap = tuple[int, int]
"""How many entries an expert changed together with others, and how many alone."""


class Ram(TensorMethod):
    """θ_0 + the mean over the experts that changed an entry; where only one did, its change times l_i (1 without `rescale`).

    RAM+ has l_i = 1 + r · min(ρ_i, α), ρ_i the number of entries that expert i shares with others over the number it changed
    alone (arXiv 2601.13572).
    """

    working_copies = (8.0, 1.3)
    requires_base = True
    changes_only = True

    def __init__(self) -> None:
        self._overlaps: dict[str, Overlap] = {}

    def merge(self, group: TensorGroup) -> Tensor:
        settings = group.settings
        changes = self._count_changes(group)
        merged = torch.zeros_like(group.base)
        for index, vector in enumerate(group.task_vectors()):
            vector.mul_(vector.abs() > settings.epsilon)
            factor = self._factor(group, index, changes)
            merged += vector if factor == 1.0 else torch.where(changes == 1, vector * factor, vector)
        return merged.div_(changes.clamp_(min=1)).add_(group.base)

    def rounds(self, settings: Any) -> int:
        return 1 if settings.rescale == "model" else 0

    def observe(self, group: TensorGroup, round: int) -> dict[str, Overlap]:
        if group.base is None:
            return {}
        changes = self._count_changes(group)
        return {name: _overlap(group, index, changes) for index, name in enumerate(group.expert_names)}

    def conclude(self, observations: Iterator[tuple[str, Any]], round: int, settings: Any) -> None:
        totals: dict[str, Overlap] = defaultdict(lambda: (0, 0))
        for _, observed in observations:
            for name, (shared, unique) in observed.items():
                totals[name] = (totals[name][0] + shared, totals[name][1] + unique)
        self._overlaps = dict(totals)

    def _factor(self, group: TensorGroup, index: int, changes: Tensor) -> float:
        settings = group.settings
        if settings.rescale == "none":
            return 1.0
        per_model = settings.rescale == "model"
        shared, unique = self._overlaps[group.expert_names[index]] if per_model else _overlap(group, index, changes)
        return 1.0 + settings.r * min(shared / max(unique, 1), settings.alpha)

    @staticmethod
    def _count_changes(group: TensorGroup) -> Tensor:
        """How many experts changed each entry (int16)."""
        changes = torch.zeros(group.shape, dtype=torch.int16, device=group.base.device)
        for vector in group.task_vectors():
            changes += vector.abs() > group.settings.epsilon
        return changes


def _overlap(group: TensorGroup, index: int, changes: Tensor) -> Overlap:
    changed = group.task_vector(index).abs() > group.settings.epsilon
    unique = int(torch.count_nonzero(changed & (changes == 1)))
    return int(torch.count_nonzero(changed)) - unique, unique
