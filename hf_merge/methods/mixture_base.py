"""The contract of the methods that make a mixture of experts out of dense models: [`MixtureMethod`].

The experts' MLPs become the experts of every layer as they are, and the other parameters are merged by a recipe without data. What
is left to the method is the router of each layer.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from .base import MergeMethod
from .groups import keyed_generator


@dataclass
class RouterGroup:
    """The router of one layer, and what is known about the inputs that it will read.

    Args:
        name (`str`): Its module name.
        shape (`tuple[int, int]`): (experts, hidden size).
        expert_names (`tuple[str]`): The experts' names.
        settings ([`MergeConfig`]): The recipe.
        states (`torch.Tensor`, *optional*): Of shape `shape`, float32: the mean input on the samples of each expert.
        negatives (`torch.Tensor`, *optional*): The same on its negative samples, zero for an expert that has none.
        seed (`int`): The recipe's seed.
        report (`dict`): What the method wants to say about this router: numbers by name.
    """

    name: str
    shape: tuple[int, int]
    expert_names: tuple[str, ...]
    settings: Any
    states: Tensor | None = None
    negatives: Tensor | None = None
    seed: int = 0
    report: dict[str, float] = field(default_factory=dict)

    def random(self, index: int) -> np.random.Generator:
        """A counter-based generator keyed by (seed, parameter name, expert name)."""
        return keyed_generator(self.seed, self.name, self.expert_names[index], "router")


class MixtureMethod(MergeMethod):
    """A method that decides which expert a token is sent to."""

    def router(self, group: RouterGroup) -> Tensor:
        """The router's weight, (experts, hidden size), float32: its product with a token's hidden state gives the logits."""
        raise NotImplementedError(f"{type(self).__name__} does not implement router")

    def remarks(self) -> list[str]:
        """What the method noticed over the whole merge and the user should know. Called once, at the end."""
        return []
