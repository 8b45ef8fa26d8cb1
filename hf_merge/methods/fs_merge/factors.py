"""The factors of a folded weight, W = Σ_i M_i W_i U_i (FS-Merge, arXiv 2410.01483): what maps an expert's channels to the
merged model's and back. A factor is never multiplied with activations, only with the expert's weights.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


FORMS = ("diagonal_low_rank", "diagonal", "low_rank", "full")


class Factor(nn.Module):
    """A matrix (rows, columns), applied to weights from the left or from the right. It starts as `scale` times the identity,
    with zeros where the two widths differ.

    Args:
        rows, columns (`int`): Its shape.
        scale (`float`): Of the identity that it starts as.
    """

    def __init__(self, rows: int, columns: int, scale: float):
        super().__init__()
        self.rows, self.columns, self.scale = rows, columns, scale

    def left(self, weight: Tensor) -> Tensor:
        """F X, for X of shape (columns, n)."""
        raise NotImplementedError(f"{type(self).__name__} does not implement left")

    def right(self, weight: Tensor) -> Tensor:
        """X F, for X of shape (n, rows)."""
        raise NotImplementedError(f"{type(self).__name__} does not implement right")

    def fit(self, matrix: Tensor) -> None:
        """Takes the values that come nearest to a matrix (rows, columns)."""
        raise NotImplementedError(f"{type(self).__name__} does not implement fit")

    def dense(self) -> Tensor:
        """The matrix itself."""
        parameter = next(self.parameters())
        return self.left(torch.eye(self.columns, dtype=parameter.dtype, device=parameter.device))


class Diagonal(Factor):
    """diag(d), rectangular where the widths differ."""

    def __init__(self, rows: int, columns: int, scale: float):
        super().__init__(rows, columns, scale)
        self.diagonal = nn.Parameter(torch.full((min(rows, columns),), float(scale)))

    def left(self, weight: Tensor) -> Tensor:
        return _scale_rows(self.diagonal, weight, self.rows)

    def right(self, weight: Tensor) -> Tensor:
        return _scale_rows(self.diagonal, weight.mT, self.columns).mT

    @torch.no_grad()
    def fit(self, matrix: Tensor) -> None:
        self.diagonal.copy_(matrix.diagonal())


class LowRank(Factor):
    """scale · I + A B with A (rows, rank) random and B (rank, columns) zero at the start; the identity is not trained.

    Args:
        rows, columns, scale: As in [`Factor`].
        rank (`int`): Of A B.
        generator (`torch.Generator`): Draws A.
    """

    def __init__(self, rows: int, columns: int, scale: float, rank: int, generator: torch.Generator):
        super().__init__(rows, columns, scale)
        rank = min(rank, rows, columns)
        self.a = nn.Parameter(torch.randn(rows, rank, generator=generator) * 0.3 / math.sqrt(rank))
        self.b = nn.Parameter(torch.zeros(rank, columns))

    def left(self, weight: Tensor) -> Tensor:
        return self._identity_left(weight) + self.a @ (self.b @ weight)

    def right(self, weight: Tensor) -> Tensor:
        return self._identity_right(weight) + (weight @ self.a) @ self.b

    @torch.no_grad()
    def fit(self, matrix: Tensor) -> None:
        rest = matrix - self._identity_left(torch.eye(self.columns, device=matrix.device))
        left, values, right = torch.linalg.svd(rest, full_matrices=False)
        rank = self.a.shape[1]
        root = values[:rank].sqrt()
        self.a.copy_(left[:, :rank] * root)
        self.b.copy_(root[:, None] * right[:rank])

    def _identity_left(self, weight: Tensor) -> Tensor:
        return self.scale * _resize_rows(weight, self.rows)

    def _identity_right(self, weight: Tensor) -> Tensor:
        return self.scale * _resize_rows(weight.mT, self.columns).mT


class DiagonalLowRank(LowRank):
    """diag(d) + A B: the paper's form."""

    def __init__(self, rows: int, columns: int, scale: float, rank: int, generator: torch.Generator):
        super().__init__(rows, columns, scale, rank, generator)
        self.diagonal = nn.Parameter(torch.full((min(rows, columns),), float(scale)))

    @torch.no_grad()
    def fit(self, matrix: Tensor) -> None:
        self.diagonal.copy_(matrix.diagonal())
        super().fit(matrix)

    def _identity_left(self, weight: Tensor) -> Tensor:
        return _scale_rows(self.diagonal, weight, self.rows)

    def _identity_right(self, weight: Tensor) -> Tensor:
        return _scale_rows(self.diagonal, weight.mT, self.columns).mT


class Full(Factor):
    """Every entry is trained."""

    def __init__(self, rows: int, columns: int, scale: float):
        super().__init__(rows, columns, scale)
        self.matrix = nn.Parameter(torch.eye(rows, columns) * scale)

    @torch.no_grad()
    def fit(self, matrix: Tensor) -> None:
        self.matrix.copy_(matrix)

    def left(self, weight: Tensor) -> Tensor:
        return self.matrix @ weight

    def right(self, weight: Tensor) -> Tensor:
        return weight @ self.matrix


class HeadMixing(Factor):
    """C ⊗ I: every head of the merged model is a mixture of the expert's heads, channel by channel. It commutes with rotary
    positions, which turn the channels of all heads alike.

    Args:
        rows, columns, scale: As in [`Factor`].
        head_size (`int`): Channels per head, the same in the merged model and in the expert.
    """

    def __init__(self, rows: int, columns: int, scale: float, head_size: int):
        super().__init__(rows, columns, scale)
        self.head_size = head_size
        self.heads = nn.Parameter(torch.eye(rows // head_size, columns // head_size) * scale)

    def left(self, weight: Tensor) -> Tensor:
        return (self.heads @ weight.reshape(self.heads.shape[1], -1)).reshape(self.rows, -1)

    def right(self, weight: Tensor) -> Tensor:
        transposed = (self.heads.mT @ weight.mT.reshape(self.heads.shape[0], -1)).reshape(self.columns, -1)
        return transposed.mT


def make_factor(
    form: str,
    rows: int,
    columns: int,
    scale: float,
    rank: int,
    generator: torch.Generator,
    head_size: int | None = None,
) -> Factor:
    """A factor of the given form.

    Args:
        form (`str`): One of `FORMS`.
        rows, columns, scale, rank, generator: As in the classes.
        head_size (`int`, *optional*): The factor may only mix whole heads of this size.
    """
    if head_size is not None:
        return HeadMixing(rows, columns, scale, head_size)
    if form == "diagonal":
        return Diagonal(rows, columns, scale)
    if form == "full":
        return Full(rows, columns, scale)
    kind = DiagonalLowRank if form == "diagonal_low_rank" else LowRank
    return kind(rows, columns, scale, rank, generator)


def _scale_rows(diagonal: Tensor, weight: Tensor, rows: int) -> Tensor:
    return F.pad(diagonal[:, None] * weight[: len(diagonal)], (0, 0, 0, rows - len(diagonal)))


def _resize_rows(weight: Tensor, rows: int) -> Tensor:
    return F.pad(weight[:rows], (0, 0, 0, max(rows - len(weight), 0)))
