"""RegMean: W = (Σ W_i G_i)(Σ G_i)⁻¹ with G_i = Σ x xᵀ over the tokens of task i (arXiv 2212.09849, eq. 2), and RegMean++."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ...errors import NonFiniteError
from ..base import FLOAT32, LINEAR_KINDS, ParameterKind, TensorGroup
from ..block_base import BlockGroup, BlockMethod
from ..linalg import solve_symmetric
from .fitting import fit_layers
from .gram import Gram, GramCollector, all_reduce_grams
from .products import EXPERT_KINDS


Known = tuple[Tensor, float] | None
"""The Gram matrix of one linear layer and its number of tokens; `None` where the layer was not seen."""

Solve = Callable[[TensorGroup, Sequence[Tensor], Sequence[Known], Tensor], Tensor]
"""Merges one linear layer: `(group, weights of the experts, Gram matrices, start)`."""


class RegMean(BlockMethod):
    """RegMean on the linear layers of the blocks, with the inputs that each expert sees in its own model."""

    reads_student = False

    @classmethod
    def working_memory(cls, shapes: Mapping[str, Sequence[int]], experts: int, settings: Any) -> int:
        square = [shape[-1] ** 2 * math.prod(shape[:-2]) for shape in shapes.values() if len(shape) > 1]
        # Gram matrices of all tasks in float64; of one layer their sum, its factor and a scaled one.
        grams = 2 * FLOAT32 * (experts * sum(square) + 3 * max(square, default=0))
        return grams + super().working_memory(shapes, experts, settings)

    @classmethod
    def divides_samples(cls, settings: Any) -> bool:
        return True

    def merge_block(self, block: BlockGroup) -> None:
        groups = {name: group for name, group in block.parameters.items() if group.kind in LINEAR_KINDS}
        grams = [self.grams_of(block, task, groups) for task in range(len(block))]
        for name, group in groups.items():
            known = [one.get(name) for one in grams]
            if all(gram is None for gram in known):
                continue  # no product with this weight was seen: it keeps the value of init
            start = block.student.get_parameter(name).detach()
            block.assign(name, merge_layer(group, known, start, self.solve))
            group.report["regmean_tokens"] = sum(float(gram.count.sum()) for gram in known if gram is not None)

    def solve(self, group: TensorGroup, weights: Sequence[Tensor], grams: Sequence[Known], start: Tensor) -> Tensor:
        """The merged weight of one linear layer, (out, in), from the experts' and the value that `init` gives."""
        return solve_closed(group, weights, grams, start)

    def grams_of(self, block: BlockGroup, task: int, groups: dict[str, TensorGroup]) -> dict[str, Gram]:
        """The Gram matrices of one task, by parameter."""
        collector = GramCollector(block.experts[task], groups)
        for index in block.activations.held(task):
            with collector.observing(block.activations.teacher(task, index)):
                block.activations.run_teacher(task, index)
        return all_reduce_grams(block, collector.grams)


class RegMeanPlusPlus(RegMean):
    """RegMean with the inputs that the already merged blocks produce (arXiv 2508.03121)."""

    reads_student = True

    def merge_block(self, block: BlockGroup) -> None:
        fitted = fit_layers(block) if block.settings.targets == "own" else []
        left = {name: group for name, group in block.parameters.items() if name not in fitted}
        super().merge_block(replace(block, parameters=left))

    def grams_of(self, block: BlockGroup, task: int, groups: dict[str, TensorGroup]) -> dict[str, Gram]:
        collector = GramCollector(block.experts[task], groups)
        for inputs in block.student_inputs(task) if groups else ():
            with collector.observing(inputs):
                block.activations.run(block.experts[task], inputs)
        return all_reduce_grams(block, collector.grams)


def merge_layer(group: TensorGroup, grams: Sequence[Gram | None], start: Tensor, solve: Solve) -> Tensor:
    """One parameter: a linear layer, or the stacked ones of a mixture.

    Args:
        group ([`TensorGroup`]): The parameter.
        grams (`Sequence[Gram]`): Of each task; `None` where no product with the weight was seen.
        start (`torch.Tensor`): The value that `init` gives.
        solve (`Callable`): Merges one linear layer.
    """
    transposed = group.kind in (ParameterKind.TRANSPOSED_LINEAR, ParameterKind.TRANSPOSED_EXPERT_LINEAR)
    weights = [expert.mT if transposed else expert for expert in group.experts()]
    start = start.mT if transposed else start
    if group.kind not in EXPERT_KINDS:
        merged = solve(group, weights, [None if g is None else (g.matrix, float(g.count)) for g in grams], start)
    else:
        merged = torch.stack(
            [
                solve(group, [weight[index] for weight in weights], _known(grams, index), start[index])
                for index in range(group.shape[0])
            ]
        )
    return merged.mT if transposed else merged


def _known(grams: Sequence[Gram | None], index: int) -> list[Known]:
    return [None if gram is None else (gram.matrix[index], float(gram.count[index])) for gram in grams]


def normal_equations(
    group: TensorGroup, weights: Sequence[Tensor], grams: Sequence[Known], center: Tensor
) -> tuple[Tensor, Tensor] | None:
    """A = Σ G̃_i and B = Σ (W_i − C) G̃_i, G̃_i = G_i with its off-diagonal entries scaled by alpha: the merged weight is C + B A⁻¹.

    Args:
        group ([`TensorGroup`]): Its settings are a [`RegMeanConfig`].
        weights (`Sequence[torch.Tensor]`): W_i, (out, in).
        grams (`Sequence`): `(G_i, number of tokens)` of each task.
        center (`torch.Tensor`): C, (out, in). What all experts share with it is exact, however A is solved.

    Returns:
        `tuple` or `None`: A (in, in) and B (out, in), float64 where the device has it; `None` when there is no token.
    """
    settings = group.settings
    seen = [(weight, *gram) for weight, gram in zip(weights, grams, strict=True) if gram is not None and gram[1] > 0]
    if not seen:
        return None
    total = torch.zeros_like(seen[0][1])
    right = torch.zeros(center.shape, dtype=total.dtype, device=total.device)
    for weight, matrix, count in seen:
        scaled = matrix * settings.alpha
        scaled.diagonal().copy_(matrix.diagonal())
        if settings.normalize:
            scaled /= count
        total += scaled
        right += (weight - center).to(total.dtype) @ scaled
    if not torch.isfinite(total).all():
        raise NonFiniteError(f"The inputs of '{group.name}' hold NaN or infinity for some calibration sample.")
    return total, right


def solve_closed(group: TensorGroup, weights: Sequence[Tensor], grams: Sequence[Known], start: Tensor) -> Tensor:
    """(Σ W_i G̃_i + ρ W)(Σ G̃_i + ρ I)⁻¹ by Cholesky.  W_i, W: (out, in).

    The ridge pulls towards the start W, so that directions that no token has keep it.
    """
    system = normal_equations(group, weights, grams, start)
    if system is None:
        return start
    total, right = system
    diagonal = float(total.diagonal().mean())
    if diagonal == 0:
        return start
    total.diagonal().add_(max(group.settings.ridge, 1e-12) * diagonal)
    return start + solve_symmetric(total, right.mT).mT.to(start.dtype)
