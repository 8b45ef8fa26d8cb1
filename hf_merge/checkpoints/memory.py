"""Memory for tensors that come and go: what the system gives is cleared by it first, which takes as long as filling it from a file."""

from __future__ import annotations

import math
import os
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
        self._unlock()

    def _unlock(self) -> None:
        self._lock = threading.Lock()

    def take(self, nbytes: int) -> np.ndarray:
        """Uninitialised memory (uint8, flat), which comes back when nothing refers to the array."""
        with self._lock:
            place = next((place for place, memory in enumerate(self._free) if memory.nbytes == nbytes), None)
            memory = None if place is None else self._free.pop(place)
        if memory is None:
            memory = np.empty(nbytes, dtype=np.uint8)
        lent = memory[:]
        if nbytes <= KEPT:
            weakref.finalize(lent, self._give_back, memory).atexit = False
        return lent

    def _give_back(self, memory: np.ndarray) -> None:
        # Does not wait: the collector may call this in the middle of `take`. What is not kept goes back to the system.
        if not self._lock.acquire(blocking=False):
            return
        try:
            self._free.append(memory)
            while sum(one.nbytes for one in self._free) > KEPT:
                del self._free[0]
        finally:
            self._lock.release()


_pool = _Pool()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool._unlock)


def empty_tensor(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Uninitialised memory on the CPU. Where it is new it comes from numpy, which asks the system for huge pages: large tensors are filled
    twice as fast."""
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes == 0:
        return torch.empty(shape, dtype=dtype)
    memory = np.empty(nbytes, dtype=np.uint8) if nbytes < SMALLEST else _pool.take(nbytes)
    return torch.from_numpy(memory).view(dtype).view(shape)


def keep_freed_blocks() -> None:
    """Lets `malloc` keep what pieces leave for the next ones. glibc gives freed blocks back to the system from twice the size of the
    largest that it has seen freed on, and pieces are small: each would find memory that has to be cleared first."""
    torch.empty(KEPT // 2, dtype=torch.uint8)
