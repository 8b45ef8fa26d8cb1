"""TIES-Merging: trim the task vectors, elect a sign for every entry, average the experts that agree (arXiv 2306.01708)."""

from __future__ import annotations

from ..trimming import TrimmingMethod
from .config import TiesConfig


class Ties(TrimmingMethod):
    """θ_0 + λ · disjoint mean of the trimmed task vectors (arXiv 2306.01708)."""

    def combines_by_sign(self, settings: TiesConfig) -> bool:
        return True

    def divides(self, settings: TiesConfig) -> bool:
        return settings.merge == "mean"
