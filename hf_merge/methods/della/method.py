"""DELLA-Merging: drop by magnitude rank (MAGPRUNE), elect, fuse (arXiv 2406.11617)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..base import ParameterKind, TensorGroup
from ..election import masked
from ..rows import entries_of_rows, from_piece_rows, piece_rows, row_length, row_unit
from ..sparsify import SparseMethod, Sparsity


class Kept(NamedTuple):
    """What is kept of the rows of a piece.

    Args:
        mask (`torch.Tensor`): bool, (rows, entries).
        factors (`torch.Tensor`, *optional*): What the entries are multiplied with.
    """

    mask: Tensor
    factors: Tensor | None


class Della(SparseMethod):
    """m ~ Bernoulli(1 − p_j), τ̂ = m ⊙ τ / (1 − p_j), where p_j falls linearly with the rank of |τ_j| in its row.

    A row is what one output unit reads, a convolution's whole filter; a vector is one row.
    """

    @classmethod
    def looks_again(cls, settings: Any) -> bool:
        return True

    @classmethod
    def entries_at_once(cls, kind: ParameterKind, shape: Sequence[int], settings: Any) -> int:
        return entries_of_rows(kind, shape)

    def unit(self, group: TensorGroup) -> int | None:
        return row_unit(group.shape, group.kind)

    def mark(self, group: TensorGroup, index: int) -> int:
        """The length of a row."""
        return row_length(group.shape, group.kind)

    def foresee(self, piece: TensorGroup, prepared: Sparsity) -> list[Kept | None] | None:
        """What is kept of every task vector."""
        if piece.offset in prepared.kept:
            return None
        return [
            self._kept(piece_rows(vector, piece.kind, width), piece, index)
            for index, (width, vector) in enumerate(zip(prepared.marks, piece.task_vectors(), strict=True))
        ]

    def sparsify(self, vector: Tensor, piece: TensorGroup, index: int, mark: int) -> Tensor:
        rows = piece_rows(vector, piece.kind, mark)
        kept = self._kept(rows, piece, index) if piece.foreseen is None else piece.foreseen[index]
        if kept is None:
            return vector.mul_(piece.settings.density[index])
        masked(rows, kept.mask)
        if kept.factors is not None:
            rows.mul_(kept.factors)
        return from_piece_rows(rows, vector, piece.kind)

    @staticmethod
    def _kept(rows: Tensor, piece: TensorGroup, index: int) -> Kept | None:
        """What is kept of the rows of expert `index`; `None` where that is everything or nothing."""
        settings = piece.settings
        density = settings.density[index]
        if density in (0.0, 1.0) or rows.numel() == 0:
            return None
        keep = keep_probabilities(rows.shape[1], density, settings.epsilon[index])
        mask = keep_larger(rows, piece, index, float(keep[0]), float(keep[-1]))
        if settings.rescale != "probability":
            return Kept(mask, None)
        factors = keep.reciprocal().masked_fill_(keep == 0, 0.0)  # those are never kept
        return Kept(mask, _in_order(factors.to(rows.device, rows.dtype), rising_order(rows)))


def keep_larger(rows: Tensor, piece: TensorGroup, index: int, least: float, most: float) -> Tensor:
    """A Bernoulli mask in which the probability of an entry rises linearly with the rank of its magnitude in its row.

    No rank has to be known for that: with the probability `least` an entry is kept anyway, and with the probability `most` − `least` it
    is kept if it is larger than another entry of its row, drawn at random: of n − 1 others as many are smaller as its rank says.

    Args:
        rows (`torch.Tensor`): (rows, entries), contiguous. Equal magnitudes are ranked in the order of their places.
        piece ([`TensorGroup`]): The piece that they are the rows of.
        index (`int`): The expert that the mask is for.
        least, most (`float`): The probabilities of the smallest and of the largest entry.

    Returns:
        `torch.Tensor`: bool, of the shape of `rows`.
    """
    low, high = (min(round(probability * 2**32), 2**32 - 1) for probability in (least, most))
    width = rows.shape[1]
    draws = piece.draws(index)
    first, last = np.uint8(low >> 24), np.uint8(high >> 24)
    kept = draws < first
    places = np.flatnonzero(draws - first <= last - first)  # what is below wraps around
    bits = piece.more_bits(index, places)
    drawn = draws.take(places).astype(np.uint32) << np.uint32(24) | (bits >> np.uint64(40)).astype(np.uint32)
    is_kept = drawn < np.uint32(low)
    if width > 1:
        steps = ((bits & np.uint64(0xFFFFFFFF)) * np.uint64(width - 1) >> np.uint64(32)).view(np.int64)
        steps -= places - places // width * width  # from the entry's column to the other's
        steps += steps >= 0
        is_kept |= (drawn < np.uint32(high)) & _is_larger(rows, places, steps)
    kept[places] = is_kept
    return torch.from_numpy(kept).view(rows.shape).to(rows.device)


def _is_larger(rows: Tensor, places: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """Whether entries of a matrix (flat places, int64) are larger by magnitude than those so many places off; the later of equals is."""
    flat = rows.view(-1)
    if rows.device.type == "cpu":
        own, other = (np.abs(flat.numpy().take(at)) for at in (places, places + steps))
    else:
        found = (flat[torch.from_numpy(at).to(rows.device)] for at in (places, places + steps))
        own, other = (values.abs_().cpu().numpy() for values in found)
    return (own > other) | (own == other) & (steps < 0)


def rising_order(rows: Tensor) -> Tensor:
    """The places of each row's entries in the order of their magnitude, equal ones in the order of their places: int64."""
    if rows.device.type != "cpu" or rows.dtype != torch.float32:
        return rows.abs().argsort(dim=1, stable=True)
    # Magnitudes as integers with the place below them: one sort of integers, ten times as fast as a stable sort of floats.
    bits = (rows.view(torch.int32) & 0x7FFFFFFF).numpy().view(np.uint32)
    places = np.arange(rows.shape[1], dtype=np.uint32)
    short, is_exact = _short_keys(bits, len(places))
    if 2 * np.count_nonzero(is_exact) < len(bits):
        return torch.from_numpy(_long_order(bits, places))
    short |= places
    short.sort(axis=1)
    short &= np.uint32((1 << (len(places) - 1).bit_length()) - 1)
    order = short.astype(np.int64)
    if not is_exact.all():
        order[~is_exact] = _long_order(bits[~is_exact], places)
    return torch.from_numpy(order)


