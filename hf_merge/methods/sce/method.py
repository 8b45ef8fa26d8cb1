"""SCE: select entries by variance, calculate coefficients, erase the minority sign (FuseChat, arXiv 2408.07990)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..base import ElementwiseMethod, ParameterKind, TensorGroup
from ..election import Election, masked
from ..selection import Cut, count_kept, cut_largest, selection_memory
from ..spherical import dot


@dataclass
class Selection:
    """What is known of a parameter before its pieces are merged.

    Args:
        mask (`torch.Tensor`, *optional*): The entries that are selected (bool, flat); `None`: all.
        coefficients (`list[float]`): c_i.
        election ([`Election`]): The signs.
    """

    mask: Tensor | None
    coefficients: list[float]
    election: Election


class Sce(ElementwiseMethod):
    """θ_0 + Σ c_i m_i τ̂_i / Σ c_i m_i: τ̂_i keeps the selected entries, c_i ∝ ‖τ̂_i‖², m_i keeps the elected sign.

    The coefficients are relative: unlike in mergekit small task vectors do not make them uniform.
    """

    requires_base = True
    changes_only = True

    working_copies = (0.75, 0.0)

    @classmethod
    def working_memory(cls, kind: ParameterKind, shape: Sequence[int], experts: int, settings: Any) -> int:
        held = super().working_memory(kind, shape, experts, settings)
        return max(held, selection_memory(math.prod(shape)))

    @classmethod
    def looks_again(cls, settings: Any) -> bool:
        return True

    def prepare(self, group: TensorGroup) -> Selection:
        mask = select(group, group.settings.density)

        def energies_of(piece: TensorGroup) -> Tensor:
            return torch.tensor([dot(vector, vector) for vector in _selected(piece, mask)], dtype=torch.float64)

        energies = sum(energies_of(piece) for piece in group.pieces())
        coefficients = energies.div_(energies.sum() or 1.0).tolist()
        return Selection(mask, coefficients, Election([1.0] * len(group), "total"))

    def merge_piece(self, piece: TensorGroup, prepared: Selection) -> Tensor:
        vectors = _selected(piece, prepared.mask)
        return prepared.election.merge(vectors, piece.offset, prepared.coefficients, mean=True).add_(piece.base)

    def correct(self, piece: TensorGroup, prepared: Selection) -> tuple[Tensor, Tensor] | None:
        corrected = prepared.election.correct(piece.offset, prepared.coefficients, mean=True)
        if corrected is None:
            return None
        places, values = corrected
        return places, values.add_(piece.base.reshape(-1)[places])


def select(group: TensorGroup, density: float) -> Tensor | None:
    """The mask of the entries of largest variance over the experts, flat; `None` when all are kept."""
    if density >= 1.0:
        return None
    variance = torch.cat([_variance(piece) for piece in group.pieces()])
    cut: Cut = cut_largest(variance, count_kept(density, int(torch.count_nonzero(variance))))
    return cut.mask(variance)


def _selected(piece: TensorGroup, mask: Tensor | None) -> list[Tensor]:
    """τ̂_i in a piece."""
    vectors = list(piece.task_vectors())
    if mask is None:
        return vectors
    part = mask[piece.offset : piece.offset + piece.shape.numel()]
    return [masked(vector, part) for vector in vectors]


def _variance(piece: TensorGroup) -> Tensor:
    """The variance over the experts of every entry, exactly 0 where they are equal: moments of the distance to the first."""
    first = piece.expert(0)
    mean, square = torch.zeros_like(first), torch.zeros_like(first)
    for index in range(1, len(piece)):
        distance = piece.expert(index) - first
        mean += distance
        square.addcmul_(distance, distance)
    return square.div_(len(piece)).sub_(mean.div_(len(piece)).square_()).clamp_(min=0.0)
