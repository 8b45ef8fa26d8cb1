"""What is remembered of a training beside its last state: a moving average of the trained tensors, and the best state."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor


class MovingAverage:
    """The exponential moving average of trained tensors. Over the first updates, which it would otherwise remember too long, it
    moves faster: its decay is min(decay, (1 + t) / (10 + t)) at update t.

    Args:
        trained (`Sequence[torch.Tensor]`): The tensors.
        decay (`float`): 0: the average is the tensors themselves.
    """

    def __init__(self, trained: Sequence[Tensor], decay: float):
        self._trained, self._decay, self._updates = list(trained), decay, 0
        self.values = [tensor.detach().clone() for tensor in trained] if decay else self._trained
        """The averages."""

    @torch.no_grad()
    def update(self) -> None:
        """Moves the averages towards the tensors, once per update."""
        if not self._decay:
            return
        self._updates += 1
        decay = min(self._decay, (1 + self._updates) / (10 + self._updates))
        torch._foreach_lerp_(self.values, [tensor.detach() for tensor in self._trained], 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The tensors have the averages for a while."""
        if not self._decay:
            yield
            return
        own = [tensor.detach().clone() for tensor in self._trained]
        _copy(self.values, self._trained)
        try:
            yield
        finally:
            _copy(own, self._trained)

    def keep(self) -> None:
        """The tensors have the averages from now on."""
        if self._decay:
            _copy(self.values, self._trained)


class Best:
    """Watches the held-out loss and keeps the best state.

    Args:
        patience (`int`, *optional*): How many times in a row the loss may fail to improve.
    """

    def __init__(self, patience: int | None):
        self.patience = patience
        self.loss = math.inf
        self._waited = 0
        self._state: list[Tensor] | None = None

    def is_over(self, loss: float, trained: Sequence[Tensor]) -> bool:
        """Looks at a loss and the tensors that gave it. Returns whether patience has run out."""
        if loss < self.loss:
            self.loss, self._waited = loss, 0
            self._state = [tensor.detach().clone() for tensor in trained]
        else:
            self._waited += 1
        return self.patience is not None and self._waited >= self.patience

    def restore(self, trained: Sequence[Tensor]) -> None:
        """Gives tensors the best state, if there is one."""
        if self._state is not None:
            _copy(self._state, trained)

    def report(self) -> dict[str, float]:
        """The best loss."""
        return {} if self._state is None else {"held_out_loss": self.loss}


@torch.no_grad()
def _copy(values: Sequence[Tensor], to: Sequence[Tensor]) -> None:
    for value, tensor in zip(values, to, strict=True):
        tensor.copy_(value)
