"""Settings of PCB-Merging."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ...config import MergeConfig
from ...settings import setting


@dataclass
class PcbConfig(MergeConfig):
    """PCB-Merging: weigh entries by the competition within and between tasks (arXiv 2410.02396).

    Args:
        density (`float`): The fraction of the entries of each task vector that are kept, those of highest score.
        scaling (`float`): The scaling coefficient λ of the merged task vector.
    """

    merge_type: ClassVar[str] = "pcb"
    papers: ClassVar[tuple[str, ...]] = ("2410.02396",)

    density: float = setting(
        0.2, "Fraction of each task vector that is kept.", minimum=0.0, maximum=1.0, scope="expert"
    )
    scaling: float = setting(1.0, "Scaling coefficient of the merged task vector.")
