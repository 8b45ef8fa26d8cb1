"""[`ProDistillArguments`]: how a merge with calibration samples is run and logged."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from ..data.cache import ActivationCache
from ..engines.options import EngineOptions
from ..errors import ConfigError
from ..methods.block_base import BlockMonitor


_IN_RECIPE = {
    "learning_rate": "learning_rate",
    "num_train_epochs": "epochs",
    "per_device_train_batch_size": "batch_size",
    "lr_scheduler_type": "lr_scheduler",
    "adam_beta1": "adam_beta1",
    "adam_beta2": "adam_beta2",
    "adam_epsilon": "adam_epsilon",
}


@dataclass
class ProDistillArguments(TrainingArguments):
    """How a merge with calibration samples is run and logged. What is computed stands in the recipe: learning rate, epochs and
    batch size are set there, and an error here.

    A [`~transformers.TrainingArguments`], so that the callbacks of transformers find what they look for.

    Args:
        work_dir (`str`, *optional*): A folder for finished blocks: a merge that was killed goes on from it when it is run again.
            [`Merger.save_pretrained`] has one beside the output folder anyway.
        activation_cache (`str`): Where activations are kept: `"memory"`, `"disk"`, or a device.
        activation_cache_limit (`int`, *optional*): Bytes of activations in memory; the rest goes to disk.
        activation_cache_dtype (`str`, *optional*): `"bfloat16"` halves them.
        self_check (`bool`): Compare running block by block with a plain forward before the merge.
        seed (`int`, *optional*): Of the order of the batches; the recipe's when not given.

    Of the inherited arguments `bf16`, `gradient_accumulation_steps`, `logging_strategy`, `logging_steps`, `report_to`, `run_name`
    and `disable_tqdm` have their usual meaning. An update is a step, an epoch is a pass over the samples for one block.

    Raises:
        ConfigError: An argument belongs into the recipe.
    """

    work_dir: str | None = field(default=None, metadata={"help": "Folder for finished blocks."})
    activation_cache: str = field(default="memory", metadata={"help": "'memory', 'disk' or a device."})
    activation_cache_limit: int | None = field(default=None, metadata={"help": "Bytes of activations in memory."})
    activation_cache_dtype: str | None = field(default=None, metadata={"help": "'bfloat16' halves the activations."})
    self_check: bool = field(default=True, metadata={"help": "Compare with a plain forward before the merge."})
    seed: int | None = field(default=None, metadata={"help": "Of the order of the batches; the recipe's by default."})
    report_to: Any = field(default="none", metadata={"help": "Integrations that log: 'tensorboard', 'wandb', 'all'."})
    eval_strategy: str = field(default="epoch", metadata={"help": "When the loss is given to on_evaluate."})
    metric_for_best_model: str = field(default="loss", metadata={"help": "The metric of EarlyStoppingCallback."})

    def __post_init__(self):
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        for name, setting in _IN_RECIPE.items():
            if getattr(self, name) != defaults[name]:
                raise ConfigError(
                    f"ProDistillArguments.{name} is part of the recipe: set ProDistillConfig({setting}={getattr(self, name)!r})."
                )
        if self.activation_cache_dtype not in (None, "float32", "float16", "bfloat16"):
            raise ConfigError(
                f"Invalid value for activation_cache_dtype: {self.activation_cache_dtype!r}. It must be 'float32', 'float16' or "
                "'bfloat16'."
            )
        ActivationCache(limit=self.activation_cache_limit)
        if self.bf16 and not torch.accelerator.is_available():
            self.use_cpu = True  # transformers asks for it before it allows bfloat16 without an accelerator
        super().__post_init__()

    def engine_options(self, monitor: BlockMonitor) -> EngineOptions:
        """What the engine is told."""
        return EngineOptions(
            work_dir=Path(self.work_dir) if self.work_dir is not None else None,
            bf16=self.bf16,
            gradient_accumulation_steps=self.gradient_accumulation_steps,
            cache=self.activation_cache,
            cache_limit=self.activation_cache_limit,
            cache_dtype=self.activation_cache_dtype,
            self_check=self.self_check,
            seed=self.seed,
            monitor=monitor,
        )
