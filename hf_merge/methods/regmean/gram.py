"""Gram matrices of what the linear layers of a block read, over the tokens that are real."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..base import TensorGroup
from ..block_base import BlockGroup, BlockInputs
from ..linalg import sum_dtype
from .products import EXPERT_KINDS, Product, ProductWatcher


@dataclass
class Gram:
    """G = Σ x xᵀ of one linear layer, and the number of tokens.

    Args:
        matrix (`torch.Tensor`): (in, in), float64 where the device has it; for a mixture (experts, in, in).
        count (`torch.Tensor`): Tokens; for a mixture one number per expert.
    """

    matrix: Tensor
    count: Tensor


class GramCollector:
    """Sums Gram matrices while a block runs.

    Args:
        module (`torch.nn.Module`): The block.
        groups (`Mapping[str, TensorGroup]`): Its linear weights, by name within the block.
    """

    def __init__(self, module: nn.Module, groups: Mapping[str, TensorGroup]):
        self.module = module
        self.groups = groups
        self.grams: dict[str, Gram] = {}

    @contextmanager
    def observing(self, inputs: BlockInputs) -> Iterator[None]:
        """Products inside are counted, for the tokens of `inputs` that are real."""
        hooks = [_hide_padding(mixture, inputs) for mixture in self._mixtures()]
        try:
            with ProductWatcher(self.module, self.groups, lambda product: self._add(product, inputs)):
                yield
        finally:
            for hook in hooks:
                hook.remove()

    def _mixtures(self) -> list[nn.Module]:
        names = [name for name, group in self.groups.items() if group.kind in EXPERT_KINDS]
        return [self.module.get_submodule(path) for path in dict.fromkeys(name.rpartition(".")[0] for name in names)]

    def _add(self, product: Product, inputs: BlockInputs) -> None:
        group = self.groups[product.name]
        rows = product.inputs if product.index is not None else inputs.masked(product.inputs)
        gram = self.grams.get(product.name)
        if gram is None:
            stacked = (group.shape[0],) if product.index is not None else ()
            shape = (*stacked, rows.shape[-1], rows.shape[-1])
            matrix = torch.zeros(shape, dtype=sum_dtype(rows), device=rows.device)
            gram = self.grams[product.name] = Gram(matrix, torch.zeros(stacked))
        place = ... if product.index is None else product.index
        rows = rows.float()
        gram.matrix[place] += rows.mT @ rows
        gram.count[place] += int(rows.any(dim=-1).sum())


def all_reduce_grams(block: BlockGroup, grams: Mapping[str, Gram]) -> dict[str, Gram]:
    """The sums over the processes that hold the samples."""
    matrices = block.activations.all_reduce({name: gram.matrix for name, gram in grams.items()})
    counts = block.activations.all_reduce({name: gram.count for name, gram in grams.items()})
    return {name: Gram(matrix, counts[name]) for name, matrix in matrices.items()}


def _hide_padding(mixture: nn.Module, inputs: BlockInputs) -> Any:
    """Routing loses which token a row came from, so that padding is zeroed before it: a zero row adds nothing to a Gram matrix.
    Outputs at padding are never read by real tokens."""

    def zero(_: nn.Module, args: tuple) -> tuple:
        rows = args[0].reshape(-1, args[0].shape[-1])
        if inputs.mask is None or inputs.mask.numel() != rows.shape[0]:
            return args
        return ((rows * inputs.mask.reshape(-1, 1)).view_as(args[0]), *args[1:])

    return mixture.register_forward_pre_hook(zero)
