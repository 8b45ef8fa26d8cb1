"""Sums and checks over tensors in pieces that stay in the cache."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ..methods.groups import PIECE


_lock, _inside, _threads = threading.Lock(), 0, 1


def _begin_anew() -> None:
    """In a fork, which has none of the other threads."""
    global _lock, _inside
    _lock, _inside = threading.Lock(), 0


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_begin_anew)


@contextmanager
def one_thread() -> Iterator[None]:
    """Runs operations in the calling thread alone. One on a piece takes some microseconds: to divide it among threads gains little
    where they are idle, and costs a multiple where they have to be waited for.

    Several threads may be inside at once: the number that the first one found is the one that comes back.
    """
    global _inside, _threads
    with _lock:
        if _inside == 0:
            _threads = torch.get_num_threads()
        _inside += 1
        torch.set_num_threads(1)
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            torch.set_num_threads(_threads)  # by every thread, as a part of the setting is its own


def squared_norm(values: Tensor) -> float:
    """Σ x², summed in pieces: not finite where an entry is not, or its square too large for the dtype."""
    flat, piece = values.reshape(-1), _piece_of(values)
    if len(flat) <= piece:
        return float(torch.dot(flat, flat))
    return math.fsum(float(torch.dot(part, part)) for part in flat.split(piece))


def all_finite(values: Tensor) -> bool:
    """Whether no entry is NaN or infinity. Reads what it can through the norm, which is many times as fast as looking at entries."""
    if not values.is_floating_point():
        return True
    return all(
        math.isfinite(squared_norm(part.float()))
        or bool(torch.isfinite(part.float() if part.dtype.itemsize == 1 else part).all())
        for part in values.reshape(-1).split(_piece_of(values))
    )


def _piece_of(values: Tensor) -> int:
    return PIECE if values.device.type == "cpu" else 1 << 26
