"""The contract of methods that merge backbones without a shared base one block after another: what an engine gives them, so that
only one block of the merged model and of each expert is in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .backbone_base import OutputMap, Topology
from .block_base import BlockMonitor
from .groups import keyed_generator


@dataclass
class FixedBatches:
    """What reaches a part of the merged model, and what the experts make of the same samples. Batches never change.

    Args:
        counts (`list[int]`): How many batches each task has.
        predict (`Callable[[int, int], torch.Tensor]`): `(task, batch)` -> the merged model's vectors of real tokens, (count,
            channels), float32 and differentiable in what is trained.
        target (`Callable[[int, int], torch.Tensor]`): `(task, batch)` -> the expert's, in its own channels.
    """

    counts: list[int]
    predict: Callable[[int, int], Tensor]
    target: Callable[[int, int], Tensor]

    def pairs(self, task: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The merged model's and the expert's vectors, batch by batch."""
        for index in range(self.counts[task]):
            yield self.predict(task, index), self.target(task, index)


@dataclass
class BackbonePart:
    """A part of the merged backbone that is trained by itself: a block, or what comes after the last block.

    Args:
        name (`str`): What callbacks and the report call it.
        student (`torch.nn.Module`): The merged part: a method gives its parameters their values in place.
        batches ([`FixedBatches`]): What it reads and should give.
        maps (`list[OutputMap | None]`): From the merged part's outputs to the outputs of each expert's; `None` where the two are
            compared as they are.
        settings ([`MergeConfig`]): The recipe.
        monitor ([`BlockMonitor`]): Is told about training.
        seed (`int`): Of all randomness.
        accumulation (`int`): How many batches of each task make one update.
        report (`dict`): What the method wants to say.
    """

    name: str
    student: nn.Module
    batches: FixedBatches
    maps: list[OutputMap | None]
    settings: Any
    monitor: BlockMonitor = field(default_factory=BlockMonitor)
    seed: int = 0
    accumulation: int = 1
    report: dict[str, Any] = field(default_factory=dict)

    @torch.no_grad()
    def assign(self, values: Mapping[str, Tensor]) -> None:
        """Gives parameters of the merged part their values."""
        for name, value in values.items():
            self.student.get_parameter(name).copy_(value)

    def random(self, *words: str) -> np.random.Generator:
        """A counter-based generator keyed by the seed, the part's name and the words."""
        return keyed_generator(self.seed, self.name, *words)


@dataclass
class BackboneBlock(BackbonePart):
    """One block of the merged backbone and of each expert.

    Args:
        topology ([`Topology`]): Of the block; names are within it.
        experts (`Sequence[dict]`): The parameters of the experts' blocks, float32, by name within the block.
        head_sizes (`dict[str, int]`): See [`BackboneGroup.head_sizes`].
    """

    topology: Topology = field(default_factory=Topology)
    experts: Sequence[Mapping[str, Tensor]] = ()
    head_sizes: dict[str, int] = field(default_factory=dict)
