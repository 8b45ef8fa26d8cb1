"""The optimizer, and how learning rates rise and fall."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from .config import FeatureTrainingConfig
from .states import MovingAverage
from .weights import TrainedWeights


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


class Updates:
    """The updates of a training: what is trained, its optimizer, and the average of what it passes through.

    Args:
        settings ([`FeatureTrainingConfig`]): The recipe.
        weights ([`TrainedWeights`]): What is trained in the merged model.
        maps (`Sequence[torch.nn.Module]`): The maps to the experts' features.
        rates (`Mapping[str, float]`): Peak learning rates for `"matrix"`, `"vector"` and `"output"`.
        total (`int`): How many updates are made.
    """

    def __init__(
        self,
        settings: FeatureTrainingConfig,
        weights: TrainedWeights,
        maps: Sequence[nn.Module],
        rates: Mapping[str, float],
        total: int,
    ):
        self._settings, self._weights, self._total = settings, weights, total
        trained = weights.groups() | {"output": [parameter for one in maps for parameter in one.parameters()]}
        self.optimizer = make_optimizer(settings, trained, rates)
        self._trained = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        self.average = MovingAverage(self._trained, settings.ema_decay)

    @property
    def learning_rate(self) -> float:
        """That of the last update, of the first kind of tensor."""
        return self.optimizer.param_groups[0]["lr"]

    def make(self, number: int, losses: Iterable[Tensor]) -> float:
        """One update from the sum of losses, each of which is computed, and its graph freed, before the next one is.

        Args:
            number (`int`): Of the update.
            losses (`Iterable[torch.Tensor]`): Its losses.

        Returns:
            `float`: Their sum.
        """
        factor = learning_rate_factor(self._settings, number, self._total)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * factor
        self.optimizer.zero_grad()
        self._weights.refresh()
        total = 0.0
        for loss in losses:
            loss.backward()
            total += float(loss.detach())
        self._weights.collect()
        if self._settings.max_grad_norm:
            nn.utils.clip_grad_norm_(self._trained, self._settings.max_grad_norm)
        self.optimizer.step()
        self.average.update()
        return total

    def keep_average(self) -> None:
        """Ends the training: what was averaged, if anything was, is what stays."""
        self.average.keep()
        self._weights.refresh()
