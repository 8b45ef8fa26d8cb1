"""Decompositions that the spectral methods share. Matrices are task vectors T of one linear layer, shape (out, in)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.linalg
import torch
from torch import Tensor
from torch.nn import functional

from ..low_rank import Factors, singular_factors


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

    def factors(self, scaling: float, dtype: torch.dtype) -> Factors:
        """scaling · U diag(s) Vᵀ as two factors that share the singular values equally."""
        roots = self.values.sqrt()
        return Factors((self.left * (roots * scaling)).to(dtype), (roots.unsqueeze(1) * self.right).to(dtype))


def solve_dtype(like: Tensor) -> torch.dtype:
    """The dtype of eigen and singular value decompositions: float64, twice the time on a CPU, where the device has it.

    What float32 cannot tell from zero would decide ranks, and neighbouring vectors mix at its resolution.
    """
    return like.dtype if like.device.type == "mps" else torch.float64


def sum_dtype(like: Tensor) -> torch.dtype:
    """The dtype that sums over tokens are kept in: float64 where the device has it."""
    return torch.float32 if like.device.type == "mps" else torch.float64


def solve_symmetric(system: Tensor, right: Tensor) -> Tensor:
    """S⁻¹ R of a symmetric S that is positive semi-definite up to rounding, (n, n), and R (n, m). Directions that rounding cannot
    tell from zero are left out."""
    factor, failed = torch.linalg.cholesky_ex(system)
    if not failed:
        return torch.cholesky_solve(right, factor)
    values, vectors = torch.linalg.eigh(system)
    known = values > values[-1] * len(values) * torch.finfo(torch.float32).eps
    vectors = vectors[:, known]
    return vectors @ ((vectors.mT @ right) / values[known, None])


ONEDNN_SIZE = 2**23
"""Multiplications from which a product is worth the copies to oneDNN's tensors and back, some microseconds."""

ONEDNN_ROWS = 256
"""Rows that are multiplied at a time: the copies of so many stay in the cache."""


def times_transposed(left: Tensor, right: Tensor, out: Tensor | None = None) -> Tensor:
    """A Bᵀ.  left: (m, k); right: (n, k), contiguous; result: (m, n).

    Large products in float32 on an x86 CPU go to oneDNN, which is as fast as MKL on Intel, twice as fast on AMD, and rounds
    alike. The choice depends on shapes and the build of torch alone, so that a merge gives the same bits every time.
    """
    if not _suits_onednn(left, right):
        return torch.mm(left, right.mT, out=out)
    if out is None:
        out = left.new_empty(len(left), len(right))
    for rows, result in zip(left.split(ONEDNN_ROWS), out.split(ONEDNN_ROWS), strict=True):
        result.copy_(functional.linear(rows.to_mkldnn(), right).to_dense())
    return out


def _suits_onednn(left: Tensor, right: Tensor) -> bool:
    return (
        left.dtype == right.dtype == torch.float32
        and left.device.type == "cpu"
        and torch.backends.mkl.is_available()
        and torch.backends.mkldnn.is_available()
        and left.numel() * len(right) >= ONEDNN_SIZE
    )


def eigenpairs_in_place(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues in rising order and eigenvectors (columns) of a finite symmetric matrix, which is overwritten.

    On a CPU by LAPACK's `syevr`, in the room of the matrix and the eigenvectors: `syevd`, torch's, works in twice as much.
    """
    if matrix.device.type != "cpu":
        return torch.linalg.eigh(matrix)
    # The transpose is the same matrix, in the order of LAPACK.
    values, vectors = scipy.linalg.eigh(matrix.numpy().T, driver="evr", overwrite_a=True, check_finite=False)
    return torch.from_numpy(values), torch.from_numpy(vectors)


def rounding_floor(norm: Tensor, shape: torch.Size) -> Tensor:
    """The singular value below which a direction is only rounding: models are stored in float32 at best."""
    return norm * max(shape) * torch.finfo(torch.float32).eps


def singular_triplets(matrix: Tensor) -> Triplets:
    """The exact SVD without the null space, whose vectors are arbitrary."""
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    rank = int((values > rounding_floor(values[:1], matrix.shape)).sum())
    return Triplets(left, values, right).top(rank)


def factored_triplets(factors: Factors) -> Triplets:
    """[`singular_triplets`] of a product L R, in float64, without forming it."""
    if not factors.rank:
        return Triplets(factors.left.double(), factors.left.new_zeros(0).double(), factors.right.double())
    left, values, right = singular_factors(factors)
    rank = int((values > rounding_floor(values[:1], factors.shape)).sum())
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
