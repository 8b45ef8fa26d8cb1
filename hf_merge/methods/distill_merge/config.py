"""Settings of the methods that distill the last hidden states of the experts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ...settings import setting
from ..model_config import ModelTrainingConfig


@dataclass
class DistillationConfig(ModelTrainingConfig):
    """Base class of the configs of methods that distill the last hidden states.

    Args:
        loss (`str`): `"sse"`: squared error, summed over samples, tokens and channels. `"relative"`: the same, divided for each
            task by the variance of its targets, so that no task outweighs another. `"cosine"`: one minus the cosine, summed over
            tokens. `"logits"`: the divergence KL(expert ‖ merged) of the predictions, under each expert's own head; only for
            models with logits over classes or tokens.
        mask_padding (`bool`): Leave padding tokens out of the loss.
    """

    loss: str = setting(
        "relative",
        "'sse', 'relative', 'cosine' or 'logits'.",
        choices=("sse", "relative", "cosine", "logits"),
        scope="merge",
    )
    mask_padding: bool = setting(True, "Leave padding tokens out of the loss.", scope="merge")


@dataclass
class DistillMergeConfig(DistillationConfig):
    """End-to-end distillation of the coefficients of the task vectors (a baseline of arXiv 2502.12706).

    Args:
        granularity (`str`): One coefficient for every `"element"` of a task vector, for every `"tensor"`, or for every `"task"`.
    """

    merge_type: ClassVar[str] = "distill_merge"
    papers: ClassVar[tuple[str, ...]] = ("2502.12706",)

    learning_rate: float = setting(1e-2, "Adam's step on the coefficients.", above=0, scope="merge")
    granularity: str = setting(
        "element",
        "One coefficient per 'element', 'tensor' or 'task'.",
        choices=("element", "tensor", "task"),
        scope="merge",
    )


@dataclass
class DirectDistillConfig(DistillationConfig):
    """End-to-end distillation of the weights themselves, from a merged start (a baseline of arXiv 2502.12706)."""

    merge_type: ClassVar[str] = "direct_distill"
    papers: ClassVar[tuple[str, ...]] = ("2502.12706",)

    learning_rate: float = setting(5e-4, "Adam's step on the weights.", above=0, scope="merge")
