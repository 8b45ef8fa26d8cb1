"""Settings of Twin-Merging."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from ...config import MergeConfig
from ...settings import setting
from ..inner_config import InnerRecipeConfig, refuse_changed_heads


@dataclass
class TwinConfig(InnerRecipeConfig):
    """Twin-Merging (arXiv 2406.15479): a shared merge, what every expert has beyond it at a small rank, and a router that says how much
    of it an input needs.

    Args:
        init (`str` or `dict`): The shared merge: a method or recipe, without data or with the same samples.
        rank (`int`): The largest rank r of what is kept of each weight matrix of an expert.
        router_width (`int`): The hidden units of the router.
        epochs (`int`): Passes of the router over the samples.
        batch_size (`int`): Samples that run together, and rows of an update.
        learning_rate (`float`): Of Adam.
    """

    merge_type: ClassVar[str] = "twin"
    papers: ClassVar[tuple[str, ...]] = ("2406.15479",)

    init: Any = field(default="task_arithmetic", metadata={"help": "Method or recipe of the shared merge."})
    rank: int = setting(16, "Largest rank of an expert's part of a matrix.", minimum=1, scope="merge")
    router_width: int = setting(128, "Hidden units of the router.", minimum=1, scope="merge")
    epochs: int = setting(50, "Passes of the router over the samples.", minimum=1, scope="merge")
    batch_size: int = setting(16, "Samples that run together, and rows of an update.", minimum=1, scope="merge")
    learning_rate: float = setting(1e-3, "Adam's step.", above=0, scope="merge")

    def refuse_inner(self, config: MergeConfig) -> str | None:
        return refuse_changed_heads(config)
