"""Settings of NearSwap."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ...config import MergeConfig
from ...settings import setting


@dataclass
class NearSwapConfig(MergeConfig):
    """NearSwap: take an expert's value where it is near the base model's, move towards it by `t` elsewhere.

    Args:
        t (`float`): The largest change of an entry.
    """

    merge_type: ClassVar[str] = "nearswap"

    t: float = setting(0.0001, "Largest change of an entry.", minimum=0.0)
