"""Keeping the largest entries of a task vector, of one parameter or of the whole model."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .base import ParameterKind, TensorGroup
from .election import masked
from .selection import (
    HIGH_BINS,
    LOW_BINS,
    Cut,
    count_kept,
    cuts_of_parts,
    high_histogram,
    locate,
    low_histogram,
    magnitude_of,
    selection_memory,
)
from .sparsify import SparseMethod, task_vector_parts


Target = tuple[str, float]
"""What has one threshold in `scope="model"`: an expert's name and a density (rules and gradients may set several)."""

SparseHistogram = tuple[Tensor, Tensor]
"""The bins of a histogram that are not empty, and their counts: a parameter's magnitudes fill few of them."""

Observation = dict[str, tuple[float, dict[int, SparseHistogram]]]
"""For each expert its density and its histograms: of the high bits under the key -1, or of the low bits under the high ones."""


class TrimmingMethod(SparseMethod):
    """A method that trims each task vector to the `density` largest entries, with the settings `density` and `scope`.

    With `scope="model"` an expert's threshold is the k-th largest magnitude (float32) over all parameters that are merged. It is
    found exactly in two rounds, the high and then the low bits of the magnitudes. Entries equal to it are all kept, so that the
    order of the parameters does not matter.
    """

    def __init__(self) -> None:
        self._bins: dict[Target, tuple[int, int]] = {}
        self._cuts: dict[Target, Cut] = {}

    @classmethod
    def working_memory(cls, kind: ParameterKind, shape: Sequence[int], experts: int, settings: Any) -> int:
        held = super().working_memory(kind, shape, experts, settings)
        if settings.scope == "model":  # while it is surveyed
            return held + 8 * experts * (HIGH_BINS + LOW_BINS)
        return max(held, selection_memory(math.prod(shape)))

    @classmethod
    def looks_again(cls, settings: Any) -> bool:
        return settings.scope != "model"

    def mark(self, group: TensorGroup, index: int) -> Cut:
        """What separates the entries of expert `index` that are kept in this parameter."""
        density = group.settings.density[index]
        if group.settings.scope == "model":
            return self._cuts[group.expert_names[index], density]
        size = group.shape.numel()
        return cuts_of_parts(task_vector_parts(group, index), size, [count_kept(density, size)])[0]

    def sparsify(self, vector: Tensor, piece: TensorGroup, index: int, mark: Cut) -> Tensor:
        if piece.settings.scope == "model" and vector.dtype != torch.float32:
            return masked(vector, mark.mask(vector.float()))
        return mark.trim(vector, piece.offset)

    def rounds(self, settings: Any) -> int:
        return 2 if settings.scope == "model" else 0

    def observe(self, group: TensorGroup, round: int) -> Observation:
        if group.stored_base is None:
            return {}
        observed: Observation = {}
        for name, density in zip(group.expert_names, group.settings.density, strict=True):
            chosen = {high for (expert, _), (high, _) in self._bins.items() if expert == name and high >= 0}
            observed[name] = (density, dict.fromkeys(sorted(chosen) if round else [-1]))
        totals = {(name, high): 0 for name, (_, highs) in observed.items() for high in highs}
        for piece in group.pieces():
            for name, vector in zip(group.expert_names, piece.task_vectors(), strict=True):
                magnitudes = vector.float()
                for high in observed[name][1]:
                    totals[name, high] += low_histogram(magnitudes, high) if round else high_histogram(magnitudes)
        for (name, high), histogram in totals.items():
            observed[name][1][high] = _sparse(histogram)
        return observed

    def conclude(self, observations: Iterator[tuple[str, Any]], round: int, settings: Any) -> None:
        size = HIGH_BINS if round == 0 else LOW_BINS
        totals: dict[tuple[str, int], Tensor] = defaultdict(lambda: torch.zeros(size, dtype=torch.int64))
        targets: set[Target] = set()
        for _, observed in observations:
            for name, (density, histograms) in observed.items():
                targets.add((name, density))
                for high, (bins, counts) in histograms.items():
                    totals[name, high].index_add_(0, bins, counts)
        if round == 0:
            self._bins = {target: _choose_bin(totals[target[0], -1], target[1]) for target in targets}
        else:
            self._cuts = {target: self._conclude_cut(target, totals) for target in targets}

    def _conclude_cut(self, target: Target, totals: dict[tuple[str, int], Tensor]) -> Cut:
        high, rank = self._bins[target]
        if high < 0:
            return Cut.nothing()
        low, _ = locate(totals[target[0], high], rank)
        return Cut(magnitude_of(high, low))


def _sparse(histogram: Tensor) -> SparseHistogram:
    bins = histogram.nonzero().squeeze(1)
    return bins.cpu(), histogram[bins].cpu()


def _choose_bin(histogram: Tensor, density: float) -> tuple[int, int]:
    """The bin of the high bits that holds the threshold and the rank inside it; (-1, 0) when nothing is kept."""
    k = count_kept(density, int(histogram.sum()))
    return locate(histogram, k) if k else (-1, 0)
