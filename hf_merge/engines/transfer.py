"""Tensors on their way from the host to a device."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor


STAGED = 1 << 25
"""Bytes of each of the two page-locked buffers that tensors for a device go through."""

_WITH_STREAMS = ("cuda", "xpu")


def copies_ahead(device: torch.device) -> bool:
    """Whether a device takes the next tensors while it computes."""
    return device.type in _WITH_STREAMS


class Transfer:
    """Brings tensors to one device, and frees its memory.

    Args:
        device (`torch.device`): The device.
    """

    def __init__(self, device: torch.device):
        self.device = device

    def send(self, tensor: Tensor) -> Tensor:
        """The tensor on the device: itself where it is there already.

        Raises:
            torch.OutOfMemoryError: The device's memory is too small.
        """
        return tensor.to(self.device)

    def send_ahead(self, tensor: Tensor) -> Tensor:
        """[`~Transfer.send`] beside what the device computes, where [`copies_ahead`]. For one thread at a time; on return the
        values are there.

        Raises:
            torch.OutOfMemoryError: The device's memory is too small.
        """
        if tensor.device.type == "cpu" and tensor.is_contiguous():
            return self._staging.send(tensor.detach())
        return self.send(tensor)

    def empty_cache(self) -> None:
        """Gives memory that is not in use back to the device."""
        torch.get_device_module(self.device).empty_cache()

    @cached_property
    def _staging(self) -> _Staging:
        return _Staging(self.device)


class _Staging:
    """Copies on a stream of its own, through page-locked memory of a fixed size: the system's file cache and most tensors are
    pageable, and a device copies from there only while the host waits."""

    def __init__(self, device: torch.device):
        self.device = device
        self._backend = torch.get_device_module(device)
        self._stream = self._backend.Stream(device=device)
        self._buffers = [torch.empty(STAGED, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
        self._sent = [self._backend.Event() for _ in range(2)]

    def send(self, tensor: Tensor) -> Tensor:
        with self._backend.stream(self._stream):
            arrived = torch.empty(tensor.shape, dtype=tensor.dtype, device=self.device)
            copy_in_parts(_bytes(tensor), _bytes(arrived), self._buffers, self._sent)
        self._stream.synchronize()
        # Its memory belongs to this stream, which must not use it again before the stream that computes is done with it.
        arrived.record_stream(self._backend.current_stream(self.device))
        return arrived


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def copy_in_parts(source: Tensor, target: Tensor, buffers: Sequence[Tensor], sent: Sequence[Any]) -> None:
    """Copies bytes through buffers that take turns: one is filled while the other one's content is on its way.

    Args:
        source, target (`torch.Tensor`): uint8, (bytes,).
        buffers (`Sequence[torch.Tensor]`): uint8, all of one size.
        sent (`Sequence`): An event for each buffer, on the stream that copies: what was last in the buffer has arrived.
    """
    parts = zip(source.split(len(buffers[0])), target.split(len(buffers[0])), strict=True)
    for turn, (part, place) in enumerate(parts):
        buffer, event = buffers[turn % len(buffers)], sent[turn % len(buffers)]
        event.synchronize()
        staged = buffer[: len(part)].copy_(part)
        place.copy_(staged, non_blocking=True)
        event.record()
