"""DELLA-Merging: drop by magnitude rank (MAGPRUNE), elect, fuse (arXiv 2406.11617)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..base import ParameterKind, TensorGroup
from ..rows import as_rows, from_rows
from ..sparsify import SparseMethod, restore_norm
from ..spherical import l1_norm


_CHUNK = 1 << 22  # entries ranked at a time: ranks are int64, and an embedding's would not fit the memory law


class Della(SparseMethod):
    """m ~ Bernoulli(1 − p_j), τ̂ = m ⊙ τ / (1 − p_j), where p_j falls linearly with the rank of |τ_j| in its row."""

    def sparsify(self, group: TensorGroup, index: int) -> Tensor:
        settings = group.settings
        density = settings.density[index]
        if density in (0.0, 1.0):
            return group.task_vector(index).mul_(density)
        vector = group.task_vector(index)
        keep = keep_probabilities(vector, group.kind, density, settings.epsilon[index])
        norm = l1_norm(vector) if settings.rescale == "norm" else 0.0
        vector.mul_(group.keep_mask(index, keep))
        if settings.rescale == "norm":
            return restore_norm(vector, norm)
        if settings.rescale == "probability":
            vector.div_(keep.clamp_(min=torch.finfo(keep.dtype).tiny))
        return vector


def keep_probabilities(vector: Tensor, kind: ParameterKind, density: float, epsilon: float) -> Tensor:
    """1 − p_j for every entry: from density − ε/2 for the smallest magnitude of a row to density + ε/2 for the largest.

    A row is what one output unit reads, a convolution's whole filter; a vector is one row. A row of one entry is kept with the
    density itself.

    Args:
        vector (`torch.Tensor`): A task vector of any shape.
        kind ([`ParameterKind`]): What the parameter is, which decides what its rows are.
        density (`float`): The mean, in (0, 1).
        epsilon (`float`): The width ε of the range.

    Returns:
        `torch.Tensor`: In the shape and dtype of `vector`.
    """
    rows = as_rows(vector, kind)
    width = rows.shape[1]
    if width < 2:
        return torch.full_like(vector, density)
    half = min(epsilon / 2, density, 1 - density)
    ramp = torch.linspace(density - half, density + half, width, dtype=vector.dtype, device=vector.device)
    probabilities = torch.empty(rows.shape, dtype=rows.dtype, device=rows.device)
    step = max(1, _CHUNK // width)
    for part, source in zip(probabilities.split(step), rows.split(step), strict=True):
        order = source.abs().argsort(dim=1, stable=True)
        part.scatter_(1, order, ramp.expand_as(part))
    return from_rows(probabilities, vector, kind)
