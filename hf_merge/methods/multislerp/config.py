"""Settings of MultiSLERP."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ...config import MergeConfig
from ...settings import setting


@dataclass
class MultiSlerpConfig(MergeConfig):
    """The spherical mean of several experts in one step, of their task vectors when there is a base model.

    Args:
        weights (`float`): The weight w_i of each expert.
        normalize (`bool`): Divide the weights by their sum.
    """

    merge_type: ClassVar[str] = "multislerp"

    weights: float = setting(1.0, "Weight of each expert.", scope="expert")
    normalize: bool = setting(True, "Divide the weights by their sum.")
