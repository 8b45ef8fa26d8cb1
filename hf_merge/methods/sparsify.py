"""What the methods that sparsify task vectors share: how the sparse task vectors are combined.

TIES, DARE, DELLA and Breadcrumbs differ in which entries of a task vector they keep. Then they either add what is left, or
elect a sign for every entry and average the experts that agree (TIES, arXiv 2306.01708).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..config import MergeConfig
from ..settings import setting
from .base import ElementwiseMethod, TensorGroup
from .linear.method import normalizer
from .selection import Parts
from .spherical import l1_norm


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
class Sparsity:
    """What is known of the task vectors of one parameter.

    Args:
        marks (`list`): Per expert, what [`~SparseMethod.mark`] found.
        factors (`list[float]`, *optional*): Per expert, what its sparse task vector is multiplied with.
        election ([`Election`], *optional*): Where signs are elected.
    """

    marks: list[Any]
    factors: list[float] | None
    election: Election | None


class SparseMethod(ElementwiseMethod):
    """θ_0 + λ · combination of sparse task vectors. A subclass says which entries stay, in [`~SparseMethod.sparsify`]."""

    requires_base = True
    changes_only = True

    def mark(self, group: TensorGroup, index: int) -> Any:
        """What [`~SparseMethod.sparsify`] has to know of the whole task vector of expert `index`."""
        return None

    def sparsify(self, piece: TensorGroup, index: int, mark: Any) -> Tensor:
        """The sparse task vector of expert `index` in a piece, a new tensor; the same for the same arguments."""
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
        factors = None
        if settings.rescale == "norm":
            factors = [self._restoring_factor(group, index, mark) for index, mark in enumerate(marks)]
        by_sign = self.combines_by_sign(settings)
        return Sparsity(marks, factors, Election(settings.weights, settings.majority_sign) if by_sign else None)

    def _restoring_factor(self, group: TensorGroup, index: int, mark: Any) -> float:
        """What gives the sparse task vector the L1 norm that the whole one has; mergekit's rescaling."""
        whole = left = 0.0
        for piece in group.pieces(self.unit(group)):
            whole += l1_norm(piece.task_vector(index))
            left += l1_norm(self.sparsify(piece, index, mark))
        return whole / left if left > 0.0 else 1.0

    def sparse_vectors(self, piece: TensorGroup, sparsity: Sparsity) -> list[Tensor]:
        """The sparse task vectors of all experts in a piece, as they are combined."""
        vectors = [self.sparsify(piece, index, mark) for index, mark in enumerate(sparsity.marks)]
        if sparsity.factors is not None:
            for vector, factor in zip(vectors, sparsity.factors, strict=True):
                vector.mul_(factor)
        return vectors

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


