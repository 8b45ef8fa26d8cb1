"""Any parameter as a matrix whose rows are what one output unit reads, for the methods that treat output units one by one."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .base import ParameterKind
from .groups import PIECE


_TRANSPOSED = (ParameterKind.TRANSPOSED_LINEAR, ParameterKind.TRANSPOSED_EXPERT_LINEAR)
_STACKED = (ParameterKind.EXPERT_LINEAR, ParameterKind.TRANSPOSED_EXPERT_LINEAR)


def is_transposed(kind: ParameterKind) -> bool:
    """Whether what one output unit reads is a column of what is stored."""
    return kind in _TRANSPOSED


def row_unit(shape: torch.Size, kind: ParameterKind) -> int | None:
    """In what pieces a method that works row by row gets a parameter, see [`TensorGroup.pieces`]."""
    return None if is_transposed(kind) else row_length(shape, kind)


def row_length(shape: torch.Size, kind: ParameterKind) -> int:
    """The length of the rows that [`as_rows`] makes, at least 1."""
    if is_transposed(kind):
        return max(shape[-2], 1)
    if kind in _STACKED:
        return max(shape[-1], 1)
    return max(shape[1:].numel() if len(shape) > 1 else shape.numel(), 1)


def entries_of_rows(kind: ParameterKind, shape: Sequence[int]) -> int:
    """How large a piece of whole rows is at most."""
    size = math.prod(shape)
    return size if is_transposed(kind) else min(size, max(PIECE, row_length(torch.Size(shape), kind)))


def as_rows(values: Tensor, kind: ParameterKind) -> Tensor:
    """A matrix (units, entries): a linear layer's rows in any stored form, a convolution's whole filters; a vector is one row.

    It shares memory with `values` except for the stacked and transposed experts of a mixture.
    """
    if kind in _TRANSPOSED:
        values = values.mT
    if kind in _STACKED:
        return values.reshape(-1, values.shape[-1])
    return values.flatten(1) if values.dim() > 1 else values.reshape(1, -1)


def piece_rows(values: Tensor, kind: ParameterKind, length: int) -> Tensor:
    """The rows in a piece of a parameter: flat entries of whole rows, or the parameter itself where rows are not stored together."""
    return as_rows(values, kind).contiguous() if is_transposed(kind) else values.view(-1, length)


def from_piece_rows(rows: Tensor, like: Tensor, kind: ParameterKind) -> Tensor:
    """The inverse of [`piece_rows`]."""
    return from_rows(rows, like, kind) if is_transposed(kind) else rows.view(like.shape)


def from_rows(rows: Tensor, like: Tensor, kind: ParameterKind) -> Tensor:
    """The inverse of [`as_rows`]: the rows as a tensor of the shape of `like`."""
    if kind in _TRANSPOSED:
        return rows.reshape(like.mT.shape).mT.contiguous()
    return rows.reshape(like.shape)
