"""Least squares of one linear layer of the merged model to what the experts' layers give on their own inputs.

The merged layer reads x, made by the merged model; the expert's layer reads x_i and gives y_i, on the same token. Wanted is
argmin_W Σ_i Σ ‖W x + b − y_i‖². RegMean++ has W_i x in the place of y_i, which follows the merged model where it has gone astray.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..base import LINEAR_KINDS, ParameterKind, TensorGroup
from ..block_base import BlockGroup, BlockInputs
from ..linalg import solve_symmetric, sum_dtype
from .products import EXPERT_KINDS, Product, ProductWatcher


@dataclass
class _Moments:
    """Σ x xᵀ and Σ (y_i − y) xᵀ over the tokens of a task, y being what the merged layer gives now."""

    gram: Tensor
    residual: Tensor
    count: int = 0


def fit_layers(block: BlockGroup) -> list[str]:
    """Fits the linear layers of a block one after another, in the order in which they are called; layers that read the same
    tensor are fitted together. Returns the names of those that were fitted. Mixtures are left out: the merged model's routing
    differs from the experts', so that their tokens do not correspond."""
    groups = {
        name: group
        for name, group in block.parameters.items()
        if group.kind in LINEAR_KINDS and group.kind not in EXPERT_KINDS
    }
    stages = _stages(block, groups)
    for stage in stages:
        chosen = {name: groups[name] for name in stage}
        moments = [_moments_of_task(block, task, chosen) for task in range(len(block))]
        for name, group in chosen.items():
            known = [one[name] for one in moments if name in one]
            transposed = group.kind is ParameterKind.TRANSPOSED_LINEAR
            change = _solve(group, known)
            block.assign(name, block.student.get_parameter(name) + (change.mT if transposed else change))
            group.report["fitted_tokens"] = sum(one.count for one in known)
    return [name for stage in stages for name in stage]


def _stages(block: BlockGroup, groups: Mapping[str, TensorGroup]) -> list[list[str]]:
    """The layers in the order of their calls; consecutive ones that read the same memory are one stage. A process without samples
    learns them from another one."""
    inputs = next((one for task in range(len(block)) for one in block.student_inputs(task)), None)
    found = [] if inputs is None else _stages_of(block, groups, inputs)
    return next((stages for stages in block.activations.gather(found) if stages), [])


def _stages_of(block: BlockGroup, groups: Mapping[str, TensorGroup], inputs: BlockInputs) -> list[list[str]]:
    calls: dict[str, tuple[int, torch.Size]] = {}

    def see(product: Product) -> None:
        calls.setdefault(product.name, (product.inputs.data_ptr(), product.inputs.shape))

    kept = []  # inputs are kept alive, so that equal addresses mean equal tensors
    with ProductWatcher(block.student, groups, lambda product: (kept.append(product.inputs), see(product))):
        block.activations.run(block.student, inputs)
    stages: list[list[str]] = []
    last = None
    for name, source in calls.items():
        if source == last:
            stages[-1].append(name)
        else:
            stages.append([name])
        last = source
    return stages


def _moments_of_task(block: BlockGroup, task: int, groups: Mapping[str, TensorGroup]) -> dict[str, _Moments]:
    moments: dict[str, _Moments] = {}
    for inputs in block.student_inputs(task):
        teacher = block.activations.teacher(task, inputs.index)
        theirs = _products(block, block.experts[task], teacher, groups)
        ours = _products(block, block.student, inputs, groups)
        for name in ours.keys() & theirs.keys():
            rows = inputs.masked(ours[name].inputs).float()
            error = teacher.masked(theirs[name].outputs).float() - inputs.masked(ours[name].outputs).float()
            if name not in moments:
                dtype = sum_dtype(rows)
                gram = torch.zeros(rows.shape[1], rows.shape[1], dtype=dtype, device=rows.device)
                residual = torch.zeros(error.shape[1], rows.shape[1], dtype=dtype, device=rows.device)
                moments[name] = _Moments(gram, residual)
            one = moments[name]
            one.gram += rows.mT @ rows
            one.residual += error.mT @ rows
            one.count += rows.shape[0]
    return _all_reduce(block, moments)


def _all_reduce(block: BlockGroup, moments: Mapping[str, _Moments]) -> dict[str, _Moments]:
    """The sums over the processes that hold the samples."""
    grams = block.activations.all_reduce({name: one.gram for name, one in moments.items()})
    residuals = block.activations.all_reduce({name: one.residual for name, one in moments.items()})
    counts = block.activations.all_reduce({name: torch.tensor(one.count) for name, one in moments.items()})
    return {name: _Moments(grams[name], residuals[name], int(counts[name])) for name in grams}


def _products(block: BlockGroup, module, inputs: BlockInputs, groups: Mapping[str, TensorGroup]) -> dict[str, Product]:
    seen: dict[str, Product] = {}
    with ProductWatcher(module, groups, lambda product: seen.setdefault(product.name, product)):
        block.activations.run(module, inputs)
    return seen


def _solve(group: TensorGroup, moments: Sequence[_Moments]) -> Tensor:
    """The change of W, (Σ R_i)(Σ G̃_i + ρ I)⁻¹ as (out, in). The ridge pulls towards the value that the layer has."""
    settings = group.settings
    gram, residual = torch.zeros_like(moments[0].gram), torch.zeros_like(moments[0].residual)
    for one in moments:
        weight = 1 / one.count if settings.normalize else 1.0
        scaled = one.gram * settings.alpha
        scaled.diagonal().copy_(one.gram.diagonal())
        gram.add_(scaled, alpha=weight)
        residual.add_(one.residual, alpha=weight)
    diagonal = float(gram.diagonal().mean())
    if diagonal == 0:
        return torch.zeros_like(residual).float()
    gram.diagonal().add_(max(settings.ridge, 1e-12) * diagonal)
    return solve_symmetric(gram, residual.mT).mT.float()