class Election:
    """TIES' election of a sign for every entry, and the merge of the experts that agree with it (arXiv 2306.01708).

    The sign is sgn(Σ w_i τ̂_i) for `"total"`, sgn(Σ sgn(w_i τ̂_i)) for `"frequency"`. An entry without a majority takes the sign
    that most entries of the parameter have, as in the authors' code: it is known when all pieces have been seen. Until then such an
    entry is merged as positive; what it is as negative is kept.

    Args:
        weights (`Sequence[float]`): w_i.
        majority_sign (`str`): `"total"` or `"frequency"`.
    """

    def __init__(self, weights: Sequence[float], majority_sign: str):
        self.weights = weights
        self.majority_sign = majority_sign
        self._balance = 0.0
        self._undecided: dict[int, tuple[slice, Sequence[float]]] = {}
        self._entries = _Entries()

    @property
    def most(self) -> float:
        """The sign of most entries of the pieces that were merged."""
        return 1.0 if self._balance >= 0 else -1.0

    def signs(self, vectors: Sequence[Tensor]) -> Tensor:
        """The elected signs: −1, 1, or 0 where there is no majority, in the dtype of the vectors."""
        if self.majority_sign == "total":
            return weighted_sum(vectors, self.weights).sign_()
        return weighted_sum((vector.sign() for vector in vectors), map(np.sign, self.weights)).sign_()

    def merge(
        self, vectors: Sequence[Tensor], offset: int = 0, weights: Sequence[float] | None = None, *, mean: bool
    ) -> Tensor:
        """Adds, entry by entry, the experts that agree with the elected sign: Σ w_i τ̂_i over those whose w_i τ̂_i has it.

        With `mean` the sum is divided by Σ |w_i| over the same experts (the disjoint mean of arXiv 2306.01708; the plain
        mean for equal weights). An entry where no expert agrees is 0.

        Args:
            vectors (`Sequence[torch.Tensor]`): The sparse task vectors.
            offset (`int`): Which piece this is.
            weights (`Sequence[float]`, *optional*): w_i of the sum; those of the election when not given.
            mean (`bool`): Whether to divide.
        """
        weights = self.weights if weights is None else weights
        signs = self.signs(vectors)
        self._balance += float(signs.sum())
        places = _without_majority(signs, vectors)
        if places is not None:
            signs.view(-1)[places] = 1.0
            kept = self._entries.add(places, [vector.reshape(-1)[places] for vector in vectors])
            self._undecided[offset] = kept, weights
        return _add_agreeing(vectors, signs, weights, mean)

    def agreeing(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        """The sparse task vectors of a whole parameter, 0 where their sign is not the elected one."""
        signs = self.signs(vectors)
        signs[signs == 0] = 1.0 if signs.sum() >= 0 else -1.0
        return [masked(vector, vector * signs > 0) for vector in vectors]

    def correct(self, offset: int, *, mean: bool) -> tuple[Tensor, Tensor] | None:
        """The places and merged values of the entries of a piece that had no majority, where they are not positive."""
        undecided = self._undecided.pop(offset, None)
        if undecided is None or self.most > 0:
            return None
        kept, weights = undecided
        places, vectors = self._entries.get(kept)
        return places, _add_agreeing(vectors, torch.full_like(vectors[0], -1.0), weights, mean)


class _Entries:
    """Places and values of entries of many pieces, in two buffers that grow. As many small tensors that stay they would lie in between
    the pieces that come and go, whose memory could then not be used again."""

    def __init__(self) -> None:
        self._size = 0
        self._places: Tensor | None = None
        self._values: Tensor | None = None

    def add(self, places: Tensor, vectors: Sequence[Tensor]) -> slice:
        """Keeps the places (int64) and the values of each vector there. Returns where they are."""
        kept = slice(self._size, self._size + len(places))
        if self._places is None or kept.stop > len(self._places):
            self._grow(2 * kept.stop, places, vectors)
        self._places[kept] = places
        for row, vector in zip(self._values, vectors, strict=True):
            row[kept] = vector
        self._size = kept.stop
        return kept

    def _grow(self, capacity: int, places: Tensor, vectors: Sequence[Tensor]) -> None:
        grown = places.new_empty(capacity), vectors[0].new_empty(len(vectors), capacity)
        if self._places is not None:
            grown[0][: self._size] = self._places[: self._size]
            grown[1][:, : self._size] = self._values[:, : self._size]
        self._places, self._values = grown

    def get(self, kept: slice) -> tuple[Tensor, list[Tensor]]:
        """The places and the values of each vector."""
        return self._places[kept], list(self._values[:, kept])


def _without_majority(signs: Tensor, vectors: Sequence[Tensor]) -> Tensor | None:
    """The places of entries that have no sign although not all vectors are 0 there: int64."""
    if len(vectors) == 1:
        return None
    silent = torch.rsub(signs.abs(), 1.0).reshape(-1)
    if not any(bool(torch.dot(vector.reshape(-1).abs(), silent) > 0) for vector in vectors):
        return None
    magnitudes = sum(vector.abs() for vector in vectors)
    return magnitudes.reshape(-1).mul_(silent).nonzero().squeeze(1)


def _add_agreeing(vectors: Sequence[Tensor], signs: Tensor, weights: Sequence[float], mean: bool) -> Tensor:
    merged, mass = torch.zeros_like(signs), torch.zeros_like(signs)
    for vector, weight in zip(vectors, weights, strict=True):
        agreeing = torch.mul(vector, signs)
        if weight != 1.0:
            agreeing.mul_(weight)
        merged += agreeing.clamp_(min=0.0)  # 0 where the signs differ
        if mean:
            mass.add_(agreeing.sign_(), alpha=abs(weight))
    merged.mul_(signs)
    return merged.div_(mass.clamp_(min=torch.finfo(mass.dtype).tiny)) if mean else merged


def weighted_sum(vectors: Iterable[Tensor], weights: Iterable[float]) -> Tensor:
    """Σ w_i τ̂_i as a new tensor, one expert at a time."""
    total: Tensor | None = None
    for vector, weight in zip(vectors, weights, strict=True):
        total = vector * weight if total is None else total.add_(vector, alpha=weight)
    return total


def task_vector_parts(group: TensorGroup, index: int) -> Parts:
    """The task vector of expert `index` in parts."""
    return lambda: (piece.task_vector(index) for piece in group.pieces())


def masked(vector: Tensor, mask: Tensor) -> Tensor:
    """`vector` times a mask (bool), in place."""
    if vector.device.type != "cpu":
        return vector.mul_(mask)
    np.multiply(
        vector.numpy(), mask.numpy(), out=vector.numpy()
    )  # three times as fast as torch's product of two dtypes
    return vector
