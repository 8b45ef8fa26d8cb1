"""Settings of MaTS."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from ...settings import setting
from ..block_config import BlockMethodConfig


@dataclass
class MatsConfig(BlockMethodConfig):
    """MaTS (arXiv 2312.04339) with RegMean's objective: its linear systems are solved by conjugate gradients from a chosen start.

    Args:
        init (`str` or `dict`): The merge without data that the iteration starts from: `"task_arithmetic"`, `"wudi"`, or any recipe.
        init_scale (`float`): The coefficient of `init="task_arithmetic"`.
        iterations (`int`): Steps of conjugate gradients, at most. Few steps stay near the start.
        tolerance (`float`): Stop when the residual has this part of the right side's norm.
        alpha (`float`): The factor on the off-diagonal entries of the Gram matrices. One value, or a gradient over depth.
        normalize (`bool`): Divide each task's Gram matrix by its number of tokens, so that tasks with longer samples do not weigh
            more.
    """

    merge_type: ClassVar[str] = "mats"
    papers: ClassVar[tuple[str, ...]] = ("2312.04339",)

    init: Any = field(
        default="task_arithmetic", metadata={"help": "Method or recipe without data that the iteration starts from."}
    )
    init_scale: float = setting(0.3, "Coefficient of init='task_arithmetic'.", scope="merge")
    iterations: int = setting(20, "Steps of conjugate gradients, at most.", minimum=0)
    tolerance: float = setting(1e-5, "Stop at this residual, relative to the right side.", minimum=0)
    alpha: float = setting(1.0, "Factor on the off-diagonal entries of the Gram matrices.", minimum=0, maximum=1)
    normalize: bool = setting(True, "Divide each task's Gram matrix by its number of tokens.")

    def start_settings(self, recipe: Mapping[str, Any]) -> dict[str, Any]:
        return {"scaling": self.init_scale} if recipe.get("merge_type") == "task_arithmetic" else {}
