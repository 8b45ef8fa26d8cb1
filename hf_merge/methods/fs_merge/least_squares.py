"""Linear maps by least squares, from batches."""

from __future__ import annotations

import torch
from torch import Tensor


class LeastSquares:
    """U x + c ≈ y, with a little of a prior: the minimiser of Σ ‖U x + c − y‖² + ridge · tr(C)/d · ‖U − U_0‖² with the second
    moments C = Σ x xᵀ.

    Args:
        inputs, outputs (`int`): Channels of x and y.
        has_bias (`bool`): Whether there is c.
        ridge (`float`): Relative to the mean second moment.
    """

    def __init__(self, inputs: int, outputs: int, has_bias: bool = False, ridge: float = 0.01):
        self.inputs, self.outputs, self.has_bias, self.ridge = inputs, outputs, has_bias, ridge
        self._gram = torch.zeros(inputs + 1, inputs + 1, dtype=torch.float64)
        self._cross = torch.zeros(inputs + 1, outputs, dtype=torch.float64)

    def add(self, x: Tensor, y: Tensor) -> None:
        """Takes in a batch.

        Args:
            x, y (`torch.Tensor`): (count, channels).
        """
        ones = torch.full((len(x), 1), float(self.has_bias), dtype=torch.float64)
        extended = torch.cat([x.detach().cpu().double(), ones], 1)
        self._gram += extended.mT @ extended
        self._cross += extended.mT @ y.detach().cpu().double()

    def solve(self, prior: Tensor) -> tuple[Tensor, Tensor]:
        """The solution.

        Args:
            prior (`torch.Tensor`): U_0, (outputs, inputs).

        Returns:
            `tuple`: U (outputs, inputs) and c (outputs,), float32; c is zero where there is none.
        """
        inputs = prior.shape[1]
        strength = self.ridge * self._gram.diagonal()[:inputs].mean().clamp_min(1e-12)
        penalty = strength.repeat(inputs + 1)
        penalty[-1] = 1e-9 if self.has_bias else 1.0
        before = torch.cat([prior.detach().mT.cpu().double(), torch.zeros(1, len(prior), dtype=torch.float64)])
        solution = torch.linalg.solve(self._gram + penalty.diag(), self._cross + penalty[:, None] * before)
        return solution[:-1].mT.float(), solution[-1].float()


class MapFits:
    """Several maps, by name."""

    def __init__(self):
        self._fits: dict[str, LeastSquares] = {}

    def add(self, name: str, x: Tensor, y: Tensor, has_bias: bool) -> None:
        """Takes in a batch, (count, channels) each."""
        if name not in self._fits:
            self._fits[name] = LeastSquares(x.shape[-1], y.shape[-1], has_bias)
        self._fits[name].add(x, y)

    def solve(self, name: str, prior: Tensor | None) -> tuple[Tensor, Tensor]:
        """The matrix and the bias; the prior is the identity when not given."""
        fit = self._fits[name]
        return fit.solve(torch.eye(fit.outputs, fit.inputs) if prior is None else prior)
