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
        self._balance = 0.0
        self._undecided: _SparseEntries | None = None

    @property
    def most(self) -> float:
        """The sign of most entries of the pieces that were merged."""
        return 1.0 if self._balance >= 0 else -1.0

    def signs(self, vectors: Sequence[Tensor]) -> Tensor:
        """The elected signs: −1, 1, or 0 where there is no majority, in the dtype of the vectors."""
        if self.majority_sign == "total":
            return weighted_sum(vectors, self.weights).sign_().contiguous()
        return weighted_sum((vector.sign() for vector in vectors), map(np.sign, self.weights)).sign_().contiguous()

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
            if self._undecided is None:
                self._undecided = _SparseEntries(len(vectors), signs)
            self._undecided.put(offset, places, vectors)
        return _add_agreeing(vectors, signs, weights, mean)

    def agreeing(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        """The sparse task vectors of a whole parameter, 0 where their sign is not the elected one."""
        signs = self.signs(vectors)
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
        return places, _add_agreeing(vectors, torch.full_like(vectors[0], -1.0), weights, mean)


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


def _without_majority(signs: Tensor, vectors: Sequence[Tensor]) -> Tensor | None:
    """The places of entries that have no sign although not all vectors are 0 there: int64."""
    if len(vectors) == 1:
        return None
    if signs.device.type != "cpu":
        places = (sum(vector.abs() for vector in vectors) * (signs == 0)).reshape(-1).nonzero().squeeze(1)
        return places if len(places) else None
    # numpy compares several times as fast as torch
    heard = np.zeros(signs.numel(), dtype=bool)
    for vector in vectors:
        heard |= vector.numpy().reshape(-1) != 0
    heard &= signs.numpy().reshape(-1) == 0
    return torch.from_numpy(np.flatnonzero(heard)) if heard.any() else None


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


def masked(vector: Tensor, mask: Tensor) -> Tensor:
    """`vector` times a mask (bool), in place."""
    if vector.device.type != "cpu":
        return vector.mul_(mask)
    np.multiply(
        vector.numpy(), mask.numpy(), out=vector.numpy()
    )  # three times as fast as torch's product of two dtypes
    return vector
