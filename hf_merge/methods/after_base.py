"""The contracts of the methods that add something to a finished merge, and leave the merged weights as they are.

- [`FeatureMethod`]: corrects, for each task, the features that the merged backbone hands to its head.
- [`ExclusiveMethod`]: keeps what every expert has beyond the merge, and a router that says which of it an input needs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..low_rank import Factors
from .base import MergeMethod
from .block_base import BlockMonitor
from .groups import keyed_generator


@dataclass(kw_only=True)
class TrainingGroup:
    """What any training on rows of features is given.

    Args:
        settings ([`MergeConfig`]): The recipe, with `epochs`, `batch_size` and `learning_rate`.
        monitor ([`BlockMonitor`]): Is told about training.
        seed (`int`): Of the order of the rows and of random starts.
        report (`dict`): What the method wants to say.
    """

    settings: Any
    monitor: BlockMonitor = field(default_factory=BlockMonitor)
    seed: int = 0
    report: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """What is trained, for the monitor and the random numbers."""
        raise NotImplementedError(f"{type(self).__name__} does not implement name")

    def random(self, purpose: str) -> np.random.Generator:
        """A counter-based generator keyed by (seed, name, purpose)."""
        return keyed_generator(self.seed, self.name, purpose)

    def train(self, module: nn.Module, count: int, loss_of: Callable[[Tensor], Tensor]) -> list[float]:
        """Minimises a loss by Adam over batches of rows in random order. Returns the mean loss of every epoch.

        Args:
            module (`torch.nn.Module`): Its parameters are trained.
            count (`int`): The number of rows.
            loss_of (`Callable`): The loss of rows, given by their places (int64).
        """
        settings, monitor, parameters = self.settings, self.monitor, list(module.parameters())
        optimizer = torch.optim.Adam(parameters, lr=settings.learning_rate)
        order, steps = self.random("order"), math.ceil(count / settings.batch_size)
        monitor.begin_block(self.name, module, optimizer, settings.epochs, steps)
        losses: list[float] = []
        for _ in range(settings.epochs):
            monitor.begin_epoch()
            total, rows = 0.0, torch.from_numpy(order.permutation(count)).to(parameters[0].device)
            for batch in rows.split(settings.batch_size):
                monitor.begin_step()
                loss = loss_of(batch)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                value = float(loss.detach())
                total += value * len(batch)
                if monitor.end_step(value, settings.learning_rate):
                    break
            losses.append(total / count)
            if monitor.end_epoch(losses[-1]):
                break
        monitor.end_block()
        self.report["epochs"] = len(losses)
        return losses


@dataclass(kw_only=True)
class FeatureGroup(TrainingGroup):
    """The features of one task on its samples.

    Args:
        task (`str`): The expert's name.
        merged (`torch.Tensor`): What the merged backbone hands to the head, float32, (rows, channels): one row per sample, or per real
            token where the head reads tokens.
        expert (`torch.Tensor`): What the expert hands to it, of the same shape.
    """

    task: str
    merged: Tensor
    expert: Tensor

    @property
    def name(self) -> str:
        return self.task


class AfterMergeMethod(MergeMethod):
    """A method that adds to the result of the recipe that its config's `inner_config()` gives."""

    requires_data = True


class FeatureMethod(AfterMergeMethod):
    """A method that corrects features in front of a head."""

    def correct(self, group: FeatureGroup) -> Factors:
        """W_up (channels, rank) and W_down (rank, channels) of the correction Z − W_up ReLU(W_down Z)."""
        raise NotImplementedError(f"{type(self).__name__} does not implement correct")


# -- exclusive knowledge ----------------------------------------------------------------------------------------------


class TaskRouter(nn.Module):
    """Which task an input is of: softmax(W_2 ReLU(W_1 z + b_1) + b_2), with z the standardised features.

    Args:
        features (`int`): Channels of the features.
        width (`int`): Hidden units.
        tasks (`int`): How many tasks there are.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, features: int, width: int, tasks: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("scale", torch.ones(features))
        self.hidden = nn.Linear(features, width)
        self.output = nn.Linear(width, tasks)

    def logits(self, features: Tensor) -> Tensor:
        """(samples, tasks), from features (samples, channels)."""
        standardised = (features.to(self.mean) - self.mean) / self.scale
        return self.output(torch.relu(self.hidden(standardised)))

    def forward(self, features: Tensor) -> Tensor:
        """The weights w, (samples, tasks): rows sum to 1."""
        return self.logits(features).softmax(-1)


@dataclass(kw_only=True)
class RoutingGroup(TrainingGroup):
    """What a router is trained on.

    Args:
        features (`torch.Tensor`): The mean last hidden state of the merged backbone, float32, (samples, channels).
        tasks (`torch.Tensor`): Which task a sample is of, int64, (samples,).
        count (`int`): How many tasks there are.
    """

    features: Tensor
    tasks: Tensor
    count: int

    @property
    def name(self) -> str:
        return "router"


class ExclusiveMethod(AfterMergeMethod):
    """A method that keeps what every expert has beyond the merge."""

    def compress(self, part: Tensor, settings: Any) -> Factors:
        """An expert's weight minus the merged one, (rows, columns), at a small rank."""
        raise NotImplementedError(f"{type(self).__name__} does not implement compress")

    def router(self, group: RoutingGroup) -> TaskRouter:
        """A router, trained."""
        raise NotImplementedError(f"{type(self).__name__} does not implement router")
