"""What the recipes of the methods that train through the whole model have in common."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from ..settings import setting
from .block_config import BlockMethodConfig


@dataclass
class ModelTrainingConfig(BlockMethodConfig):
    """Base class of the configs of methods that train through the whole model.

    Args:
        init (`str` or `dict`): The merge that training starts from: `"task_arithmetic"`, `"wudi"`, any recipe without data, or a
            block-wise method with the same samples, such as `"regmean_pp"`.
        init_scale (`float`): The coefficient of `init="task_arithmetic"`.
        batch_size (`int`): Calibration samples of a task that run together.
        epochs (`int`): Passes over the samples.
        learning_rate (`float`): Of Adam.
        lr_scheduler (`str`): `"constant"`, or `"cosine"` to zero.
        adam_beta1 (`float`): The decay of Adam's first moment.
        adam_beta2 (`float`): The decay of Adam's second moment.
        adam_epsilon (`float`): Added to Adam's denominator.
    """

    accepts_block_methods: ClassVar[bool] = True

    init: Any = field(default="task_arithmetic", metadata={"help": "Method or recipe that training starts from."})
    init_scale: float = setting(0.3, "Coefficient of init='task_arithmetic'.", scope="merge")
    batch_size: int = setting(16, "Calibration samples of a task that run together.", minimum=1, scope="merge")
    epochs: int = setting(100, "Passes over the samples.", minimum=1, scope="merge")
    learning_rate: float = setting(1e-3, "Adam's step.", above=0, scope="merge")
    lr_scheduler: str = setting(
        "constant", "'constant' or 'cosine' to zero.", choices=("constant", "cosine"), scope="merge"
    )
    adam_beta1: float = setting(0.9, "Adam's first decay.", minimum=0, below=1, scope="merge")
    adam_beta2: float = setting(0.999, "Adam's second decay.", minimum=0, below=1, scope="merge")
    adam_epsilon: float = setting(1e-8, "Adam's epsilon.", above=0, scope="merge")

    def start_settings(self, recipe: Mapping[str, Any]) -> dict[str, Any]:
        return {"scaling": self.init_scale} if recipe.get("merge_type") == "task_arithmetic" else {}
