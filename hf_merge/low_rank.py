"""Task vectors as two thin factors, and the algebra on them that never forms the dense matrix.

Adapters are read into [`Factors`], methods compute with them, and the result is written from them. Torch is all that this file
needs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Factors:
    """A matrix L R, or a stack of them.

    Args:
        left (`torch.Tensor`): L, shape (..., rows, rank).
        right (`torch.Tensor`): R, shape (..., rank, columns).
    """

    left: Tensor
    right: Tensor

    @property
    def rank(self) -> int:
        """The inner dimension; the rank of the product is at most that."""
        return self.left.shape[-1]

    @property
    def shape(self) -> torch.Size:
        """Of the product."""
        return torch.Size([*self.left.shape[:-1], self.right.shape[-1]])

    @property
    def mT(self) -> Factors:
        """The factors of the transposed matrix."""
        return Factors(self.right.mT, self.left.mT)

    def __getitem__(self, index: int) -> Factors:
        """One matrix of a stack."""
        return Factors(self.left[index], self.right[index])

    def to(self, dtype: torch.dtype) -> Factors:
        return Factors(self.left.to(dtype), self.right.to(dtype))

    def scaled(self, factor: float) -> Factors:
        """`factor` · L R."""
        return Factors(self.left * factor, self.right)

    def dense(self) -> Tensor:
        """L R."""
        return self.left @ self.right

    def norm(self) -> float:
        """The Frobenius norm of the product, ‖L R‖² = ⟨LᵀL, R Rᵀ⟩, in float64."""
        left, right = self.left.double(), self.right.double()
        return max(0.0, torch.sum((left.mT @ left) * (right @ right.mT)).item()) ** 0.5

    @classmethod
    def zero(cls, like: Factors) -> Factors:
        """Factors of rank 0 and the shape of `like`."""
        return cls(like.left[..., :0], like.right[..., :0, :])


def concatenated(factors: Sequence[Factors], weights: Sequence[float] | None = None) -> Factors:
    """Σ w_i L_i R_i, exactly: the factors side by side. The rank is Σ r_i.

    Args:
        factors (`Sequence[Factors]`): Of one shape.
        weights (`Sequence[float]`, *optional*): w_i, 1 by default.
    """
    weights = [1.0] * len(factors) if weights is None else weights
    left = torch.cat([one.left * weight for one, weight in zip(factors, weights, strict=True)], dim=-1)
    return Factors(left, torch.cat([one.right for one in factors], dim=-2))


def stacked(factors: Sequence[Factors]) -> Factors:
    """Matrices of one shape as a stack; smaller ranks are filled up with zeros."""
    rank = max(one.rank for one in factors)
    padded = [resized(one, rank) for one in factors]
    return Factors(torch.stack([one.left for one in padded]), torch.stack([one.right for one in padded]))


def resized(factors: Factors, rank: int) -> Factors:
    """The same product with the inner dimension `rank`, which must not be smaller: filled up with zeros."""
    missing = rank - factors.rank
    left = torch.nn.functional.pad(factors.left, (0, missing))
    return Factors(left, torch.nn.functional.pad(factors.right, (0, 0, 0, missing)))


def singular_factors(factors: Factors) -> tuple[Tensor, Tensor, Tensor]:
    """The thin SVD U diag(s) Vᵀ of a product, from QR decompositions of its factors and one SVD of size (rank, rank).

    Returns:
        `tuple`: U (..., rows, k), s (..., k) in falling order, Vᵀ (..., k, columns), k = min(rank, rows, columns), in float64.
    """
    left = torch.linalg.qr(factors.left.double())
    right = torch.linalg.qr(factors.right.double().mT)
    inner, values, outer = torch.linalg.svd(left.R @ right.R.mT, full_matrices=False)
    return left.Q @ inner, values, outer @ right.Q.mT


def truncated(factors: Factors, rank: int) -> tuple[Factors, float]:
    """The best approximation of rank `rank` (Eckart and Young), with the singular values shared equally by both factors.

    Args:
        factors (`Factors`): What is approximated.
        rank (`int`): The rank; the factors come back as they are when theirs is not larger.

    Returns:
        `tuple[Factors, float]`: The approximation in the dtype of the factors, and the part of the energy ‖·‖² that is lost.
    """
    if factors.rank <= rank:
        return factors, 0.0
    return _split(*singular_factors(factors), rank, factors.left.dtype)


def factorized(matrix: Tensor, rank: int) -> tuple[Factors, float]:
    """The best approximation of rank `rank` of dense matrices (..., rows, columns), as [`truncated`] gives it."""
    return _split(*torch.linalg.svd(matrix.double(), full_matrices=False), rank, matrix.dtype)


def _split(left: Tensor, values: Tensor, right: Tensor, rank: int, dtype: torch.dtype) -> tuple[Factors, float]:
    energy = values.square().sum().item()
    lost = values[..., rank:].square().sum().item() / energy if energy else 0.0
    roots = values[..., :rank].sqrt()
    kept = Factors(left[..., :rank] * roots.unsqueeze(-2), roots.unsqueeze(-1) * right[..., :rank, :])
    return kept.to(dtype), lost
