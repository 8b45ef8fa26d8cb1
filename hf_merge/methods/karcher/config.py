"""Settings of the Karcher mean."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ...config import MergeConfig
from ...settings import setting


@dataclass
class KarcherConfig(MergeConfig):
    """The Karcher mean: the point of a sphere that is nearest to all experts (arXiv 2603.04972).

    Args:
        weights (`float`): The weight w_i of each expert.
        max_iter (`int`): The largest number of steps.
        tol (`float`): The length of a step, in radians, below which the mean is found.
    """

    merge_type: ClassVar[str] = "karcher"
    papers: ClassVar[tuple[str, ...]] = ("2603.04972",)

    weights: float = setting(1.0, "Weight of each expert.", minimum=0.0, scope="expert")
    max_iter: int = setting(100, "Largest number of steps.", minimum=1)
    tol: float = setting(1e-5, "Length of a step at which to stop.", above=0.0)
