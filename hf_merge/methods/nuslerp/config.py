"""Settings of NuSLERP."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ...config import MergeConfig
from ...settings import setting


@dataclass
class NuSlerpConfig(MergeConfig):
    """Spherical interpolation between two experts by weight, of their task vectors when there is a base model.

    Args:
        weights (`float`): The weight of each expert; the position on the arc is w_2 / (w_1 + w_2).
        granularity (`str`): What is one vector: a whole parameter (`"tensor"`), each of its rows along the last dimension
            (`"row"`), or along the first (`"column"`).
    """

    merge_type: ClassVar[str] = "nuslerp"

    weights: float = setting(1.0, "Weight of each expert.", minimum=0.0, scope="expert")
    granularity: str = setting(
        "tensor", "One vector is a 'tensor', a 'row' or a 'column'.", choices=("tensor", "row", "column")
    )
