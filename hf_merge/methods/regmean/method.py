"""RegMean: W = (Σ W_i G_i)(Σ G_i)⁻¹ with G_i = Σ x xᵀ over the tokens of task i (arXiv 2212.09849, eq. 2), and RegMean++."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...errors import NonFiniteError
from ..base import LINEAR_KINDS, ParameterKind, TensorGroup
from ..block_base import BlockGroup, BlockMethod
from .gram import EXPERT_KINDS, Gram, GramCollector


class RegMean(BlockMethod):
    """RegMean on the linear layers of the blocks, with the inputs that each expert sees in its own model."""

    reads_student = False

    def merge_block(self, block: BlockGroup) -> None:
        groups = {name: group for name, group in block.parameters.items() if group.kind in LINEAR_KINDS}
        grams = [self.grams_of(block, task, groups) for task in range(len(block))]
        for name, group in groups.items():
            known = [one.get(name) for one in grams]
            if all(gram is None for gram in known):
                continue  # no product with this weight was seen: it keeps the value of init
            block.assign(name, _merge(group, known))
            group.report["regmean_tokens"] = sum(float(gram.count.sum()) for gram in known if gram is not None)

    def grams_of(self, block: BlockGroup, task: int, groups: dict[str, TensorGroup]) -> dict[str, Gram]:
        """The Gram matrices of one task, by parameter."""
        collector = GramCollector(block.experts[task], groups)
        for index in range(block.activations.batches[task]):
            with collector.observing(block.activations.teacher(task, index)):
                block.activations.run_teacher(task, index)
        return collector.grams


class RegMeanPlusPlus(RegMean):
    """RegMean with the inputs that the already merged blocks produce, run through each expert's block (arXiv 2508.03121)."""

    reads_student = True
    reads_teachers = False

    def grams_of(self, block: BlockGroup, task: int, groups: dict[str, TensorGroup]) -> dict[str, Gram]:
        collector = GramCollector(block.experts[task], groups)
        for inputs in block.student_inputs(task):
            with collector.observing(inputs):
                block.activations.run(block.experts[task], inputs)
        return collector.grams


def _merge(group: TensorGroup, grams: Sequence[Gram | None]) -> Tensor:
    """One parameter: a linear layer, or the stacked ones of a mixture."""
    transposed = group.kind in (ParameterKind.TRANSPOSED_LINEAR, ParameterKind.TRANSPOSED_EXPERT_LINEAR)
    weights = [expert.mT if transposed else expert for expert in group.experts()]
    if group.kind in EXPERT_KINDS:
        merged = torch.stack([_merge_slice(group, weights, grams, index) for index in range(group.shape[0])])
    else:
        merged = _solve(group, weights, [None if g is None else (g.matrix, float(g.count)) for g in grams])
    return merged.mT if transposed else merged


def _merge_slice(group: TensorGroup, weights: Sequence[Tensor], grams: Sequence[Gram | None], index: int) -> Tensor:
    known = [None if gram is None else (gram.matrix[index], float(gram.count[index])) for gram in grams]
    return _solve(group, [weight[index] for weight in weights], known)


def _solve(group: TensorGroup, weights: Sequence[Tensor], grams: Sequence[tuple[Tensor, float] | None]) -> Tensor:
    """(Σ W_i G̃_i)(Σ G̃_i + ρ I)⁻¹, G̃_i = G_i with its off-diagonal entries scaled by alpha.  W_i: (out, in).

    The ridge pulls towards the mean of the experts, so that directions that no token has get it.
    """
    settings = group.settings
    mean = sum(weights) / len(weights)
    if not any(gram is not None and gram[1] > 0 for gram in grams):
        return mean
    width = mean.shape[1]
    total = torch.zeros(
        width, width, dtype=next(gram[0].dtype for gram in grams if gram is not None), device=mean.device
    )
    right = torch.zeros(mean.shape, dtype=total.dtype, device=mean.device)
    for weight, gram in zip(weights, grams, strict=True):
        if gram is None or gram[1] == 0:
            continue
        scaled = gram[0] * settings.alpha
        scaled.diagonal().copy_(gram[0].diagonal())
        if settings.normalize:
            scaled /= gram[1]
        total += scaled
        # Relative to the mean: what all experts share is exact, whatever the ridge does.
        right += (weight - mean).to(total.dtype) @ scaled
    diagonal = float(total.diagonal().mean())
    if not torch.isfinite(total).all():
        raise NonFiniteError(f"The inputs of '{group.name}' hold NaN or infinity for some calibration sample.")
    if diagonal == 0:
        return mean
    total.diagonal().add_(max(settings.ridge, 1e-12) * diagonal)
    factor = torch.linalg.cholesky(total)
    return mean + torch.cholesky_solve(right.mT, factor).mT.to(mean.dtype)
