"""Groups of one linear weight for the tests of the methods that are defined on linear layers."""

from __future__ import annotations

import torch

from hf_merge.methods.base import ParameterKind, TensorGroup
from hf_merge.registry import get_merge_method


KINDS = {
    ParameterKind.LINEAR: lambda w: w,
    ParameterKind.TRANSPOSED_LINEAR: lambda w: w.mT.contiguous(),
}


def task_matrices(seed: int, n: int, out: int, inp: int, rank: int | None = None, scale: float = 1e-3) -> torch.Tensor:
    """Random task vectors (n, out, in) in float64 with values that float32 holds exactly, of a given rank if wanted.

    The spectrum decays as fine-tunes' does: singular value k falls with 1/√k.
    """
    generator = torch.Generator().manual_seed(seed)
    size = min(out, inp)
    left = torch.randn(n, out, size, generator=generator)
    right = torch.randn(n, size, inp, generator=generator)
    decay = torch.arange(1, size + 1).pow(-0.5)
    if rank is not None:
        decay[rank:] = 0
    return (scale * (left * decay) @ right).float().double()


def group_of(
    vectors: torch.Tensor, settings, kind: ParameterKind = ParameterKind.LINEAR, name: str = "encoder.weight"
) -> TensorGroup:
    """The group whose task vectors are exactly `vectors` (the base is zero), float32 unless `vectors` is double of no float32."""
    store = KINDS.get(kind, KINDS[ParameterKind.LINEAR])
    experts = [store(vector.float()) for vector in vectors]
    names = tuple(f"expert{index}" for index in range(len(experts)))
    return TensorGroup(name, kind, torch.zeros_like(experts[0]), experts, names, settings.resolve(name, 0.5, names))


def merge(vectors: torch.Tensor, merge_type: str, kind: ParameterKind = ParameterKind.LINEAR, **settings):
    """(merged task vector in float64, report) of one linear weight, through the whole protocol of a method."""
    entry = get_merge_method(merge_type)
    config = entry.config_cls(**settings)
    group, method = group_of(vectors, config, kind), entry.method_cls()
    for round in range(method.rounds(config)):
        method.conclude(iter([(group.name, method.observe(group, round))]), round, config)
    merged = method(group).double()
    if kind is ParameterKind.TRANSPOSED_LINEAR:
        merged = merged.mT
    return merged, group.report


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """‖actual − expected‖ / ‖expected‖."""
    return (torch.linalg.vector_norm(actual.double() - expected) / torch.linalg.vector_norm(expected)).item()
