"""Any parameter as a matrix whose rows are what one output unit reads, for the methods that treat output units one by one."""

from __future__ import annotations

from torch import Tensor

from .base import ParameterKind


_TRANSPOSED = (ParameterKind.TRANSPOSED_LINEAR, ParameterKind.TRANSPOSED_EXPERT_LINEAR)
_STACKED = (ParameterKind.EXPERT_LINEAR, ParameterKind.TRANSPOSED_EXPERT_LINEAR)


def as_rows(values: Tensor, kind: ParameterKind) -> Tensor:
    """A matrix (units, entries): a linear layer's rows in any stored form, a convolution's whole filters; a vector is one row.

    It shares memory with `values` except for the stacked and transposed experts of a mixture.
    """
    if kind in _TRANSPOSED:
        values = values.mT
    if kind in _STACKED:
        return values.reshape(-1, values.shape[-1])
    return values.flatten(1) if values.dim() > 1 else values.reshape(1, -1)


def from_rows(rows: Tensor, like: Tensor, kind: ParameterKind) -> Tensor:
    """The inverse of [`as_rows`]: the rows as a tensor of the shape of `like`."""
    if kind in _TRANSPOSED:
        return rows.reshape(like.mT.shape).mT.contiguous()
    return rows.reshape(like.shape)
