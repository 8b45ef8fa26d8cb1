"""Memory for tensors that come and go: what the system gives is cleared by it first, which takes as long as filling it from a file."""

from __future__ import annotations

import math
import threading
import weakref

import numpy as np
import torch
from torch import Tensor


SMALLEST = 1 << 18
"""Bytes below which memory is not kept."""
KEPT = 1 << 25
"""How many bytes are kept at the most while no tensor uses them."""


class _Pool:
    """Gives memory that no tensor uses any more to the next tensor of the same size: the layers of a model are alike."""

    def __init__(self) -> None:
        self._free: list[np.ndarray] = []  # the one that came back last at the end
        self._lock = threading.RLock()  # the collector may give memory back in the middle of a call

    def take(self, nbytes: int) -> np.ndarray:
        """Uninitialised memory (uint8, flat), which comes back when nothing refers to the array."""
        with self._lock:
            place = next((place for place, memory in enumerate(self._free) if memory.nbytes == nbytes), None)
            memory = np.empty(nbytes, dtype=np.uint8) if place is None else self._free.pop(place)
        lent = memory[:]
        weakref.finalize(lent, self._give_back, memory).atexit = False
        return lent

    def _give_back(self, memory: np.ndarray) -> None:
        with self._lock:
            self._free.append(memory)
            while sum(one.nbytes for one in self._free) > KEPT:
                del self._free[0]


_pool = _Pool()


def empty_tensor(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Uninitialised memory on the CPU. Where it is new it comes from numpy, which asks the system for huge pages: large tensors are filled
    twice as fast."""
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes == 0:
        return torch.empty(shape, dtype=dtype)
    memory = np.empty(nbytes, dtype=np.uint8) if nbytes < SMALLEST else _pool.take(nbytes)
    return torch.from_numpy(memory).view(dtype).view(shape)
