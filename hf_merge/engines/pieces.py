"""Sums and checks over tensors in pieces that stay in the cache."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ..methods.groups import PIECE


@contextmanager
def one_thread() -> Iterator[None]:
    """Runs operations in the calling thread alone. One on a piece takes some microseconds: to divide it among threads gains little
    where they are idle, and costs a multiple where they have to be waited for."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def squared_norm(values: Tensor) -> float:
    """Σ x², summed in pieces: not finite where an entry is not, or its square too large for the dtype."""
    flat = values.reshape(-1)
    if values.device.type != "cpu":
        return float(torch.dot(flat, flat)) if flat.numel() else 0.0
    return math.fsum(float(torch.dot(part, part)) for part in flat.split(PIECE))


def all_finite(values: Tensor) -> bool:
    """Whether no entry is NaN or infinity. Reads what it can through the norm, which is many times as fast as looking at entries."""
    if not values.is_floating_point():
        return True
    return all(
        math.isfinite(squared_norm(part.float())) or bool(torch.isfinite(part).all())
        for part in values.reshape(-1).split(PIECE if values.device.type == "cpu" else 1 << 26)
    )
