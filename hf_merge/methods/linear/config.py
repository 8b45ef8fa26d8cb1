"""Settings of the weighted average."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ...config import MergeConfig
from ...settings import setting


@dataclass
class LinearConfig(MergeConfig):
    """Weighted average of the experts ("model soup", arXiv 2203.05482).

    Args:
        weights (`float`): The weight w_i of each expert.
        normalize (`bool`): Divide by Σ w_i.
    """

    merge_type: ClassVar[str] = "linear"
    papers: ClassVar[tuple[str, ...]] = ("2203.05482",)

    weights: float = setting(1.0, "Weight of each expert.", scope="expert")
    normalize: bool = setting(True, "Divide by the sum of the weights.")
