"""The contract of the methods that need the whole model differentiable: [`ModelMethod`].

An engine holds the merged model in memory and gives a method one model per task: the merged backbone under the task's own
head. These models share their parameters, which are ordinary leaves of autograd: a method runs any of them, and finds the
gradient of its loss in the parameters of the merged model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from .base import MergeMethod, TensorGroup
from .block_base import BlockMonitor
from .groups import keyed_generator


@dataclass(frozen=True)
class ModelInputs:
    """One batch of one task.

    Args:
        task (`int`): The expert that the samples belong to.
        arguments (`dict[str, torch.Tensor]`): Of the model's forward, without labels.
        count (`int`): How many samples.
        mask (`torch.Tensor`, *optional*): Which tokens of the model's output are real, bool (samples, tokens); all of them when
            `None`.
        labels (`torch.Tensor`, *optional*): What the samples are labelled with; only for methods that require labels.
    """

    task: int
    arguments: dict[str, Tensor]
    count: int
    mask: Tensor | None = None
    labels: Tensor | None = None

    def masked(self, hidden: Tensor) -> Tensor:
        """The vectors of `hidden` (samples, ..., channels) that belong to real tokens, as (count, channels)."""
        if self.mask is None or self.mask.shape != hidden.shape[:-1]:
            return hidden.reshape(-1, hidden.shape[-1])
        return hidden[self.mask]


class TaskModels:
    """The models of all tasks and their samples, as an engine provides them.

    **Attributes**:
        - **batches** (`list[int]`) -- How many batches each task has.
    """

    batches: list[int]

    def student(self, task: int) -> nn.Module:
        """The merged backbone under the head of a task: float32, evaluation mode, its parameters shared with all others."""
        raise NotImplementedError

    def expert(self, task: int) -> AbstractContextManager[nn.Module]:
        """An expert as it is, float32, in memory as long as the context is open."""
        raise NotImplementedError

    def expert_parameter(self, task: int, name: str) -> str:
        """What a parameter of the merged model is called in an expert."""
        raise NotImplementedError

    def inputs(self, task: int, index: int) -> ModelInputs:
        """One batch."""
        raise NotImplementedError

    def samples(self, task: int) -> Iterator[ModelInputs]:
        """The samples of a task one by one."""
        raise NotImplementedError

    def run(self, model: nn.Module, arguments: Mapping[str, Any]) -> Any:
        """The output of a model, computed in the precision that was asked for."""
        raise NotImplementedError


@dataclass
class ModelGroup:
    """The merged model, what it is merged from, and the models of the tasks.

    Args:
        model (`torch.nn.Module`): The merged model, float32, with the values that the recipe's `init` gives. A method changes its
            parameters in place, by [`~ModelGroup.assign`] or an optimizer.
        parameters (`dict[str, TensorGroup]`): What the method merges, by module name. Experts are read when they are asked for.
        expert_names (`tuple[str]`): The experts' names.
        settings ([`MergeConfig`]): The recipe.
        models ([`TaskModels`]): Of the tasks.
        monitor ([`BlockMonitor`]): Is told about training.
        seed (`int`): Of the order of the batches.
        accumulation (`int`): How many batches of each task make one update.
        report (`dict`): What the method wants to say about the merge.
    """

    model: nn.Module
    parameters: Mapping[str, TensorGroup]
    expert_names: tuple[str, ...]
    settings: Any
    models: TaskModels
    monitor: BlockMonitor = field(default_factory=BlockMonitor)
    seed: int = 0
    accumulation: int = 1
    report: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.expert_names)

    def weights(self) -> dict[str, nn.Parameter]:
        """The parameters of the merged model that the method merges, by module name."""
        return {name: self.model.get_parameter(name) for name in self.parameters}

    @torch.no_grad()
    def assign(self, name: str, value: Tensor) -> None:
        """Gives a parameter of the merged model its value."""
        self.model.get_parameter(name).copy_(value)

    def random(self, purpose: str) -> np.random.Generator:
        """A counter-based generator keyed by (seed, purpose)."""
        return keyed_generator(self.seed, purpose)


class ModelMethod(MergeMethod):
    """A method that needs the whole model differentiable.

    What it does not merge (heads of tasks, parameters that a rule gives to another method) is merged without data. One instance
    serves the whole merge.
    """

    requires_data = True
    requires_labels: ClassVar[bool] = False
    """Whether the samples need labels."""

    # -- what a merge takes ---------------------------------------------------------------------------------------

    keeps_targets: ClassVar[bool] = False
    """Whether the experts' hidden states of all samples are kept."""

    @classmethod
    def working_memory(cls, sizes: Sequence[int], experts: int, settings: Any) -> int | None:
        """Bytes that the method holds beside the merged model, the base model's values and what autograd keeps of a forward; `None`
        where that is not known.

        Args:
            sizes (`Sequence[int]`): The entries of each parameter that the method merges.
            experts (`int`): The number of experts.
            settings ([`MergeConfig`]): The recipe.
        """
        return None

    @classmethod
    def batch_size(cls, settings: Any) -> int:
        """How many samples run together."""
        return settings.batch_size

    @classmethod
    def reads_logits(cls, settings: Any) -> bool:
        """Whether the method looks at predictions, not at hidden states."""
        return True

    # -- the merge ------------------------------------------------------------------------------------------------

    def merge(self, group: ModelGroup) -> None:
        """Merges the model, in place."""
        raise NotImplementedError(f"{type(self).__name__} does not implement merge")
