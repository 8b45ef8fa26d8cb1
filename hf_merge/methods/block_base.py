"""The contract of the methods that look at activations: [`BlockMethod`], which merges one block after another.

An engine runs the models and gives a method one block of each at a time, with what reaches it: the method never sees a
device map, a cache or a file.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from .base import FLOAT32, MergeMethod, TensorGroup
from .groups import keyed_generator


K = TypeVar("K")
T = TypeVar("T")


class BlockMonitor:
    """Is told how the training of a block proceeds. This one does nothing; an engine hands in one that logs."""

    def begin(self, blocks: int) -> None:
        """A merge begins, in which so many blocks are trained."""

    def end(self) -> None:
        """The merge has ended."""

    def begin_block(
        self, name: str, module: nn.Module, optimizer: torch.optim.Optimizer, epochs: int, steps: int
    ) -> None:
        """Training of a block begins: at most `epochs` passes of `steps` steps."""

    def begin_epoch(self) -> None:
        """A pass over the samples begins."""

    def begin_step(self) -> None:
        """The gradients of an update are about to be computed."""

    def end_step(self, loss: float, learning_rate: float) -> bool:
        """An update was made. Returns whether this pass should end now."""
        return False

    def end_epoch(self, loss: float) -> bool:
        """A pass ended with the given mean loss. Returns whether training of this block should end now."""
        return False

    def end_block(self) -> None:
        """Training of a block has ended: its optimizer is not needed any more."""


@dataclass(frozen=True)
class BlockInputs:
    """One batch of one task at the entrance of a block.

    Args:
        task (`int`): The expert that the samples belong to.
        index (`int`): The number of the batch within its task.
        args (`tuple`), kwargs (`dict`): What the model's forward hands to the block.
        mask (`torch.Tensor`, *optional*): Which tokens count, bool (batch, tokens); all of them when `None`.
    """

    task: int
    index: int
    args: tuple
    kwargs: dict[str, Any]
    mask: Tensor | None = None

    def masked(self, hidden: Tensor) -> Tensor:
        """The vectors of `hidden` (..., channels) that belong to tokens that count, as (count, channels)."""
        rows = hidden.reshape(-1, hidden.shape[-1])
        if self.mask is None or self.mask.numel() != rows.shape[0]:
            return rows
        return rows[self.mask.flatten()]


class BlockActivations:
    """The activations of the calibration samples at one block, as an engine provides them.

    Where several processes divide the samples among them, each holds some rows of every batch: a loss, a gradient or a Gram matrix
    is that of the batch when [`~BlockActivations.all_reduce`] has summed the parts. All processes make the same calls of it and of
    [`~BlockActivations.gather`] in the same order.

    **Attributes**:
        - **batches** (`list[int]`) -- How many batches each task has at this block, over all processes.
    """

    batches: list[int]

    def held(self, task: int) -> Sequence[int]:
        """The batches of a task that this process has samples of, in order."""
        return range(self.batches[task])

    def all_reduce(self, tensors: Mapping[K, Tensor]) -> dict[K, Tensor]:
        """Sums over the processes, the same bits on all of them. A key that a process does not have counts as zero there.

        Args:
            tensors (`Mapping[K, torch.Tensor]`): Of equal shapes and dtypes on all processes. They may be overwritten.
        """
        return dict(tensors)

    def gather(self, value: T) -> list[T]:
        """The values of all processes, in their order; what can be pickled."""
        return [value]

    def student(self, task: int, index: int) -> BlockInputs:
        """What the merged model's own prefix hands to the block."""
        raise NotImplementedError

    def teacher(self, task: int, index: int) -> BlockInputs:
        """What the expert's own prefix hands to its block."""
        raise NotImplementedError

    def run_teacher(self, task: int, index: int) -> None:
        """Runs the expert's block on its own inputs, once; what hooks see, is seen now. The output is kept."""
        raise NotImplementedError

    def target(self, task: int, index: int) -> Tensor:
        """The main output of the expert's block on its own inputs, float32."""
        raise NotImplementedError

    def run(self, module: nn.Module, inputs: BlockInputs) -> Tensor:
        """The main output of a block, float32, computed in the precision that was asked for."""
        raise NotImplementedError


