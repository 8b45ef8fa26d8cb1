"""The interference that WUDI minimises, as a quadratic form in the merged matrix M of one linear layer.

    L(M) = Σ_i w_i ‖(M − Y_i) P_iᵀ‖²,   w_i = 1/‖T_i‖²

with Y_i = P_i = T_i for WUDI; OptMerge denoises both. L is never evaluated by this definition. It has two equal forms, both
independent of the number of experts once they are built, and the one with fewer multiplications is taken:

- Gram form: C = Σ w_i P_iᵀP_i (in, in) and D = Σ w_i Y_i P_iᵀP_i (out, in);  ∇L = 2 (M C − D).
- row form: R = [√w_i P_i] stacked (rows, in) and F = [√w_i Y_i P_iᵀ] (out, rows);  ∇L = 2 (M Rᵀ − F) R.

They are tied by C = RᵀR and D = F R.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Term:
    """One expert's summand w ‖(M − Y) Pᵀ‖².  target Y: (out, in); projector P: (rows, in); weight w."""

    target: Tensor
    projector: Tensor
    weight: float


class Objective(ABC):
    """L, its half gradient and its curvature."""

    @classmethod
    @abstractmethod
    def build(cls, terms: Iterable[Term], shape: torch.Size) -> Objective:
        """From at least one term, for a layer of shape (out, in)."""

    @abstractmethod
    def half_gradient(self, merged: Tensor, out: Tensor | None = None) -> Tensor:
        """½ ∇L(M) = M C − D, shape (out, in)."""

    @abstractmethod
    def loss(self, merged: Tensor) -> float:
        """L(M)."""

    @abstractmethod
    def recentred(self, origin: Tensor, scale: float, dtype: torch.dtype) -> Objective:
        """The objective of Δ in M = origin + scale · Δ, up to the factor scale², in another dtype.

        Descent moves M by a part of itself, and where experts agree the gradient is a difference that cancels: taken once in
        float64, it leaves float32 nothing to lose on Δ.
        """

    @abstractmethod
    def is_minimal(self, point: Tensor) -> bool:
        """Whether ∇L vanishes up to rounding, as with one expert. Adam would turn the rounding into steps of full length."""

    @abstractmethod
    def curvature(self) -> Tensor:
        """C (in, in) or R Rᵀ (rows, rows): the same non-zero eigenvalues."""


@dataclass
class GramObjective(Objective):
    """L by C, D and its constant Σ w_i ‖Y_i P_iᵀ‖²."""

    gram: Tensor
    target: Tensor
    constant: float

    @classmethod
    def build(cls, terms: Iterable[Term], shape: torch.Size) -> GramObjective:
        """Adds the terms one at a time; peak memory beyond C and D is one term and one matrix of the size of C or D."""
        gram = target = None
        constant = 0.0
        for term in terms:
            if gram is None:
                gram = term.projector.new_zeros(shape[1], shape[1])
                target = term.projector.new_zeros(shape)
            if term.projector.shape[0] * 2 < shape[1]:
                gram.addmm_(term.projector.mT, term.projector, alpha=term.weight)
                image = (term.target @ term.projector.mT) @ term.projector
            else:
                square = term.projector.mT @ term.projector
                gram.add_(square, alpha=term.weight)
                image = term.target @ square
            target.add_(image, alpha=term.weight)
            constant += term.weight * _inner(image, term.target)
        return cls(gram, target, constant)

    def half_gradient(self, merged: Tensor, out: Tensor | None = None) -> Tensor:
        return torch.addmm(self.target, merged, self.gram, beta=-1, out=out)

    def loss(self, merged: Tensor) -> float:
        gradient = self.half_gradient(merged)
        return max(0.0, _inner(gradient - self.target, merged) + self.constant)

    def recentred(self, origin: Tensor, scale: float, dtype: torch.dtype) -> GramObjective:
        target = self.half_gradient(origin).div_(-scale)
        return GramObjective(self.gram.to(dtype), target.to(dtype), self.loss(origin) / scale**2)

    def is_minimal(self, point: Tensor) -> bool:
        return _negligible(self.half_gradient(point), self.target)

    def curvature(self) -> Tensor:
        return self.gram


@dataclass
class RowObjective(Objective):
    """L = ‖M Rᵀ − F‖²."""

    rows: Tensor
    images: Tensor

    @classmethod
    def build(cls, terms: Iterable[Term], shape: torch.Size) -> RowObjective:
        """Stacks the terms: all experts are resident, which is less than one matrix (in, in) where this form is chosen."""
        rows, images = [], []
        for term in terms:
            root = term.weight**0.5
            rows.append(term.projector * root)
            images.append((term.target @ term.projector.mT).mul_(root))
        return cls(torch.cat(rows), torch.cat(images, dim=1))

    def residual(self, merged: Tensor) -> Tensor:
        """M Rᵀ − F, shape (out, rows)."""
        return torch.addmm(self.images, merged, self.rows.mT, beta=-1)

    def half_gradient(self, merged: Tensor, out: Tensor | None = None) -> Tensor:
        return torch.mm(self.residual(merged), self.rows, out=out)

    def loss(self, merged: Tensor) -> float:
        residual = self.residual(merged)
        return _inner(residual, residual)

    def recentred(self, origin: Tensor, scale: float, dtype: torch.dtype) -> RowObjective:
        return RowObjective(self.rows.to(dtype), self.residual(origin).div_(-scale).to(dtype))

    def is_minimal(self, point: Tensor) -> bool:
        return _negligible(self.residual(point), self.images)

    def curvature(self) -> Tensor:
        return self.rows @ self.rows.mT


def cheaper_to_descend(rows: int, in_features: int) -> type[Objective]:
    """The form whose gradient costs less: out·in·(2·rows) multiplications for the row form, out·in·in for the Gram form."""
    return RowObjective if 2 * rows < in_features else GramObjective


def cheaper_to_diagonalize(rows: int, in_features: int) -> type[Objective]:
    """The form whose curvature is the smaller matrix: an eigenproblem costs the cube of its size."""
    return RowObjective if rows < in_features else GramObjective


def _negligible(difference: Tensor, of: Tensor) -> bool:
    """Whether a difference of products is nothing but their rounding."""
    rounding = max(of.shape) * torch.finfo(of.dtype).eps
    return bool(torch.linalg.vector_norm(difference) <= rounding * torch.linalg.vector_norm(of))


def _inner(left: Tensor, right: Tensor) -> float:
    return torch.sum(left * right, dtype=torch.float64 if left.device.type != "mps" else None).item()