def _short_keys(bits: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Integers of 32 bits in the order of the given ones, with room for a place below; and the rows in which the bits that had to be
    left off were 0. That is most of them in differences of models in 16 bits: their last bits are 0, and their exponents are near
    each other."""
    free = (width - 1).bit_length()
    least = int((bits - np.uint32(1)).min()) + 1  # but 0, which wraps around
    most, left_off = int(bits.max()), 0
    while ((most >> left_off) - max(0, (least >> left_off) - 1)).bit_length() + free > 32:
        left_off += 1
    below = max(0, (least >> left_off) - 1) << left_off  # 0 stays 0, and the least one becomes 1
    keys = np.maximum(bits, np.uint32(below))
    keys -= np.uint32(below)
    keys >>= np.uint32(left_off)
    keys <<= np.uint32(free)
    is_exact = (np.bitwise_or.reduce(bits, axis=1) & np.uint32((1 << left_off) - 1)) == 0
    return keys, is_exact


def _long_order(bits: np.ndarray, places: np.ndarray) -> np.ndarray:
    keys = bits.astype(np.uint64) << np.uint64(32)
    keys |= places
    keys.sort(axis=1)
    keys &= np.uint64(0xFFFFFFFF)
    return keys.view(np.int64)


@lru_cache(maxsize=256)
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
