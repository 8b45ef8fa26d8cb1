"""The contract of the methods that keep every expert whole and combine what they say: [`OutputMethod`]."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .base import MergeMethod


class OutputMethod(MergeMethod):
    """A method that is defined on the experts' outputs for the same input. No weight is merged."""

    min_experts = 2

    @classmethod
    def needs_exclusive_classes(cls, settings: Any) -> bool:
        """Whether logits have to be those of classes that exclude each other, whose softmax is a distribution.

        Args:
            settings ([`MergeConfig`]): The recipe.
        """
        return False

    def combine(self, logits: Sequence[Tensor], settings: Any) -> Tensor:
        """The logits of all experts together.

        Args:
            logits (`Sequence[torch.Tensor]`): Of every expert for the same inputs, of one shape and on one device.
            settings ([`MergeConfig`]): The recipe.

        Returns:
            `torch.Tensor`: Of the shape and dtype of the first.
        """
        raise NotImplementedError(f"{type(self).__name__} does not implement combine")
