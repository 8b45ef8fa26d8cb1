"""Settings of the exact sum of task vectors, and of its best approximation of a given rank."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ...config import LinearLayersConfig, MergeConfig
from ...settings import setting


@dataclass
class CatConfig(MergeConfig):
    """The exact sum of the task vectors; the factors of adapters are concatenated.

    Args:
        weights (`float`): The weight w_i of each expert.
    """

    merge_type: ClassVar[str] = "cat"

    weights: float = setting(1.0, "Weight of each expert.", scope="expert")


@dataclass
class SvdConfig(LinearLayersConfig):
    """The best approximation, of a given rank, of the sum of the task vectors.

    Args:
        weights (`float`): The weight w_i of each expert.
        rank (`int`, *optional*): The rank. When not given: the largest rank of the experts' adapters. Full models, and adapters
            that are not factors, need it.
    """

    merge_type: ClassVar[str] = "svd"

    weights: float = setting(1.0, "Weight of each expert.", scope="expert")
    rank: int | None = setting(None, "Rank of the merged task vector.", type=int, minimum=1)
