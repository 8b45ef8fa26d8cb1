"""Inner products, norms and arcs, for the methods that treat parameters, or their rows, as points on a sphere.

The angle between a model and its fine-tune is small, and what is left of it after rounding in float32 is noise: inner products are
summed in float64, or that of the difference is, or the vectors are task vectors, whose angles are not small. Their order is fixed, in
pieces of one size or in one thread, so that bits do not depend on the number of threads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


SMALLEST_SQUARE = 1e-25
"""Squared norms below are inexact in float32."""

_CHUNK = 1 << 20
_PIECE = 1 << 14  # summed by one thread, whatever their number
_LINEAR_SINE = 1e-6  # an arc this short is a straight line; this close to a half circle it has no direction


def dot(first: Tensor, second: Tensor) -> float:
    """⟨x, y⟩ of two tensors of one shape, in float64."""
    parts = [
        _sum(x.double() * y.double())
        for x, y in zip(first.reshape(-1).split(_CHUNK), second.reshape(-1).split(_CHUNK), strict=True)
    ]
    return float(torch.stack(parts).sum()) if parts else 0.0


def total(values: Tensor) -> float:
    """Σ x of a tensor whose entries have one sign: in its own dtype over pieces, and in float64 over these."""
    return float(_sum(values.reshape(-1)))


def row_dots(first: Tensor, second: Tensor) -> Tensor:
    """⟨x_r, y_r⟩ of each row of two matrices (rows, entries): float64, (rows, 1)."""
    if first.shape[0] == 1:
        return torch.tensor([[dot(first, second)]], dtype=torch.float64, device=first.device)
    step = max(1, _CHUNK // max(1, first.shape[1]))
    pairs = zip(first.split(step), second.split(step), strict=True)
    return torch.cat([(x.double() * y.double()).sum(dim=1, keepdim=True) for x, y in pairs])


def row_norms(rows: Tensor) -> Tensor:
    """‖x_r‖ of each row of a matrix: float64, (rows, 1)."""
    return row_dots(rows, rows).sqrt_()


def gram_matrix(vectors: Sequence[Tensor]) -> Tensor:
    """⟨x_i, x_j⟩ of n vectors: float64, (n, n)."""
    return _gram(vectors, dot)


def rough_gram_matrix(vectors: Sequence[Tensor]) -> Tensor:
    """The same for pieces, each product added up in the vectors' own dtype: with relative errors of about 1e-6 in float32. Enough where
    angles are not small."""
    return _gram(vectors, lambda x, y: float(torch.dot(x, y)))


def near_products(first: Tensor, second: Tensor) -> Tensor:
    """⟨y, y⟩, ⟨x − y, y⟩ and ⟨x − y, x − y⟩ of a piece of two vectors, added up as in [`rough_gram_matrix`]: float64, (3,).

    Of vectors that are near each other they tell the angle as exactly as any norm: sin² = (⟨y,y⟩⟨d,d⟩ − ⟨d,y⟩²) / ‖x‖²‖y‖² for
    d = x − y, where nothing is left of ⟨x, y⟩ itself in this precision.
    """
    y, change = second.reshape(-1), (first - second).reshape(-1)
    products = [torch.dot(y, y), torch.dot(change, y), torch.dot(change, change)]
    return torch.stack(products).to("cpu", torch.float64)


def _gram(vectors: Sequence[Tensor], product: Callable[[Tensor, Tensor], float]) -> Tensor:
    flat = [vector.reshape(-1) for vector in vectors]
    half = [[product(first, second) for second in flat[: row + 1]] for row, first in enumerate(flat)]
    return torch.tensor(
        [[half[max(i, j)][min(i, j)] for j in range(len(flat))] for i in range(len(flat))], dtype=torch.float64
    )


def slerp_rows(t: float, first: Tensor, second: Tensor, threshold: float = 1.0) -> Tensor:
    """Spherical interpolation between the rows of two matrices: (sin((1−t)θ) x + sin(tθ) y) / sin θ (Shoemake 1985).

    It is linear, (1−t) x + t y, where |cos θ| is above `threshold`, and where no arc is defined because the rows are parallel,
    opposite or zero.

    Args:
        t (`float`): The position, 0 at the first and 1 at the second.
        first, second (`torch.Tensor`): (rows, entries).
        threshold (`float`): Of |cos θ|.

    Returns:
        `torch.Tensor`: A new tensor, (rows, entries).
    """
    near, far = slerp_weights(t, row_dots(first, second), row_norms(first).mul_(row_norms(second)), threshold)
    return first * near.to(first.dtype) + second * far.to(second.dtype)


def slerp_weights(t: float, dots: Tensor, lengths: Tensor, threshold: float = 1.0) -> tuple[Tensor, Tensor]:
    """What [`slerp_rows`] multiplies its two vectors with.

    Args:
        t, threshold (`float`): As there.
        dots (`torch.Tensor`): ⟨x, y⟩, float64.
        lengths (`torch.Tensor`): ‖x‖ ‖y‖, float64, of the same shape.
    """
    cos = dots.div(lengths.masked_fill(lengths == 0, 1.0)).clamp_(-1.0, 1.0)
    angle = torch.acos(cos)
    sine = torch.sin(angle)
    linear = (lengths == 0) | (cos.abs() > threshold) | (sine < _LINEAR_SINE)
    sine = sine.masked_fill_(linear, 1.0)
    near = torch.where(linear, 1.0 - t, torch.sin((1.0 - t) * angle) / sine)
    return near, torch.where(linear, t, torch.sin(t * angle) / sine)


def unit_gram(vector: Callable[[int], Tensor], count: int) -> tuple[Tensor, Tensor]:
    """The norms of `count` vectors, (count,), and the inner products of their unit vectors, (count, count), both float64 on the CPU.

    Two vectors are held at a time. A zero vector has the inner product 0 with every vector.
    """
    gram = torch.zeros(count, count, dtype=torch.float64)
    for row in range(count):
        first = vector(row)
        for column in range(row + 1):
            gram[row, column] = gram[column, row] = dot(first, first if row == column else vector(column))
    norms = gram.diagonal().sqrt()
    scale = norms.masked_fill(norms == 0, 1.0)
    return norms, gram / scale / scale[:, None]


def combine(vector: Callable[[int], Tensor], coefficients: Sequence[float]) -> Tensor:
    """Σ c_i v_i, one vector at a time, as a new tensor."""
    total = vector(0) * coefficients[0]
    for index in range(1, len(coefficients)):
        total.add_(vector(index), alpha=coefficients[index])
    return total


def _sum(values: Tensor) -> Tensor:
    whole = values.numel() // _PIECE * _PIECE
    total = values[:whole].view(-1, _PIECE).sum(dim=1).sum(dtype=torch.float64)
    return total if whole == values.numel() else total + values[whole:].sum(dtype=torch.float64)
