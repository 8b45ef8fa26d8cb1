"""Sees the products with the linear weights of a block, whatever module makes them.

Products are seen where torch makes them (`linear`, `addmm`, `matmul`) and recognised by the memory of their weight: this covers
`nn.Linear`, GPT-2's `Conv1D`, and the experts of a mixture, which are slices of one parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..base import ParameterKind, TensorGroup


EXPERT_KINDS = (ParameterKind.EXPERT_LINEAR, ParameterKind.TRANSPOSED_EXPERT_LINEAR)


@dataclass(frozen=True)
class Product:
    """One product y = W x + b.

    Args:
        name (`str`): The weight, by name within the block.
        index (`int`, *optional*): Which slice of it, for the experts of a mixture.
        inputs (`torch.Tensor`): x, (..., in).
        outputs (`torch.Tensor`): y, (..., out).
    """

    name: str
    index: int | None
    inputs: Tensor
    outputs: Tensor


@dataclass(frozen=True)
class _Weight:
    """Where a weight lies in memory: `count` slices of `nbytes` each."""

    name: str
    start: int
    nbytes: int
    count: int
    is_stacked: bool


class ProductWatcher(TorchFunctionMode):
    """A context in which every product with a watched weight is reported.

    Args:
        module (`torch.nn.Module`): The block.
        groups (`Mapping[str, TensorGroup]`): The weights to watch, by name within the block.
        see (`Callable`): Is given each [`Product`].
    """

    def __init__(self, module: nn.Module, groups: Mapping[str, TensorGroup], see: Callable[[Product], None]):
        super().__init__()
        self._see = see
        self._weights = [_weight(name, module.get_parameter(name), group) for name, group in groups.items()]

    def __torch_function__(self, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        output = function(*args, **kwargs)
        operands = _operands(function, args, kwargs)
        if operands is not None:
            self._report(*operands, output)
        return output

    def _report(self, inputs: Tensor, operand: Tensor, output: Tensor) -> None:
        start = operand.data_ptr()
        for weight in self._weights:
            slice_index, rest = divmod(start - weight.start, weight.nbytes)
            if rest == 0 and 0 <= slice_index < weight.count:
                index = slice_index if weight.is_stacked else None
                self._see(Product(weight.name, index, inputs.detach(), output.detach()))
                return


def _weight(name: str, parameter: Tensor, group: TensorGroup) -> _Weight:
    stacked = group.kind in EXPERT_KINDS
    count = parameter.shape[0] if stacked else 1
    nbytes = max(1, parameter.numel() * parameter.element_size() // count)
    return _Weight(name, parameter.data_ptr(), nbytes, count, stacked)


_MATMULS = (torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__)


def _operands(function: Callable, args: tuple, kwargs: Mapping[str, Any]) -> tuple[Tensor, Tensor] | None:
    """x and W of a product, or `None` for another function."""
    if function is torch.nn.functional.linear:
        return (args[0] if args else kwargs["input"], args[1] if len(args) > 1 else kwargs["weight"])
    if function is torch.addmm and len(args) > 2:
        return args[1], args[2]
    if function in _MATMULS and len(args) > 1 and all(isinstance(one, Tensor) for one in args[:2]):
        return args[0], args[1]
    return None