@dataclass
class BlockGroup:
    """One block of every model that takes part, and the activations that reach it.

    Args:
        name (`str`): The module name of the block.
        student (`torch.nn.Module`): The merged model's block: float32, evaluation mode, with the values that the recipe's
            `init` gives. A method changes its parameters in place, by [`~BlockGroup.assign`].
        experts (`Sequence[torch.nn.Module]`): The experts' blocks, float32; not to be changed.
        parameters (`dict[str, TensorGroup]`): What the method merges, by name within the block.
        expert_names (`tuple[str]`): The experts' names.
        settings ([`MergeConfig`]): The recipe.
        depth (`float`): 0 at the input, 1 at the output of the model.
        activations ([`BlockActivations`]): Of the calibration samples.
        monitor ([`BlockMonitor`]): Is told about training.
        seed (`int`): Of the order of the batches.
        accumulation (`int`): How many batches of each task make one update.
        report (`dict`): What the method wants to say about this block.
        on_release (`Callable`, *optional*): Frees the weights of the experts' blocks.
    """

    name: str
    student: nn.Module
    experts: Sequence[nn.Module]
    parameters: Mapping[str, TensorGroup]
    expert_names: tuple[str, ...]
    settings: Any
    activations: BlockActivations
    depth: float = 0.0
    monitor: BlockMonitor = field(default_factory=BlockMonitor)
    seed: int = 0
    accumulation: int = 1
    report: dict[str, Any] = field(default_factory=dict)
    on_release: Callable[[], None] | None = None

    def __len__(self) -> int:
        return len(self.expert_names)

    def release_experts(self) -> None:
        """Says that the experts' weights are not looked at any more and that their blocks have run on all batches."""
        for group in self.parameters.values():
            group.release_experts()
        if self.on_release is not None:
            self.on_release()

    def under(self, settings: Any) -> BlockGroup:
        """The same block under another recipe."""
        parameters = {
            name: replace(group, settings=settings.resolve(group.name, self.depth, self.expert_names))
            for name, group in self.parameters.items()
        }
        return replace(self, settings=settings, parameters=parameters)

    @torch.no_grad()
    def assign(self, name: str, value: Tensor) -> None:
        """Gives a parameter of the student its merged value."""
        self.student.get_parameter(name).copy_(value)

    def student_inputs(self, task: int) -> Iterator[BlockInputs]:
        """The batches of a task as the merged model sees them, as far as they are held here."""
        for index in self.activations.held(task):
            yield self.activations.student(task, index)

    def run_teacher(self, task: int) -> None:
        """Runs the expert's block on its batches that are held here, once; what hooks see, is seen now."""
        for index in self.activations.held(task):
            self.activations.run_teacher(task, index)

    def random(self, purpose: str) -> np.random.Generator:
        """A counter-based generator keyed by (seed, block name, purpose)."""
        return keyed_generator(self.seed, self.name, purpose)


class BlockMethod(MergeMethod):
    """A method that looks at activations: it merges one block after another.

    What it does not merge (parameters outside of blocks, blocks that no sample reaches) is merged without data, as the
    recipe's `init` says. One instance serves the whole merge.
    """

    requires_data = True
    reads_student: ClassVar[bool] = True
    """Whether the method needs what the merged model's own prefix hands to a block."""
    reads_teachers: ClassVar[bool] = True
    """Whether the method needs what the experts' own prefixes hand to their blocks."""

    @classmethod
    def working_memory(cls, shapes: Mapping[str, Sequence[int]], experts: int, settings: Any) -> int:
        """Bytes that are held while one block is merged, beside the merged model's block and activations: the experts' blocks, and
        what the method makes of them.

        Args:
            shapes (`Mapping[str, Sequence[int]]`): Of the parameters of the block that the method merges.
            experts (`int`): The number of experts.
            settings ([`MergeConfig`]): The recipe.
        """
        return FLOAT32 * (experts + 1) * sum(map(math.prod, shapes.values()))

    @classmethod
    def divides_samples(cls, settings: Any) -> bool:
        """Whether several processes may merge together, each with a part of the samples: `merge_block` sums over them, by
        [`~BlockActivations.all_reduce`], whatever depends on samples. Otherwise one process merges.

        Args:
            settings ([`MergeConfig`]): The recipe.
        """
        return False

    def skip_blocks(self, settings: Any, norms: Callable[[], Mapping[str, float]]) -> set[str]:
        """Blocks that keep the values of `init`.

        Args:
            settings ([`MergeConfig`]): The recipe.
            norms (`Callable`): Gives the root of Σ_i ‖τ_i‖² of each block; reads all weights.
        """
        return set()

    def merge_block(self, block: BlockGroup) -> None:
        """Merges one block, in place."""
        raise NotImplementedError(f"{type(self).__name__} does not implement merge_block")
