"""Decompositions that the spectral methods share. Matrices are task vectors T of one linear layer, shape (out, in)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass
class Triplets:
    """The leading singular triplets: T ≈ U diag(s) Vᵀ with U (out, k), s (k,) in falling order, Vᵀ (k, in).

    **Attributes**:
        - **residual** (`float`) -- ‖T V − U diag(s)‖ / ‖s‖: zero up to rounding for exact triplets.
    """

    left: Tensor
    values: Tensor
    right: Tensor
    residual: float = 0.0

    def top(self, count: int) -> Triplets:
        """The first `count` triplets, or fewer where there are not so many."""
        return Triplets(self.left[:, :count], self.values[:count], self.right[:count], self.residual)

    def matrix(self) -> Tensor:
        """U diag(s) Vᵀ."""
        return (self.left * self.values) @ self.right


def solve_dtype(like: Tensor) -> torch.dtype:
    """The dtype of eigen and singular value decompositions: float64, twice the time on a CPU, where the device has it.

    What float32 cannot tell from zero would decide ranks, and neighbouring vectors mix at its resolution.
    """
    return like.dtype if like.device.type == "mps" else torch.float64


def rounding_floor(norm: Tensor, shape: torch.Size) -> Tensor:
    """The singular value below which a direction is only rounding: models are stored in float32 at best."""
    return norm * max(shape) * torch.finfo(torch.float32).eps


def singular_triplets(matrix: Tensor) -> Triplets:
    """The exact SVD without the null space, whose vectors are arbitrary."""
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    rank = int((values > rounding_floor(values[:1], matrix.shape)).sum())
    return Triplets(left, values, right).top(rank)


def randomized_triplets(
    matrix: Tensor, count: int, oversampling: int, power_iterations: int, generator: np.random.Generator
) -> Triplets:
    """The leading triplets from a random range finder (arXiv 0909.4061, algorithms 4.4 and 5.1).

    Args:
        matrix (`torch.Tensor`): T, shape (out, in).
        count (`int`): k, the triplets wanted.
        oversampling (`int`): Columns of the random matrix beyond k.
        power_iterations (`int`): How often T Tᵀ is applied, with a QR between.
        generator (`np.random.Generator`): Draws the random matrix.
    """
    columns = min(count + oversampling, *matrix.shape)
    drawn = generator.standard_normal((matrix.shape[1], columns))
    basis = torch.linalg.qr(matrix @ torch.from_numpy(drawn).to(matrix)).Q
    for _ in range(power_iterations):
        basis = torch.linalg.qr(matrix.mT @ basis).Q
        basis = torch.linalg.qr(matrix @ basis).Q
    small = singular_triplets(basis.mT @ matrix).top(count)
    found = Triplets(basis @ small.left, small.values, small.right)
    error = torch.linalg.vector_norm(matrix @ found.right.mT - found.left * found.values)
    found.residual = (error / torch.linalg.vector_norm(found.values)).item()
    return found


def polar_factor(matrix: Tensor) -> Tensor:
    """P Qᵀ of the SVD P Σ Qᵀ: the nearest matrix with orthonormal columns (rows).

    Directions of zero singular value are left out instead of being filled arbitrarily: the factor of linearly dependent columns is
    a partial isometry, unique, and that of equal columns shares one direction among them.
    """
    triplets = singular_triplets(matrix)
    return triplets.left @ triplets.right
