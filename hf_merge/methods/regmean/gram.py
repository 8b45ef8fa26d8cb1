"""Gram matrices of what the linear layers of a block read, whatever module multiplies by their weights.

Products are seen where torch makes them (`linear`, `addmm`, `matmul`), and recognised by the memory of their weight: this covers
`nn.Linear`, GPT-2's `Conv1D`, and the experts of a mixture, which are slices of one parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..base import ParameterKind, TensorGroup
from ..block_base import BlockInputs


EXPERT_KINDS = (ParameterKind.EXPERT_LINEAR, ParameterKind.TRANSPOSED_EXPERT_LINEAR)


@dataclass
class Gram:
    """G = Σ x xᵀ of one linear layer, and the number of tokens.

    Args:
        matrix (`torch.Tensor`): (in, in), float64 where the device has it; for a mixture (experts, in, in).
        count (`torch.Tensor`): Tokens; for a mixture one number per expert.
    """

    matrix: Tensor
    count: Tensor


@dataclass
class _Watched:
    """A parameter of the block: where its memory begins, and how it is laid out."""

    name: str
    start: int
    slice_bytes: int
    slices: int


@dataclass(eq=False)
class GramCollector(TorchFunctionMode):
    """Sums Gram matrices while a block runs inside of it.

    Args:
        module (`torch.nn.Module`): The block.
        groups (`Mapping[str, TensorGroup]`): Its linear weights, by name within the block.
    """

    module: nn.Module
    groups: Mapping[str, TensorGroup]
    grams: dict[str, Gram] = field(default_factory=dict)

    def __post_init__(self):
        super().__init__()
        self._inputs: BlockInputs | None = None
        self._watched: list[_Watched] = []
        for name, group in self.groups.items():
            weight = self.module.get_parameter(name)
            slices = weight.shape[0] if group.kind in EXPERT_KINDS else 1
            nbytes = weight.numel() * weight.element_size()
            self._watched.append(_Watched(name, weight.data_ptr(), nbytes // slices, slices))

    @contextmanager
    def observing(self, inputs: BlockInputs) -> Iterator[None]:
        """Products inside are counted, for the tokens of `inputs` that are real."""
        self._inputs = inputs
        hooks = [self._hide_padding(module, inputs) for module in self._mixtures()]
        try:
            with self:
                yield
        finally:
            self._inputs = None
            for hook in hooks:
                hook.remove()

    def _mixtures(self) -> list[nn.Module]:
        names = [name for name, group in self.groups.items() if group.kind in EXPERT_KINDS]
        return [self.module.get_submodule(path) for path in dict.fromkeys(name.rpartition(".")[0] for name in names)]

    def _hide_padding(self, module: nn.Module, inputs: BlockInputs) -> Any:
        """Routing loses which token a row came from, so that padding is zeroed before: a zero row adds nothing to a Gram
        matrix. Outputs at padding are never read by real tokens."""

        def zero(_: nn.Module, args: tuple) -> tuple:
            rows = args[0].reshape(-1, args[0].shape[-1])
            if inputs.mask is None or inputs.mask.numel() != rows.shape[0]:
                return args
            return ((rows * inputs.mask.reshape(-1, 1)).view_as(args[0]), *args[1:])

        return module.register_forward_pre_hook(zero)

    def __torch_function__(self, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if function in _PRODUCTS:
            for left, right in _PRODUCTS[function](args, kwargs or {}):
                self._see(left, right)
        return function(*args, **(kwargs or {}))

    def _see(self, rows: Tensor, weight: Tensor) -> None:
        start = weight.data_ptr()
        for watched in self._watched:
            offset = start - watched.start
            if 0 <= offset < watched.slice_bytes * watched.slices and offset % watched.slice_bytes == 0:
                if watched.slices == 1:
                    self._add(watched, slice(None), self._inputs.masked(rows))
                elif rows.dim() == 2:
                    self._add(watched, offset // watched.slice_bytes, rows)
                return

    def _add(self, watched: _Watched, index: Any, rows: Tensor) -> None:
        dtype = torch.float32 if rows.device.type == "mps" else torch.float64
        gram = self.grams.get(watched.name)
        if gram is None:
            width = rows.shape[-1]
            shape = (width, width) if watched.slices == 1 else (watched.slices, width, width)
            count = torch.zeros(shape[:-2], dtype=torch.float64)
            gram = self.grams[watched.name] = Gram(torch.zeros(shape, dtype=dtype, device=rows.device), count)
        rows = rows.detach().float()
        gram.matrix[index] += rows.mT @ rows
        gram.count[() if watched.slices == 1 else index] += float(rows.any(dim=-1).sum())


def _linear(args: tuple, kwargs: Mapping[str, Any]) -> list[tuple[Tensor, Tensor]]:
    weight = args[1] if len(args) > 1 else kwargs["weight"]
    return [(args[0] if args else kwargs["input"], weight)]


def _addmm(args: tuple, kwargs: Mapping[str, Any]) -> list[tuple[Tensor, Tensor]]:
    return [(args[1], args[2])] if len(args) > 2 else []


def _matmul(args: tuple, kwargs: Mapping[str, Any]) -> list[tuple[Tensor, Tensor]]:
    return [(args[0], args[1])] if len(args) > 1 else []


_PRODUCTS: dict[Callable, Callable[[tuple, Mapping[str, Any]], list[tuple[Tensor, Tensor]]]] = {
    torch.nn.functional.linear: _linear,
    torch.addmm: _addmm,
    torch.matmul: _matmul,
    torch.mm: _matmul,
    Tensor.matmul: _matmul,
    Tensor.__matmul__: _matmul,
}
