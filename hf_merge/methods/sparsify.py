"""What the methods that sparsify task vectors share: how the sparse task vectors are combined.

TIES, DARE, DELLA and Breadcrumbs differ in which entries of a task vector they keep. Then they either add what is left, or
elect a sign for every entry and average the experts that agree (TIES, arXiv 2306.01708).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..config import MergeConfig
from ..settings import setting
from .base import ElementwiseMethod, TensorGroup
from .election import Election, masked, weighted_sum
from .groups import difference
from .linear.method import normalizer
from .selection import Parts
from .spherical import total


@dataclass
class SparseMergeConfig(MergeConfig):
    """Settings of the methods that drop entries of the task vectors and combine what is left.

    Args:
        scaling (`float`): The scaling coefficient λ of the merged task vector.
        weights (`float`): The weight w_i of each expert.
        normalize (`bool`): Divide by the sum of the weights: Σ w_i with `combination="linear"`, entry by entry Σ |w_i| of the
            experts that agree with the elected sign with `combination="ties"`.
        combination (`str`): `"linear"`: the sparse task vectors are added. `"ties"`: a sign is elected for each entry, and only
            the experts that agree with it are added.
        majority_sign (`str`): How `combination="ties"` elects: by the sum of the values (`"total"`) or of the signs
            (`"frequency"`).
    """

    scaling: float = setting(1.0, "Scaling coefficient of the merged task vector.")
    weights: float = setting(1.0, "Weight of each expert.", scope="expert")
    normalize: bool = setting(True, "Divide by the sum of the weights (of the experts that agree, with 'ties').")
    combination: str = setting("linear", "How sparse task vectors combine.", choices=("linear", "ties"))
    majority_sign: str = setting("total", "Elect signs by 'total' or 'frequency'.", choices=("total", "frequency"))


@dataclass
class _Mask:
    """A mask over a piece, on a CPU in single bits."""

    bits: np.ndarray | Tensor

    @classmethod
    def of(cls, values: Tensor) -> _Mask:
        """The entries that are not 0."""
        return cls(np.packbits(values.numpy().reshape(-1) != 0) if values.device.type == "cpu" else values != 0)

    def apply(self, values: Tensor, factor: float) -> Tensor:
        """`values` times a factor where the mask is set, 0 elsewhere; in place."""
        if isinstance(self.bits, Tensor):
            return masked(values, self.bits).mul_(factor)
        dtype = values.numpy().dtype
        factors = np.unpackbits(self.bits, count=values.numel()).astype(dtype)
        np.multiply(factors, dtype.type(factor), out=factors)
        return values.mul_(torch.from_numpy(factors).view(values.shape))


@dataclass
class Sparsity:
    """What is known of the task vectors of one parameter.

    Args:
        marks (`list`): Per expert, what [`~SparseMethod.mark`] found.
        factors (`list[float]`, *optional*): Per expert, what its sparse task vector is multiplied with.
        election ([`Election`], *optional*): Where signs are elected.
        kept (`dict`): Which entries of pieces stay, where that was found with the factors, by offset: per expert a [`_Mask`].
    """

    marks: list[Any]
    factors: list[float] | None
    election: Election | None
    kept: dict[int, list[_Mask]] = field(default_factory=dict)


class SparseMethod(ElementwiseMethod):
    """θ_0 + λ · combination of sparse task vectors. A subclass says which entries stay, in [`~SparseMethod.sparsify`]."""

    requires_base = True
    changes_only = True

    @classmethod
    def looks_again(cls, settings: Any) -> bool:
        return settings.rescale == "norm"

    def mark(self, group: TensorGroup, index: int) -> Any:
        """What [`~SparseMethod.sparsify`] has to know of the whole task vector of expert `index`."""
        return None

    def sparsify(self, vector: Tensor, piece: TensorGroup, index: int, mark: Any) -> Tensor:
        """The sparse task vector of expert `index` in a piece; the same for the same arguments. What is kept depends on magnitudes, and
        not on signs.

        Args:
            vector (`torch.Tensor`): τ_i in the piece; it may be changed in place.
            piece ([`TensorGroup`]): The piece.
            index (`int`): i.
            mark: What [`~SparseMethod.mark`] found.
        """
        raise NotImplementedError(f"{type(self).__name__} does not implement sparsify")

    def combines_by_sign(self, settings: Any) -> bool:
        """Whether a sign is elected, or everything is added."""
        return settings.combination == "ties"

    def divides(self, settings: Any) -> bool:
        """Whether the sum is divided by the weights."""
        return settings.normalize

    def prepare(self, group: TensorGroup) -> Sparsity:
        settings = group.settings
        marks = [self.mark(group, index) for index in range(len(group))]
        by_sign = self.combines_by_sign(settings)
        sparsity = Sparsity(marks, None, Election(settings.weights, settings.majority_sign) if by_sign else None)
        if settings.rescale == "norm":
            self._find_factors(group, sparsity)
        return sparsity

    def _find_factors(self, group: TensorGroup, sparsity: Sparsity) -> None:
        """What gives each sparse task vector the L1 norm that the whole one has; mergekit's rescaling."""
        whole, left = [0.0] * len(group), [0.0] * len(group)
        kept = {}
        for piece in self.foreseen_pieces(group, sparsity):
            kept[piece.offset] = masks = []
            for index, (mark, vector) in enumerate(zip(sparsity.marks, piece.task_vectors(), strict=True)):
                magnitudes = vector.abs_()
                whole[index] += total(magnitudes)
                sparse = self.sparsify(magnitudes, piece, index, mark)
                left[index] += total(sparse)
                masks.append(_Mask.of(sparse))
        sparsity.kept = kept
        sparsity.factors = [one / other if other else 1.0 for one, other in zip(whole, left, strict=True)]

    def sparse_vectors(self, piece: TensorGroup, sparsity: Sparsity) -> list[Tensor]:
        """The sparse task vectors of all experts in a piece, as they are combined."""
        if sparsity.factors is not None:
            found = zip(sparsity.kept[piece.offset], piece.task_vectors(), sparsity.factors, strict=True)
            return [mask.apply(vector, factor) for mask, vector, factor in found]
        pairs = zip(sparsity.marks, piece.task_vectors(), strict=True)
        return [self.sparsify(vector, piece, index, mark) for index, (mark, vector) in enumerate(pairs)]

    def merge_piece(self, piece: TensorGroup, prepared: Sparsity) -> Tensor:
        settings = piece.settings
        vectors = self.sparse_vectors(piece, prepared)
        if prepared.election is not None:
            merged = prepared.election.merge(vectors, piece.offset, mean=self.divides(settings))
        else:
            merged = weighted_sum(vectors, settings.weights)
            if self.divides(settings):
                merged.div_(normalizer(settings.weights, piece.name))
        return merged.mul_(settings.scaling).add_(piece.base)

    def correct(self, piece: TensorGroup, prepared: Sparsity) -> tuple[Tensor, Tensor] | None:
        if prepared.election is None:
            return None
        corrected = prepared.election.correct(piece.offset, mean=self.divides(piece.settings))
        if corrected is None:
            return None
        places, values = corrected
        return places, values.mul_(piece.settings.scaling).add_(piece.base.reshape(-1)[places])


def task_vector_parts(group: TensorGroup, index: int) -> Parts:
    """The task vector of expert `index`, flat, in parts of the size of pieces."""
    expert, base = group.stored_experts[index].reshape(-1), group.stored_base.reshape(-1)

    def make() -> Iterator[Tensor]:
        for one, other in zip(expert.split(group.piece_size), base.split(group.piece_size), strict=True):
            yield difference(one, other, group.dtype)

    return Parts(make, lambda places: difference(expert[places], base[places], group.dtype))
