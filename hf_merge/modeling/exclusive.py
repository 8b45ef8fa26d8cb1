"""What tasks add to the layers of a shared model: kept apart, and mixed for each sample while the model runs.

A layer of the shared model gives y; with parts v_t of its weights and the weights w_bt of the tasks for sample b, it gives
y_b + Σ_t w_bt Δ_t(x_b), where Δ_t is the layer with v_t in the place of its weights. That is what the layer of θ* + Σ_t w_bt v_t gives: the
weights of no sample are ever formed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..errors import UnsupportedModelError
from ..low_rank import Factors


Part = Factors | Tensor
"""A task's addition to one parameter: a matrix of small rank, or a value of the parameter's shape."""

_MATRICES = (nn.Linear, Conv1D, nn.Embedding)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def takes_part(module: nn.Module, leaf: str) -> bool:
    """Whether a parameter can have parts: the layer is linear in it. Subclasses may compute something else, and have none."""
    return type(module) in (*_MATRICES, *_CONVOLUTIONS, nn.LayerNorm) and leaf in ("weight", "bias")


def is_matrix(module: nn.Module, leaf: str) -> bool:
    """Whether parts of a parameter are kept at a small rank."""
    return type(module) in _MATRICES and leaf == "weight"


def dense(part: Part) -> Tensor:
    """The part as a value of the parameter's shape."""
    return part.dense() if isinstance(part, Factors) else part


class LayerParts(nn.Module):
    """The parts of one layer.

    Args:
        weights (`Sequence`): For each task the part of the weight, or `None`.
        biases (`Sequence`): For each task the part of the bias, or `None`.
    """

    def __init__(self, weights: Sequence[Part | None], biases: Sequence[Tensor | None]):
        super().__init__()
        self.tasks = len(weights)
        for task, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
            is_product = isinstance(weight, Factors)
            self.register_buffer(f"left_{task}", weight.left if is_product else None)
            self.register_buffer(f"right_{task}", weight.right if is_product else None)
            self.register_buffer(f"weight_{task}", None if is_product else weight)
            self.register_buffer(f"bias_{task}", bias)

    def change(self, layer: nn.Module, inputs: Tensor, weights: Tensor) -> Tensor:
        """Σ_t w_bt Δ_t(x_b).

        Args:
            layer (`torch.nn.Module`): The layer.
            inputs (`torch.Tensor`): x, what the layer reads; samples first.
            weights (`torch.Tensor`): w, (samples, tasks).
        """
        total: Tensor | float = 0.0
        for task in range(self.tasks):
            one = self._of_task(layer, inputs, task)
            if one is not None:
                total = total + _spread(weights[:, task], inputs, one) * one
        return total

    def _of_task(self, layer: nn.Module, inputs: Tensor, task: int) -> Tensor | None:
        """Δ_t(x)."""
        left, right, weight, bias = (getattr(self, f"{name}_{task}") for name in ("left", "right", "weight", "bias"))
        if type(layer) in _CONVOLUTIONS:
            weight = torch.zeros_like(layer.weight) if weight is None else weight.to(inputs)
            return layer._conv_forward(inputs, weight, None if bias is None else bias.to(inputs))
        if type(layer) is nn.Embedding:
            return None if left is None else nn.functional.embedding(inputs, left) @ right
        one = None
        if type(layer) is nn.LayerNorm and weight is not None:
            one = nn.functional.layer_norm(inputs, layer.normalized_shape, weight.to(inputs), None, layer.eps)
        elif left is not None:
            left, right = left.to(inputs), right.to(inputs)
            one = inputs @ left @ right if type(layer) is Conv1D else inputs @ right.mT @ left.mT
        if bias is None:
            return one
        return bias.to(inputs) if one is None else one + bias.to(inputs)


def _spread(weights: Tensor, inputs: Tensor, change: Tensor) -> Tensor:
    """The weight of every sample where it meets what the layer gives for it.

    Layers that see samples cut into windows, or tokens in one row, see those of a sample one after another; positions are the same
    for all samples.
    """
    rows, samples = 1 if inputs.dim() == 1 else inputs.shape[0], len(weights)
    if rows % samples and rows != 1:
        raise UnsupportedModelError(
            f"A layer reads {rows} rows for {samples} samples, so that its inputs cannot be told apart by sample: load the model with "
            "task=..., or run samples one by one."
        )
    if rows != 1:
        weights = weights.repeat_interleave(rows // samples)
    dimensions = change.dim() + 1 if inputs.dim() == 1 else change.dim()
    return weights.to(change.dtype).view(-1, *[1] * (dimensions - 1))


def by_layer(parts: Sequence[Mapping[str, Part]]) -> dict[str, LayerParts]:
    """The parts of every layer, by its module name.

    Args:
        parts (`Sequence[Mapping]`): For each task, the parts by parameter.
    """
    paths = dict.fromkeys(name.rpartition(".")[0] for one in parts for name in one)
    return {
        path: LayerParts([one.get(f"{path}.weight") for one in parts], [one.get(f"{path}.bias") for one in parts])
        for path in paths
    }
