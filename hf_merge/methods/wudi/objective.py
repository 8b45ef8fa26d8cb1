"""The interference that WUDI minimises, as a quadratic form in the merged matrix M of one linear layer.

    L(M) = Σ_i w_i ‖(M − Y_i) P_iᵀ‖²,   w_i = 1/‖T_i‖²

with Y_i = P_i = T_i for WUDI; OptMerge denoises both. L is never evaluated by this definition but about an origin O, the point that a
solver starts from, for the change Δ = M − O. It has two equal forms, both independent of the number of experts once they are
built, and the one with fewer multiplications is taken:

- Gram form: C = Σ w_i P_iᵀP_i (in, in) and G = Σ w_i (O − Y_i) P_iᵀP_i (out, in);  ½∇L = Δ C + G.
- row form: R = [√w_i P_i] stacked (rows, in) and F = [√w_i (O − Y_i) P_iᵀ] (out, rows);  ½∇L = (Δ Rᵀ + F) R.

They are tied by C = RᵀR and G = F R. G and F are taken once in the dtype of the origin: where experts agree they are differences that
cancel, and leave a solver in a narrower dtype nothing to lose on Δ.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..linalg import times_transposed


@dataclass
class Term:
    """One expert's summand w ‖(M − Y) Pᵀ‖².  target Y: (out, in); projector P: (rows, in); weight w."""

    target: Tensor
    projector: Tensor
    weight: float

    def rows(self, dtype: torch.dtype) -> Tensor:
        """√w P, whose entries no dtype is too narrow for."""
        out = torch.empty_like(self.projector, dtype=dtype)
        return torch.mul(self.projector, self.weight**0.5, out=out)


class Objective(ABC):
    """L, its half gradient and its curvature, as functions of Δ = (M − O) / scale and up to the factor scale².

    **Attributes**:
        - **constant** (`float`) -- L at the origin.
        - **rounding** (`float`) -- The norm below which the gradient at the origin is nothing but rounding.
    """

    constant: float
    rounding: float

    @classmethod
    @abstractmethod
    def build(cls, terms: Iterable[Term], origin: Tensor, dtype: torch.dtype, scale: float = 1.0) -> Objective:
        """The objective of at least one term.

        Args:
            terms (`Iterable[Term]`): The summands, in the origin's dtype, taken one at a time.
            origin (`torch.Tensor`): O, shape (out, in), in the dtype that differences are taken in.
            dtype (`torch.dtype`): The dtype of Δ.
            scale (`float`): The unit of Δ.
        """

    @abstractmethod
    def half_gradient(self, change: Tensor, out: Tensor | None = None) -> Tensor:
        """½ ∇L, shape (out, in)."""

    @abstractmethod
    def loss(self, change: Tensor) -> float:
        """L."""

    @abstractmethod
    def is_minimal(self) -> bool:
        """Whether ∇L vanishes at the origin, as with one expert. Adam would turn the rounding into steps of full length."""

    @abstractmethod
    def curvature(self) -> Tensor:
        """C (in, in) or R Rᵀ (rows, rows): the same non-zero eigenvalues."""


@dataclass
class GramObjective(Objective):
    """L by C, G and its value at the origin."""

    gram: Tensor
    slope: Tensor
    constant: float
    rounding: float

    @classmethod
    def build(cls, terms: Iterable[Term], origin: Tensor, dtype: torch.dtype, scale: float = 1.0) -> GramObjective:
        """Peak memory beyond C and G is three matrices of a term's size and, for terms of many rows, one of C's."""
        size = origin.shape[1]
        gram = origin.new_zeros(size, size, dtype=dtype)
        slope = torch.zeros_like(origin)
        constant = rounding = 0.0
        for term in terms:
            rounding += _rounding(term)
            residual = origin - term.target
            if 2 * len(term.projector) < size:
                rows = term.rows(dtype)
                gram.addmm_(rows.mT, rows)
                del rows
                image = residual @ term.projector.mT
                constant += term.weight * _inner(image, image)
                slope.addmm_(image, term.projector, alpha=term.weight)
            else:
                square = term.projector.mT @ term.projector
                gram.add_(square, alpha=term.weight)
                image = residual @ square
                constant += term.weight * _inner(image, residual)
                slope.add_(image, alpha=term.weight)
            del term, residual, image  # before the next one is made
        return cls(gram, slope.div_(scale).to(dtype), constant / scale**2, rounding / scale)

    def half_gradient(self, change: Tensor, out: Tensor | None = None) -> Tensor:
        return times_transposed(change, self.gram, out).add_(self.slope)

    def loss(self, change: Tensor) -> float:
        return max(0.0, _inner(self.half_gradient(change).add_(self.slope), change) + self.constant)

    def is_minimal(self) -> bool:
        return bool(torch.linalg.vector_norm(self.slope) <= self.rounding)

    def curvature(self) -> Tensor:
        return self.gram


@dataclass
class RowObjective(Objective):
    """L = ‖Δ Rᵀ + F‖²."""

    rows: Tensor
    residual: Tensor
    rounding: float

    @classmethod
    def build(cls, terms: Iterable[Term], origin: Tensor, dtype: torch.dtype, scale: float = 1.0) -> RowObjective:
        """Stacks the terms: all experts are resident, which is less than one matrix (in, in) where this form is chosen."""
        rows, residuals, rounding = [], [], 0.0
        for term in terms:
            rounding += _rounding(term)
            rows.append(term.rows(dtype))
            residual = (origin - term.target) @ term.projector.mT
            residuals.append(residual.mul_(term.weight**0.5 / scale).to(dtype))
        return cls(torch.cat(rows), torch.cat(residuals, dim=1), rounding / scale)

    @property
    def constant(self) -> float:
        return _inner(self.residual, self.residual)

    @cached_property
    def columns(self) -> Tensor:
        """Rᵀ (in, rows), contiguous."""
        return self.rows.mT.contiguous()

    def moved(self, change: Tensor) -> Tensor:
        """Δ Rᵀ + F, shape (out, rows)."""
        return times_transposed(change, self.rows).add_(self.residual)

    def half_gradient(self, change: Tensor, out: Tensor | None = None) -> Tensor:
        return times_transposed(self.moved(change), self.columns, out)

    def loss(self, change: Tensor) -> float:
        moved = self.moved(change)
        return _inner(moved, moved)

    def is_minimal(self) -> bool:
        return bool(torch.linalg.vector_norm(self.residual) <= self.rounding)

    def curvature(self) -> Tensor:
        return self.rows @ self.rows.mT


def cheaper_to_descend(rows: int, in_features: int) -> type[Objective]:
    """The form whose gradient costs less: out·in·(2·rows) multiplications for the row form, out·in·in for the Gram form."""
    return RowObjective if 2 * rows < in_features else GramObjective


def cheaper_to_diagonalize(rows: int, in_features: int) -> type[Objective]:
    """The form whose curvature is the smaller matrix: an eigenproblem costs the cube of its size."""
    return RowObjective if rows < in_features else GramObjective


def _rounding(term: Term) -> float:
    """The rounding of the products that a gradient is made of, for both forms: w ‖P‖² is one, or less where P is denoised."""
    factor = max(term.target.shape) * torch.finfo(term.target.dtype).eps
    return factor * torch.linalg.vector_norm(term.target).item()


def _inner(left: Tensor, right: Tensor) -> float:
    """⟨left, right⟩, summed in float64 where the device has it."""
    if left.dtype == torch.float64:
        return torch.dot(left.flatten(), right.flatten()).item()
    return torch.sum(left * right, dtype=torch.float64 if left.device.type != "mps" else None).item()
