"""Settings of task arithmetic."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ...config import MergeConfig
from ...settings import setting


@dataclass
class TaskArithmeticConfig(MergeConfig):
    """Task arithmetic (arXiv 2212.04089).

    Args:
        scaling (`float`): The scaling coefficient λ. The paper tunes it on held-out data; 0.3 suits three and more experts.
        weights (`float`): The weight w_i of each expert.
        normalize (`bool`): Divide the sum of the task vectors by Σ w_i.
    """

    merge_type: ClassVar[str] = "task_arithmetic"
    papers: ClassVar[tuple[str, ...]] = ("2212.04089",)

    scaling: float = setting(0.3, "Scaling coefficient of the merged task vector.")
    weights: float = setting(1.0, "Weight of each expert.", scope="expert")
    normalize: bool = setting(False, "Divide by the sum of the weights.")
