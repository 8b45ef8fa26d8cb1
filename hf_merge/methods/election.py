"""The election of a sign for every entry (TIES, arXiv 2306.01708), and sums of task vectors."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor


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
        self._balance = 0
        self._undecided: _SparseEntries | None = None

    @property
    def most(self) -> float:
        """The sign of most entries of the pieces that were merged."""
        return 1.0 if self._balance >= 0 else -1.0

    def votes(self, vectors: Sequence[Tensor]) -> Tensor:
        """What has the elected signs, and is 0 where there is no majority, in the dtype of the vectors."""
        if self.majority_sign == "total":
            weights = [1.0] * len(vectors) if _common(self.weights) else self.weights
            return weighted_sum(vectors, weights).contiguous()
        return weighted_sum((vector.sign() for vector in vectors), map(np.sign, self.weights)).contiguous()

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
        votes = self.votes(vectors)
        self._balance += _balance(votes)
        places = _without_majority(votes, vectors)
        if places is not None:
            if self._undecided is None:
                self._undecided = _SparseEntries(len(vectors), votes)
            self._undecided.put(offset, places, vectors)
        return _add_agreeing(vectors, _sign_bits(votes), weights, mean)

    def agreeing(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        """The sparse task vectors of a whole parameter, 0 where their sign is not the elected one."""
        signs = self.votes(vectors).sign_()
        signs[signs == 0] = 1.0 if signs.sum() >= 0 else -1.0
        return [masked(vector, vector * signs > 0) for vector in vectors]

    def correct(
        self, offset: int, weights: Sequence[float] | None = None, *, mean: bool
    ) -> tuple[Tensor, Tensor] | None:
        """The places and merged values of the entries of a piece that had no majority, where they are not positive."""
        if self.most > 0 or self._undecided is None or offset not in self._undecided.spans:
            return None
        places, vectors = self._undecided.get(offset)
        weights = self.weights if weights is None else weights
        return places, _add_agreeing(vectors, _sign_bits(torch.full_like(vectors[0], -1.0)), weights, mean)


class _SparseEntries:
    """Single entries of several tensors, by the piece that they are in. They lie in two growing buffers: thousands of small tensors that
    stay, made between large ones that go, would leave holes in the memory that no large one fits.

    Args:
        count (`int`): The number of tensors.
        like (`torch.Tensor`): Of their dtype and device.
    """

    def __init__(self, count: int, like: Tensor):
        self.spans: dict[int, slice] = {}
        self._end = 0
        self._places = torch.empty(0, dtype=torch.int64, device=like.device)
        self._values = like.new_empty(count, 0)

    def put(self, piece: int, places: Tensor, tensors: Sequence[Tensor]) -> None:
        """Keeps the entries of flat or other tensors at flat places."""
        span = self.spans[piece] = slice(self._end, self._end + len(places))
        self._end = span.stop
        room = len(self._places)
        if span.stop > room:
            more = max(span.stop, 2 * room, 1 << 16) - room
            self._places = torch.cat([self._places, self._places.new_empty(more)])
            self._values = torch.cat([self._values, self._values.new_empty(len(self._values), more)], dim=1)
        self._places[span] = places
        for row, tensor in zip(self._values, tensors, strict=True):
            torch.index_select(tensor.reshape(-1), 0, places, out=row[span])

    def get(self, piece: int) -> tuple[Tensor, list[Tensor]]:
        """The places, and the entries of every tensor."""
        span = self.spans[piece]
        return self._places[span], [row[span] for row in self._values]


def _without_majority(votes: Tensor, vectors: Sequence[Tensor]) -> Tensor | None:
    """The places of entries that have no sign although not all vectors are 0 there: int64."""
    if len(vectors) == 1:
        return None
    if votes.device.type != "cpu":
        places = (sum(vector.abs() for vector in vectors) * (votes == 0)).reshape(-1).nonzero().squeeze(1)
        return places if len(places) else None
    tied = votes.numpy().reshape(-1) == 0
    heard = np.zeros(votes.numel(), dtype=bool)
    # Where all but one are 0 there is a sign, or the last one is 0, too.
    for vector in vectors[1:]:
        heard |= vector.numpy().reshape(-1) != 0
    heard &= tied
    return torch.from_numpy(np.flatnonzero(heard)) if heard.any() else None


def _balance(votes: Tensor) -> int:
    """How many more votes are positive than negative."""
    if votes.device.type != "cpu":
        return int(torch.count_nonzero(votes > 0)) - int(torch.count_nonzero(votes < 0))
    # numpy compares several times as fast as torch
    return int(np.count_nonzero(votes.numpy() > 0)) - int(np.count_nonzero(votes.numpy() < 0))


def _sign_bits(values: Tensor) -> Tensor:
    """The sign bits of floats, as integers of their size, the other bits 0. XOR with them multiplies by the sign, at half the cost."""
    integers = torch.int64 if values.dtype == torch.float64 else torch.int32
    return values.view(integers) & torch.iinfo(integers).min


def _flipped(values: Tensor, signs: Tensor) -> Tensor:
    return (values.contiguous().view(signs.dtype) ^ signs).view(values.dtype)


def _common(weights: Sequence[float]) -> float | None:
    """The weight that all have, if it is positive."""
    return weights[0] if weights[0] > 0 and all(weight == weights[0] for weight in weights) else None


def _add_agreeing(vectors: Sequence[Tensor], signs: Tensor, weights: Sequence[float], mean: bool) -> Tensor:
    common = _common(weights)
    if common is not None and common != 1.0:  # once for all
        merged = _add_agreeing(vectors, signs, [1.0] * len(weights), mean)
        return merged if mean else merged.mul_(common)
    merged: Tensor | None = None
    mass = _Mass(weights, vectors[0]) if mean else None
    for vector, weight in zip(vectors, weights, strict=True):
        agreeing = _flipped(vector, signs)
        if weight != 1.0:
            agreeing.mul_(weight)
        agreeing.clamp_(min=0.0)  # 0 where the signs differ
        if mass is not None:
            mass.add(agreeing, weight)
        merged = agreeing if merged is None else merged.add_(agreeing)
    merged.view(signs.dtype).bitwise_xor_(signs)
    return merged if mass is None else mass.divide(merged)


class _Mass:
    """Σ |w_i| over the experts that agree, entry by entry; a number of experts where all weigh the same.

    Args:
        weights (`Sequence[float]`): w_i.
        like (`torch.Tensor`): Of the shape, dtype and device of the result.
    """

    def __init__(self, weights: Sequence[float], like: Tensor):
        self._is_number = like.device.type == "cpu" and len(weights) < 256 and len(set(map(abs, weights))) == 1
        self._each = abs(weights[0]) if self._is_number else 1.0
        self._mass = torch.zeros(like.shape, dtype=torch.uint8) if self._is_number else torch.zeros_like(like)

    def add(self, agreeing: Tensor, weight: float) -> None:
        """Adds an expert, given positive entries where it agrees and 0 elsewhere."""
        if self._is_number:
            mass = self._mass.numpy()
            np.add(mass, (agreeing.numpy() > 0).view(np.uint8), out=mass)
        else:
            self._mass.add_(agreeing.sign(), alpha=abs(weight))

    def divide(self, total: Tensor) -> Tensor:
        """`total` divided by it, in place; what nobody agrees with is 0."""
        mass = self._mass.to(total.dtype)
        if self._each != 1.0:
            mass.mul_(self._each)
        return total.div_(mass.clamp_(min=torch.finfo(mass.dtype).tiny))


def weighted_sum(vectors: Iterable[Tensor], weights: Iterable[float]) -> Tensor:
    """Σ w_i τ̂_i as a new tensor, one expert at a time."""
    total: Tensor | None = None
    for vector, weight in zip(vectors, weights, strict=True):
        total = vector * weight if total is None else total.add_(vector, alpha=weight)
    return total


def masked(vector: Tensor, mask: Tensor) -> Tensor:
    """`vector` times a mask (bool), in place."""
    if vector.device.type != "cpu":
        return vector.mul_(mask)
    np.multiply(
        vector.numpy(), mask.numpy(), out=vector.numpy()
    )  # three times as fast as torch's product of two dtypes
    return vector
