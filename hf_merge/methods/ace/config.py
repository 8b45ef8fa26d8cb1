"""Settings of ACE-Merging."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ...config import LinearLayersConfig
from ...settings import setting


@dataclass
class AceConfig(LinearLayersConfig):
    """ACE-Merging: RegMean with input covariances estimated from the task vectors (arXiv 2603.02945).

    Args:
        ridge (`float`): ε, relative to the mean eigenvalue of the estimated covariances.
        heterogeneity (`float`): A layer whose ln ‖T_i‖² have a larger variance over the experts is heterogeneous: its
            covariances are normalised by their traces and its result is refined.
        refined_fraction (`float`): The part of the singular directions that the refinement lifts.
    """

    merge_type: ClassVar[str] = "ace"
    papers: ClassVar[tuple[str, ...]] = ("2603.02945",)

    ridge: float = setting(1e-3, "Ridge, relative to the mean eigenvalue of the covariances.", above=0)
    heterogeneity: float = setting(1.0, "Variance of ln ‖T_i‖² above which a layer is refined.", minimum=0)
    refined_fraction: float = setting(0.3, "Part of the singular directions that are refined.", minimum=0, maximum=1)
