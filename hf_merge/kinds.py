"""The kinds of parameters, which methods, engines and the anatomy of models agree on."""

from __future__ import annotations

from enum import Enum


class ParameterKind(str, Enum):
    """What a parameter is, decided from the type of the module that owns it."""

    LINEAR = "linear"  # (out, in)
    TRANSPOSED_LINEAR = "transposed_linear"  # (in, out), GPT-2's Conv1D
    EXPERT_LINEAR = "expert_linear"  # (experts, out, in)
    TRANSPOSED_EXPERT_LINEAR = "transposed_expert_linear"  # (experts, in, out)
    EMBEDDING = "embedding"
    CONVOLUTION = "convolution"
    NORM = "norm"
    BIAS = "bias"
    HEAD = "head"
    BUFFER = "buffer"
    OTHER = "other"


LINEAR_KINDS = frozenset(
    {
        ParameterKind.LINEAR,
        ParameterKind.TRANSPOSED_LINEAR,
        ParameterKind.EXPERT_LINEAR,
        ParameterKind.TRANSPOSED_EXPERT_LINEAR,
    }
)
