"""WUDI on experts that are given as adapters, T_i = B_i A_i, without ever forming a matrix (out, in) or (in, in).

Every T_i, C and D live in the row space of the stacked A_i. With [A_1; …; A_n]ᵀ = Q · (…), Q of shape (in, Σ r_i) and orthonormal,
the problem in coordinates T_i Q = B_i (A_i Q) has the same norms, eigenvalues and losses, and its solution M' gives M = M' Qᵀ:
an adapter of rank at most Σ r_i.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...errors import ConfigError
from ...low_rank import Factors
from ..linalg import solve_dtype
from .config import WudiConfig
from .layer import solve
from .solvers import Solution


ROTATION_FREE = ("adaptive", "spectral", "closed_form", "sgd")
"""Solvers whose result does not depend on the basis of the input space. Adam works entry by entry."""


def merge_low_rank(factors: Sequence[tuple[Tensor, Tensor]], settings: WudiConfig) -> tuple[Tensor, Tensor]:
    """Merges experts given as low-rank factors.

    Args:
        factors (`Sequence[tuple[torch.Tensor, torch.Tensor]]`): B_i (out, r_i) and A_i (r_i, in) of each expert, with the
            adapter's scaling multiplied in. The ranks may differ.
        settings ([`WudiConfig`]): The solver and its settings.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: B (out, r) and A (r, in) of the merged task vector B A, r = min(Σ r_i, in), in float32,
        or float64 where an expert is given in it. A has orthonormal rows.

    Raises:
        ConfigError: The solver works on single entries (`"adam"`, `"optmerge"`) and has no low-rank form.
    """
    if settings.solver not in ROTATION_FREE:
        raise ConfigError(
            f"WudiConfig.solver='{settings.solver}' cannot merge low-rank factors: it works on single entries of the dense matrix. "
            f"Use one of {', '.join(ROTATION_FREE)}, or merge the adapters into their weights first."
        )
    double = any(factor.dtype == torch.float64 for pair in factors for factor in pair)
    dtype = torch.float64 if double else torch.float32
    solution, basis = solve_low_rank([Factors(b, a) for b, a in factors], settings)
    merged = factors[0][0].new_zeros(factors[0][0].shape[0], basis.shape[1]) if solution is None else solution.merged
    return merged.to(dtype), basis.mT.contiguous().to(dtype)


def solve_low_rank(experts: Sequence[Factors], settings: WudiConfig) -> tuple[Solution | None, Tensor]:
    """Solves one layer in the row space of its experts.

    Args:
        experts (`Sequence[Factors]`): T_i = B_i A_i.
        settings ([`WudiConfig`]): With a solver of [`ROTATION_FREE`].

    Returns:
        `tuple`: The solution in coordinates, `None` where all experts are zero, and the basis Q (in, r) of M = M' Qᵀ.
    """
    left = experts[0].left
    dtype = torch.promote_types(torch.float64 if left.dtype == torch.float64 else torch.float32, solve_dtype(left))
    stacked = torch.cat([expert.right.to(dtype) for expert in experts])
    basis = torch.linalg.qr(stacked.mT).Q
    reduced = [expert.left.to(dtype) @ (expert.right.to(dtype) @ basis) for expert in experts]
    norms = [torch.linalg.vector_norm(vector).item() for vector in reduced]
    kept = [index for index, norm in enumerate(norms) if norm != 0]
    if not kept:
        return None, basis
    solution = solve(
        [reduced[index] for index in kept],
        [norms[index] for index in kept],
        settings,
        in_features=stacked.shape[1],
    )
    return solution, basis
