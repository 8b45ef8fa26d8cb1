"""Tensors that stay in their file until a part of them is used: what is computed piece by piece is read piece by piece, into memory that
is small enough to stay in the cache."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..errors import CheckpointError
from .memory import SMALLEST, empty_tensor


CAN_READ_PARTS = hasattr(os, "preadv")

STAGED = 1 << 18
"""Bytes of the buffer, one for each thread, that entries of another dtype go through: it is always in the cache."""

AHEAD = 1 << 22
"""How many bytes before it is their turn the system is told to fetch them from the disk."""

FETCHED = 1 << 20
"""How many it is told of at once."""


class StoredFile:
    """A file that tensors are read from, open from the first read on, closed when nothing refers to it. Reads have positions of their own,
    so that threads and forks share it.

    Args:
        path (`Path`): The file.
        check (`Callable`): Is given a descriptor of it, and raises [`CheckpointError`] unless its content is the one that was planned
            with.
    """

    def __init__(self, path: Path, check: Callable[[int], None]):
        self.path = path
        self._check = check
        self._opening = threading.Lock()
        self._descriptor: int | None = None

    def read(self, target: memoryview, start: int, what: str) -> None:
        """Fills memory from a place of the file on.

        Args:
            target (`memoryview`): Bytes.
            start (`int`): The place.
            what (`str`): What is read, for messages.

        Raises:
            CheckpointError: The file ends early, cannot be read, or was changed.
        """
        try:
            descriptor = self._open()
            done = 0
            while done < len(target):
                count = os.preadv(descriptor, [target[done : done + (1 << 30)]], start + done)
                if not count:
                    raise EOFError("the file ends early, it was truncated after the merge began")
                done += count
            self._check(descriptor)
            self._fetch(descriptor, start, start + len(target))
        except CheckpointError:
            raise
        except (OSError, EOFError) as error:
            raise CheckpointError(f"Cannot read '{what}' from '{self.path}': {error}.") from error

    def _open(self) -> int:
        if self._descriptor is None:
            with self._opening:
                if self._descriptor is None:
                    descriptor = os.open(self.path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
                    weakref.finalize(self, os.close, descriptor).atexit = False
                    self._check(descriptor)
                    self._descriptor = descriptor
        return self._descriptor

    @staticmethod
    def _fetch(descriptor: int, start: int, stop: int) -> None:
        """Lets the disk read what comes some time after a run of bytes while this process computes."""
        first, last = start // FETCHED, stop // FETCHED
        if last > first and hasattr(os, "posix_fadvise"):
            with suppress(OSError):  # some file systems take no advice
                os.posix_fadvise(descriptor, AHEAD + first * FETCHED, (last - first) * FETCHED, os.POSIX_FADV_WILLNEED)


class StoredTensor:
    """A tensor in a file, or a run of its entries. It has of a tensor what methods use of stored ones; each use reads.

    Args:
        file ([`StoredFile`]): The file.
        name (`str`): Its name there.
        start (`int`): Where its bytes begin.
        shape (`torch.Size`): Its shape.
        dtype (`torch.dtype`): Its dtype in the file.
    """

    device = torch.device("cpu")

    def __init__(self, file: StoredFile, name: str, start: int, shape: torch.Size, dtype: torch.dtype):
        self.shape = shape
        self.dtype = dtype
        self._file = file
        self._name = name
        self._start = start

    def numel(self) -> int:
        return self.shape.numel()

    def reshape(self, *shape: int) -> StoredTensor:
        """Its entries as one row: the only other shape."""
        if shape != (-1,):
            raise ValueError(f"A stored tensor can only be made flat, not {shape}.")
        return self._run(0, self.numel())

    def split(self, size: int) -> list[StoredTensor]:
        """Runs of so many entries of a flat one."""
        return [self[start : start + size] for start in range(0, max(self.numel(), 1), size)]

    def _run(self, start: int, stop: int) -> StoredTensor:
        place = self._start + start * self.dtype.itemsize
        return StoredTensor(self._file, self._name, place, torch.Size((stop - start,)), self.dtype)

    def __getitem__(self, part: slice | Tensor) -> StoredTensor | Tensor:
        """A run of entries of a flat one, still stored; or its entries at some places (int64, rising)."""
        if isinstance(part, Tensor):
            return self._at(part)
        start, stop, step = part.indices(self.numel())
        if step != 1 or len(self.shape) != 1:
            raise IndexError("Only runs of neighbouring entries of a flat stored tensor can be taken.")
        return self._run(start, max(start, stop))

    def _at(self, places: Tensor) -> Tensor:
        found = torch.empty(places.shape, dtype=self.dtype)
        if not len(places):
            return found
        for start, staged in self._staged():
            first, last = torch.searchsorted(places, torch.tensor([start, start + len(staged)])).tolist()
            torch.index_select(staged, 0, places[first:last] - start, out=found[first:last])
        return found

    def to(self, dtype: torch.dtype) -> Tensor:
        """All entries, in a new tensor."""
        nbytes = self.numel() * dtype.itemsize
        # Memory of pieces is in the cache when it was another piece's just now, which `malloc` sees to.
        values = (torch.empty if nbytes <= 4 * SMALLEST else empty_tensor)(self.shape, dtype=dtype)
        flat = values.view(-1)
        if dtype == self.dtype:
            self._file.read(memoryview(flat.view(torch.uint8).numpy()), self._start, self._name)
            return values
        for start, staged in self._staged():
            flat[start : start + len(staged)].copy_(staged)
        return values

    def _staged(self) -> Iterator[tuple[int, Tensor]]:
        """The entries, some at a time: how many come before, and memory that has them until the next ones are asked for."""
        (buffer, memory), size, itemsize = _staging(self.dtype), self.numel(), self.dtype.itemsize
        most = STAGED // itemsize
        for start in range(0, size, most):
            count = min(most, size - start)
            self._file.read(memory[: count * itemsize], self._start + start * itemsize, self._name)
            yield start, buffer[:count]


_local = threading.local()


def _staging(dtype: torch.dtype) -> tuple[Tensor, memoryview]:
    """The thread's buffer, as entries of a dtype and as bytes."""
    if not hasattr(_local, "views"):
        _local.buffer, _local.views = np.empty(STAGED, dtype=np.uint8), {}
    if dtype not in _local.views:
        _local.views[dtype] = torch.from_numpy(_local.buffer).view(dtype), memoryview(_local.buffer)
    return _local.views[dtype]
