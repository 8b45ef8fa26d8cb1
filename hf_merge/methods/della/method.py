"""DELLA-Merging: drop by magnitude rank (MAGPRUNE), elect, fuse (arXiv 2406.11617)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..base import TensorGroup
from ..election import masked
from ..rows import from_piece_rows, piece_rows, row_length, row_unit
from ..sparsify import SparseMethod, Sparsity


class Della(SparseMethod):
    """m ~ Bernoulli(1 − p_j), τ̂ = m ⊙ τ / (1 − p_j), where p_j falls linearly with the rank of |τ_j| in its row.

    A row is what one output unit reads, a convolution's whole filter; a vector is one row.
    """

    def unit(self, group: TensorGroup) -> int | None:
        return row_unit(group.shape, group.kind)

    def mark(self, group: TensorGroup, index: int) -> int:
        """The length of a row."""
        return row_length(group.shape, group.kind)

    def foresee(self, piece: TensorGroup, prepared: Sparsity) -> list[tuple[Tensor, np.ndarray]] | None:
        """The order of every row, and random numbers."""
        if piece.offset in prepared.vectors or piece.shape.numel() == 0:
            return None
        return [self._order_and_draws(piece, index, width) for index, width in enumerate(prepared.marks)]

    @staticmethod
    def _order_and_draws(piece: TensorGroup, index: int, width: int) -> tuple[Tensor, np.ndarray]:
        rows = piece_rows(piece.task_vector(index), piece.kind, width)
        return rising_order(rows), piece.draws(index)

    def sparsify(self, piece: TensorGroup, index: int, mark: int) -> Tensor:
        density, vector = piece.settings.density[index], piece.task_vector(index)
        if density in (0.0, 1.0) or vector.numel() == 0:
            return vector.mul_(density)
        rows = piece_rows(vector, piece.kind, mark)
        foreseen = self._order_and_draws(piece, index, mark) if piece.foreseen is None else piece.foreseen[index]
        order, draws = foreseen
        keep = keep_probabilities(mark, density, piece.settings.epsilon[index]).to(order.device)
        # Numbers of 32 bits, compared as signed ones.
        bounds = keep.mul(2**32).round_().clamp_(max=2**32 - 1).sub_(2**31).to(torch.int32)
        shifted = torch.from_numpy(draws.view(np.int32) ^ np.int32(-(2**31))).to(order.device).view(rows.shape)
        masked(rows, shifted < _in_order(bounds, order))
        if piece.settings.rescale == "probability":
            factors = keep.reciprocal().masked_fill_(keep == 0, 0.0)  # those are never kept
            rows.mul_(_in_order(factors.to(rows.dtype), order))
        return from_piece_rows(rows, vector, piece.kind)


def rising_order(rows: Tensor) -> Tensor:
    """The places of each row's entries in the order of their magnitude, equal ones in the order of their places: int64."""
    if rows.device.type != "cpu" or rows.dtype != torch.float32:
        return rows.abs().argsort(dim=1, stable=True)
    # Magnitudes as integers with the place below them: one sort of integers, ten times as fast as a stable sort of floats.
    keys = (rows.view(torch.int32) & 0x7FFFFFFF).numpy().astype(np.uint64)
    keys <<= np.uint64(32)
    keys |= np.arange(rows.shape[1], dtype=np.uint64)
    keys.sort(axis=1)
    keys &= np.uint64(0xFFFFFFFF)
    return torch.from_numpy(keys.view(np.int64))


def keep_probabilities(width: int, density: float, epsilon: float) -> Tensor:
    """1 − p for every rank of a row: from density − ε/2 for the smallest magnitude to density + ε/2 for the largest.

    Args:
        width (`int`): The length of the row. A row of one entry is kept with the density itself.
        density (`float`): The mean, in (0, 1).
        epsilon (`float`): The width ε of the range; less where it would leave [0, 1].

    Returns:
        `torch.Tensor`: float64, (width,).
    """
    half = min(epsilon / 2, density, 1 - density) if width > 1 else 0.0
    return torch.linspace(density - half, density + half, width, dtype=torch.float64)


def _in_order(by_rank: Tensor, order: Tensor) -> Tensor:
    """Values given by rank, at the places that have these ranks in each row."""
    return torch.empty(order.shape, dtype=by_rank.dtype, device=order.device).scatter_(
        1, order, by_rank.expand(order.shape)
    )
