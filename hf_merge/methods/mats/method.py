"""MaTS: RegMean's linear systems W Σ G_i = Σ W_i G_i by conjugate gradients from a chosen start (arXiv 2312.04339)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..base import TensorGroup
from ..regmean.method import Known, RegMean, normal_equations


class Mats(RegMean):
    """The linear layers of the blocks, with the inputs that each expert sees in its own model."""

    def solve(self, group: TensorGroup, weights: Sequence[Tensor], grams: Sequence[Known], start: Tensor) -> Tensor:
        system = normal_equations(group, weights, grams, start)
        if system is None:
            return start
        total, right = system
        # Relative to all of Σ W_i G_i, whatever the start is.
        size = float(torch.linalg.matrix_norm(right + start.to(total.dtype) @ total))
        limit = group.settings.tolerance * size
        update, steps, residual = conjugate_gradients(total, right, group.settings.iterations, limit)
        group.report.update(mats_steps=steps, mats_residual=residual / size if size else 0.0)
        return start + update.to(start.dtype)


def conjugate_gradients(matrix: Tensor, right: Tensor, iterations: int, limit: float) -> tuple[Tensor, int, float]:
    """Approximates X with X A = B from X = 0, all rows as one system.

    Args:
        matrix (`torch.Tensor`): A, symmetric and positive semi-definite, (in, in).
        right (`torch.Tensor`): B, in the row space of A, (out, in).
        iterations (`int`): Steps, at most.
        limit (`float`): The norm of the residual B − X A to stop at.

    Returns:
        `tuple`: X, the steps made, and the norm of the residual.
    """
    solution, residual = torch.zeros_like(right), right.clone()
    direction = residual.clone()
    square = float(residual.square().sum())
    for step in range(iterations):
        if square**0.5 <= limit or square == 0.0:
            return solution, step, square**0.5
        image = direction @ matrix
        curvature = float((direction * image).sum())
        if curvature <= 0.0:  # only rounding is left
            return solution, step, square**0.5
        size = square / curvature
        solution.add_(direction, alpha=size)
        residual.sub_(image, alpha=size)
        previous, square = square, float(residual.square().sum())
        direction.mul_(square / previous).add_(residual)
    return solution, iterations, square**0.5
