"""What the methods that sparsify task vectors share: how the sparse task vectors are combined.

TIES, DARE, DELLA and Breadcrumbs differ in which entries of a task vector they keep. Then they either add what is left, or
elect a sign for every entry and average the experts that agree (TIES, arXiv 2306.01708).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..config import MergeConfig
from ..settings import setting
from .base import TensorGroup, TensorMethod
from .linear.method import normalizer
from .spherical import l1_norm


SparseVector = Callable[[int], Tensor]
"""The sparse task vector of expert i, a new tensor. It is asked for more than once and must be the same each time."""


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


class SparseMethod(TensorMethod):
    """θ_0 + λ · combination of sparse task vectors. A subclass says which entries stay, in [`~SparseMethod.sparsify`]."""

    requires_base = True
    changes_only = True

    def merge(self, group: TensorGroup) -> Tensor:
        settings = group.settings

        def sparse(index: int) -> Tensor:
            return self.sparsify(group, index)

        if settings.combination == "ties":
            positive = elect_positive(sparse, settings.weights, settings.majority_sign)
            merged = disjoint_merge(sparse, settings.weights, positive, mean=settings.normalize)
        else:
            merged = weighted_sum(sparse, settings.weights)
            if settings.normalize:
                merged.div_(normalizer(settings.weights, group.name))
        return merged.mul_(settings.scaling).add_(group.base)

    def sparsify(self, group: TensorGroup, index: int) -> Tensor:
        """The sparse task vector of expert `index`, a new tensor; the same for the same arguments."""
        raise NotImplementedError(f"{type(self).__name__} does not implement sparsify")


def weighted_sum(sparse: SparseVector, weights: Sequence[float]) -> Tensor:
    """Σ w_i τ̂_i, one expert at a time."""
    total = sparse(0).mul_(weights[0])
    for index in range(1, len(weights)):
        total.add_(sparse(index), alpha=weights[index])
    return total


def restore_norm(sparse: Tensor, norm: float) -> Tensor:
    """Scales a sparse task vector, in place, to the L1 norm that the whole one had; mergekit's rescaling of sparse task vectors.

    Args:
        sparse (`torch.Tensor`): What is left.
        norm (`float`): Σ |τ| before entries were dropped.
    """
    left = l1_norm(sparse)
    return sparse.mul_(norm / left) if left > 0.0 else sparse


def elect_positive(sparse: SparseVector, weights: Sequence[float], majority_sign: str) -> Tensor:
    """Where the elected sign is positive (bool): sgn(Σ w_i τ̂_i) for `"total"`, sgn(Σ sgn(w_i τ̂_i)) for `"frequency"`.

    An entry without a majority takes the sign that most entries of the parameter have, as in the authors' code.
    """
    if majority_sign == "frequency":
        total = sparse(0).mul_(weights[0]).sign_()
        for index in range(1, len(weights)):
            total += sparse(index).mul_(weights[index]).sign_()
    else:
        total = weighted_sum(sparse, weights)
    positive = total > 0
    most = 2 * int(torch.count_nonzero(positive)) >= int(torch.count_nonzero(total))
    return positive.logical_or_(total == 0) if most else positive


def disjoint_merge(sparse: SparseVector, weights: Sequence[float], positive: Tensor, *, mean: bool) -> Tensor:
    """Adds, entry by entry, the experts that agree with the elected sign: Σ w_i τ̂_i over those whose w_i τ̂_i has it.

    With `mean` the sum is divided by Σ |w_i| over the same experts (the disjoint mean of arXiv 2306.01708; the plain
    mean for equal weights). An entry where no expert agrees is 0.

    Args:
        sparse: The sparse task vectors.
        weights (`Sequence[float]`): w_i.
        positive (`torch.Tensor`): Where the elected sign is positive (bool).
        mean (`bool`): Whether to divide.
    """
    sign = torch.where(positive, 1.0, -1.0)
    merged: Tensor | float = 0.0
    mass: Tensor | float = 0.0
    for index, weight in enumerate(weights):
        agreeing = sparse(index).mul_(sign).mul_(weight).clamp_(min=0.0)  # 0 where the signs differ
        if mean:
            mass = (agreeing > 0).to(agreeing.dtype).mul_(abs(weight)).add_(mass)
        merged = agreeing.add_(merged)
    merged.mul_(sign)
    return merged.div_(mass.masked_fill_(mass == 0, 1.0)) if mean else merged
