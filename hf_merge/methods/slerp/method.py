"""Spherical linear interpolation between two models."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from ..base import ElementwiseMethod, TensorGroup
from ..spherical import SMALLEST_SQUARE, gram_matrix, near_products, slerp_weights


class Slerp(ElementwiseMethod):
    """(sin((1−t)θ) x + sin(tθ) y) / sin θ for each parameter as one vector; see [`slerp_weights`].

    x and y are the two experts (the base model is not used then), or the base model and the only expert. A parameter that only
    the one expert has is taken from it.
    """

    max_experts = 2

    @classmethod
    def refusals(cls, name: str, experts: int, has_base: bool) -> list[str]:
        if experts == 1 and not has_base:
            return [
                f"The method '{name}' goes from one model to another: give two experts, or a base model and one expert."
            ]
        return super().refusals(name, experts, has_base)

    @classmethod
    def looks_again(cls, settings: Any) -> bool:
        return True

    def prepare(self, group: TensorGroup) -> tuple[float, float] | None:
        """The factors of x and y."""
        if len(group) == 1 and group.stored_base is None:
            return None
        yy, dy, dd = sum(near_products(*_ends(piece)) for piece in group.pieces())
        if SMALLEST_SQUARE < yy < math.inf and 4 * dd < yy:
            dots, lengths = yy + dy, ((yy + 2 * dy + dd) * yy).sqrt()
        else:  # not near each other, or inexact
            gram = sum(gram_matrix(_ends(piece)) for piece in group.pieces())
            dots, lengths = gram[0, 1], gram.diagonal().sqrt().prod()
        near, far = slerp_weights(group.settings.t, dots, lengths, group.settings.threshold)
        return float(near), float(far)

    def merge_piece(self, piece: TensorGroup, prepared: tuple[float, float] | None) -> Tensor:
        if prepared is None:
            return piece.mean()
        first, second = _ends(piece)
        return first.mul(prepared[0]).add_(second, alpha=prepared[1])


def _ends(piece: TensorGroup) -> tuple[Tensor, Tensor]:
    """x and y."""
    return (piece.base, piece.expert(0)) if len(piece) == 1 else (piece.expert(0), piece.expert(1))
