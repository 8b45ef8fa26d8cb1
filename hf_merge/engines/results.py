"""Where the merged entries of a parameter are put, piece by piece: memory, or their place in a file."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from ..methods.groups import PIECE


class PartSink(Protocol):
    """A sink that takes a tensor in parts, and gives back what it took."""

    def fill_part(self, key: str, entries: Tensor, start: int) -> None: ...

    def filled_part(self, key: str, start: int, count: int) -> Tensor: ...


class Result(Protocol):
    """The merged entries of one parameter, flat, in their output dtype."""

    dtype: torch.dtype

    def put(self, entries: Tensor, start: int) -> None:
        """Takes entries (flat, of any dtype) from a place on."""

    def get(self, start: int, count: int) -> Tensor:
        """The entries from a place on, on the CPU."""

    def parts(self) -> Iterator[Tensor]:
        """All entries, some at a time."""


class HeldResult:
    """In memory.

    Args:
        tensor (`torch.Tensor`): On the CPU, contiguous.
    """

    def __init__(self, tensor: Tensor):
        self.dtype = tensor.dtype
        self._flat = tensor.view(-1)

    def put(self, entries: Tensor, start: int) -> None:
        self._flat[start : start + entries.numel()].copy_(entries)

    def get(self, start: int, count: int) -> Tensor:
        return self._flat[start : start + count]

    def parts(self) -> Iterator[Tensor]:
        yield self._flat


class FiledResult:
    """In the file that is being written: nothing is held.

    Args:
        sink ([`PartSink`]): Has the file.
        key (`str`): The tensor's name there.
        size (`int`): The number of entries.
        dtype (`torch.dtype`): Its dtype there.
    """

    def __init__(self, sink: PartSink, key: str, size: int, dtype: torch.dtype):
        self.dtype = dtype
        self._sink = sink
        self._key = key
        self._size = size

    def put(self, entries: Tensor, start: int) -> None:
        self._sink.fill_part(self._key, entries.to(self.dtype), start)

    def get(self, start: int, count: int) -> Tensor:
        return self._sink.filled_part(self._key, start, count)

    def parts(self) -> Iterator[Tensor]:
        for start in range(0, self._size, PIECE):
            yield self.get(start, min(PIECE, self._size - start))
