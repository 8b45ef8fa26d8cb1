"""Helpers of the tests of element-wise methods: one parameter, merged directly."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hf_merge.config import MergeConfig
from hf_merge.methods.base import ParameterKind, TensorGroup
from hf_merge.registry import get_merge_method


def make_group(
    config: MergeConfig,
    base: Tensor | None,
    experts: Sequence[Tensor],
    name: str = "layer.weight",
    kind: ParameterKind = ParameterKind.LINEAR,
    names: Sequence[str] | None = None,
    depth: float = 0.5,
) -> TensorGroup:
    """The group of one parameter, its settings resolved as an engine resolves them."""
    names = tuple(names or (f"expert{index}" for index in range(len(experts))))
    settings = config.resolve(name, depth, names)
    return TensorGroup(name, kind, base, list(experts), names, settings, seed=config.seed)


def merge_groups(config: MergeConfig, groups: Sequence[TensorGroup]) -> list[Tensor]:
    """Merges parameters as an engine does: every round of observation over all of them first."""
    method = get_merge_method(config.merge_type).method_cls()
    for round in range(method.rounds(config)):
        method.conclude(((group.name, method.observe(group, round)) for group in groups), round, config)
    return [method(group) for group in groups]


def merge(config: MergeConfig, base: Tensor | None, experts: Sequence[Tensor], **kwargs) -> Tensor:
    """Merges one parameter."""
    return merge_groups(config, [make_group(config, base, experts, **kwargs)])[0]


def random_models(
    shape: tuple[int, ...], count: int, scale: float = 0.05, seed: int = 0
) -> tuple[Tensor, list[Tensor]]:
    """A base and `count` experts near it, float32."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(shape, generator=generator)
    return base, [base + scale * torch.randn(shape, generator=generator) for _ in range(count)]


def dense_task_vectors(base: Tensor, experts: Sequence[Tensor]) -> Tensor:
    """The task vectors as the library rounds them (float32), stacked, in float64 for the oracles."""
    return torch.stack([expert.float() - base.float() for expert in experts]).double()


def dense_trim(vector: Tensor, k: int) -> Tensor:
    """The `k` entries of largest magnitude by a plain stable sort."""
    order = vector.abs().reshape(-1).argsort(descending=True, stable=True)
    trimmed = torch.zeros_like(vector).reshape(-1)
    trimmed[order[:k]] = vector.reshape(-1)[order[:k]]
    return trimmed.view(vector.shape)


def dense_elect_and_merge(
    vectors: Tensor, weights: Sequence[float], mean: bool = True, majority_sign: str = "total"
) -> Tensor:
    """TIES' election and disjoint merge on stacked vectors, entry by entry."""
    weighted = vectors * torch.tensor(weights, dtype=vectors.dtype).view(-1, *[1] * (vectors.dim() - 1))
    votes = weighted if majority_sign == "total" else weighted.sign()
    elected = votes.sum(dim=0).sign()
    most = 1.0 if elected.sum() >= 0 else -1.0
    elected = torch.where(elected == 0, torch.full_like(elected, most), elected)
    agrees = weighted.sign() == elected
    total = (weighted * agrees).sum(dim=0)
    if not mean:
        return total
    mass = torch.tensor(weights, dtype=vectors.dtype).abs().view(-1, *[1] * (vectors.dim() - 1)) * agrees
    mass = mass.sum(dim=0)
    return torch.where(mass > 0, total / torch.where(mass > 0, mass, torch.ones_like(mass)), torch.zeros_like(total))
