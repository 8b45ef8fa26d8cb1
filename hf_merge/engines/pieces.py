"""Sums and checks over tensors in pieces that stay in the cache."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..methods.groups import PIECE


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
