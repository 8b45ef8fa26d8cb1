"""Labels of samples, for methods that train on them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..errors import ConfigError, suggest


if TYPE_CHECKING:
    from transformers import PretrainedConfig


IGNORED = -100
"""The label of tokens that do not count, in all of transformers."""


def read_label(label: Any, task: str, index: int, config: PretrainedConfig) -> Tensor:
    """The label of one sample as a tensor: a class (int64), one class for each token, or numbers to regress to (float32).

    Args:
        label: A number, the name of a class, or a list or array of numbers.
        task (`str`): The expert's name.
        index (`int`): The number of the sample.
        config ([`~transformers.PretrainedConfig`]): The expert's config.

    Raises:
        ConfigError: There is no label, or the expert does not know it.
    """
    where = f"Sample {index} of '{task}'"
    if label is None:
        raise ConfigError(
            f"{where} has no label: this method trains on labels, give each sample a 'labels' or 'label' column."
        )
    if isinstance(label, str):
        return torch.tensor(_class_of(label, where, config))
    try:
        value = torch.as_tensor(np.asarray(label))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{where}: the label {label!r} cannot be turned into a tensor ({error}).") from error
    if value.is_floating_point() or getattr(config, "problem_type", None) in (
        "regression",
        "multi_label_classification",
    ):
        return value.float()
    _check_range(value.long(), where, config)
    return value.long()


def _class_of(name: str, where: str, config: PretrainedConfig) -> int:
    known = {str(key): value for key, value in (getattr(config, "label2id", None) or {}).items()}
    if name not in known:
        raise ConfigError(
            f"{where} has the label '{name}', which its expert does not know.{suggest(name, known)} Known: {', '.join(known)}."
        )
    return known[name]


def _check_range(value: Tensor, where: str, config: PretrainedConfig) -> None:
    """Classes are between 0 and their number; models that predict tokens have a vocabulary instead."""
    count = config.num_labels if value.dim() == 0 else getattr(config.get_text_config(), "vocab_size", None)
    wrong = (
        value[(value < 0) & (value != IGNORED)]
        if count is None
        else value[((value < 0) & (value != IGNORED)) | (value >= count)]
    )
    if wrong.numel() or (value.dim() == 0 and value == IGNORED):
        found = wrong[0] if wrong.numel() else value
        raise ConfigError(f"{where} has the label {int(found)}; its expert knows 0 to {count - 1}.")
