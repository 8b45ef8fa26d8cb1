"""Settings of Passthrough."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ...config import MergeConfig
from ...settings import setting


@dataclass
class PassthroughConfig(MergeConfig):
    """One expert as it is, times a factor: for rules that treat some parameters otherwise, and for rewriting a checkpoint.

    Args:
        scaling (`float`): The factor of the parameters.
    """

    merge_type: ClassVar[str] = "passthrough"

    scaling: float = setting(1.0, "Factor of the parameters.")
