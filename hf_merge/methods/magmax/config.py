"""Settings of MagMax."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ...config import MergeConfig
from ...settings import setting


@dataclass
class MagMaxConfig(MergeConfig):
    """MagMax: of every entry the largest change (arXiv 2407.06322).

    Args:
        scaling (`float`): The scaling coefficient λ of the merged task vector.
    """

    merge_type: ClassVar[str] = "magmax"
    papers: ClassVar[tuple[str, ...]] = ("2407.06322",)

    scaling: float = setting(0.5, "Scaling coefficient of the merged task vector.")
