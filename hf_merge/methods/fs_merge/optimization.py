"""The optimizer, and how learning rates rise and fall."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from .config import FeatureTrainingConfig


def learning_rate_factor(settings: FeatureTrainingConfig, step: int, total: int) -> float:
    """The part of the peak learning rate: a linear warm-up, then a cosine to zero or a constant.

    Args:
        settings ([`FeatureTrainingConfig`]): The recipe.
        step (`int`): The number of the update.
        total (`int`): Of all updates.
    """
    warm_up = settings.warmup_ratio * total
    if step < warm_up:
        return (step + 1) / (warm_up + 1)
    if settings.lr_scheduler == "constant":
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(total - warm_up, 1)))


def make_optimizer(
    settings: FeatureTrainingConfig, trained: Mapping[str, Sequence[nn.Parameter]], rates: Mapping[str, float]
) -> torch.optim.Optimizer:
    """AdamW with a peak learning rate for each kind of tensor, kept as `"peak"` in its groups. Vectors do not decay.

    Args:
        settings ([`FeatureTrainingConfig`]): The recipe.
        trained (`Mapping`): The tensors, by `"matrix"`, `"vector"` and `"output"`.
        rates (`Mapping[str, float]`): The peak rates, by the same.
    """
    groups = [
        {
            "params": list(parameters),
            "lr": rates[name],
            "peak": rates[name],
            "weight_decay": 0.0 if name == "vector" else settings.weight_decay,
        }
        for name, parameters in trained.items()
        if parameters
    ]
    return torch.optim.AdamW(groups, betas=(settings.adam_beta1, settings.adam_beta2))
