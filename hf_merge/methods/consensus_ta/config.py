"""Settings of Consensus Task Arithmetic."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ...config import MergeConfig
from ...settings import setting


@dataclass
class ConsensusTaConfig(MergeConfig):
    """Consensus Task Arithmetic: task arithmetic without the entries that too few tasks use (arXiv 2405.07813).

    Args:
        k (`int`): How many tasks have to use an entry for it to be kept. 0 keeps everything; 2 removes the entries that no task
            or only one task uses.
        t (`float`): The threshold t_i of a task's mask: larger values keep fewer entries.
        scaling (`float`): The scaling coefficient λ of the merged task vector.
        weights (`float`): The weight w_i of each expert.
    """

    merge_type: ClassVar[str] = "consensus_ta"
    papers: ClassVar[tuple[str, ...]] = ("2405.07813",)

    k: int = setting(2, "How many tasks have to use an entry.", minimum=0)
    t: float = setting(0.4, "Threshold of a task's mask.", minimum=0.0, scope="expert")
    scaling: float = setting(0.3, "Scaling coefficient of the merged task vector.")
    weights: float = setting(1.0, "Weight of each expert.", scope="expert")
