"""Settings of ProDistill."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from ...settings import setting
from ..block_config import BlockMethodConfig


@dataclass
class ProDistillConfig(BlockMethodConfig):
    """Progressive layer-wise distillation (ProDistill, arXiv 2502.12706).

    Each block of the merged model is trained to give, on its own inputs, what the expert's block gives on the expert's inputs.
    Trained are coefficients on the task vectors: θ(α) = θ_init + Σ_i (α_i − α_init) ∘ τ_i.

    Args:
        init (`str` or `dict`): The merge that training starts from: the paper's `"task_arithmetic"`, `"wudi"`, any recipe
            without data, or `"regmean_pp"`, which then merges each block before it is trained.
        init_scale (`float`): The coefficient of `init="task_arithmetic"`; 0.5 suits two experts.
        batch_size (`int`): Samples of a task that run together; an update takes one batch of every task.
        epochs (`int`): Passes over the samples, for each block.
        learning_rate (`float`): Of Adam, on the coefficients.
        lr_scheduler (`str`): `"constant"`, or `"cosine"` to zero over the epochs of a block.
        adam_beta1 (`float`): Adam's decay of the mean of the gradients.
        adam_beta2 (`float`): Adam's decay of the mean of their squares.
        adam_epsilon (`float`): Adam's ε.
        granularity (`str`): One coefficient for every `"element"` of a task vector, for every `"tensor"`, or for every `"task"`
            (and block).
        loss (`str`): `"sse"`: squared error, summed over samples, tokens and channels (the paper). `"relative"`: the same, divided
            for each task by the variance of its targets, so that no task outweighs another. `"cosine"`: one minus the cosine,
            summed over tokens.
        mask_padding (`bool`): Leave padding tokens out of the loss.
        skip_blocks (`int`): How many blocks, those with the smallest task vectors, keep the values of `init`.
        early_stopping_patience (`int`, *optional*): Stop a block after this many epochs without progress.
        early_stopping_threshold (`float`): The part of the best loss that counts as progress.
    """

    merge_type: ClassVar[str] = "prodistill"
    papers: ClassVar[tuple[str, ...]] = ("2502.12706",)
    accepts_block_methods: ClassVar[bool] = True

    init: Any = field(default="task_arithmetic", metadata={"help": "Method or recipe that training starts from."})
    init_scale: float = setting(0.3, "Coefficient of init='task_arithmetic'.", scope="merge")
    batch_size: int = setting(16, "Samples of a task that run together.", minimum=1, scope="merge")
    epochs: int = setting(50, "Passes over the samples, for each block.", minimum=1, scope="merge")
    learning_rate: float = setting(0.01, "Adam's step on the coefficients.", above=0, scope="merge")
    lr_scheduler: str = setting(
        "constant", "'constant' or 'cosine' to zero.", choices=("constant", "cosine"), scope="merge"
    )
    adam_beta1: float = setting(0.9, "Adam's first decay.", minimum=0, below=1, scope="merge")
    adam_beta2: float = setting(0.999, "Adam's second decay.", minimum=0, below=1, scope="merge")
    adam_epsilon: float = setting(1e-8, "Adam's epsilon.", above=0, scope="merge")
    granularity: str = setting(
        "element",
        "One coefficient per 'element', 'tensor' or 'task'.",
        choices=("element", "tensor", "task"),
        scope="merge",
    )
    loss: str = setting(
        "relative", "'sse', 'relative' or 'cosine'.", choices=("sse", "relative", "cosine"), scope="merge"
    )
    mask_padding: bool = setting(True, "Leave padding tokens out of the loss.", scope="merge")
    skip_blocks: int = setting(0, "How many blocks keep the values of init.", minimum=0, scope="merge")
    early_stopping_patience: int | None = setting(
        None, "Stop a block after this many epochs without progress.", type=int, minimum=1, scope="merge"
    )
    early_stopping_threshold: float = setting(
        1e-3, "The part of the best loss that counts as progress.", minimum=0, scope="merge"
    )

    def start_settings(self, recipe: Mapping[str, Any]) -> dict[str, Any]:
        return {"scaling": self.init_scale} if recipe.get("merge_type") == "task_arithmetic" else {}
