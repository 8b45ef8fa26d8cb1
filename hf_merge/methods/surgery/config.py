"""Settings of Representation Surgery."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from ...config import MergeConfig
from ...settings import setting
from ..inner_config import InnerRecipeConfig, refuse_changed_heads


@dataclass
class SurgeryConfig(InnerRecipeConfig):
    """Representation Surgery (arXiv 2402.02705): after a merge, a small adapter for every task corrects the features that the merged
    backbone hands to the task's head.

    Args:
        init (`str` or `dict`): The merge: a method or recipe, without data or with the same samples.
        rank (`int`): The width r of the adapters.
        epochs (`int`): Passes over the samples.
        batch_size (`int`): Samples that run together, and rows of an update.
        learning_rate (`float`): Of Adam.
    """

    merge_type: ClassVar[str] = "surgery"
    papers: ClassVar[tuple[str, ...]] = ("2402.02705",)

    init: Any = field(default="wudi", metadata={"help": "Method or recipe of the merge."})
    rank: int = setting(16, "Width of the adapters.", minimum=1, scope="merge")
    epochs: int = setting(200, "Passes over the samples.", minimum=1, scope="merge")
    batch_size: int = setting(16, "Samples that run together, and rows of an update.", minimum=1, scope="merge")
    learning_rate: float = setting(1e-3, "Adam's step.", above=0, scope="merge")

    def refuse_inner(self, config: MergeConfig) -> str | None:
        return refuse_changed_heads(config)
