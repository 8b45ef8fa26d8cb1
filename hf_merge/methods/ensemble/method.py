"""Ensembles: the mean of logits, or of probabilities."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..output_base import OutputMethod


_MAPS = 4
"""Logits of so many dimensions are maps, (samples, classes, height, width); others have the classes last."""


class Ensemble(OutputMethod):
    """z = 1/n Σ_i z_i, or log(1/n Σ_i softmax(z_i)) (arXiv 1612.01474, section 2.4). Experts with equal logits give these to the last bit in the first case."""

    @classmethod
    def needs_exclusive_classes(cls, settings: Any) -> bool:
        return settings.average == "probabilities"

    def combine(self, logits: Sequence[Tensor], settings: Any) -> Tensor:
        dtype = torch.promote_types(logits[0].dtype, torch.float32)
        if settings.average == "logits":
            return mean([one.to(dtype) for one in logits]).to(logits[0].dtype)
        classes = 1 if logits[0].dim() == _MAPS else -1
        logs = torch.stack([one.to(dtype).log_softmax(classes) for one in logits])
        return (logs.logsumexp(0) - math.log(len(logits))).to(logits[0].dtype)


def mean(values: Sequence[Tensor]) -> Tensor:
    """The mean. Entries that are equal in all of them stay as they are, infinite ones included: a sum divided by n would be off by
    one rounding."""
    total = values[0]
    for count, value in enumerate(values[1:], start=2):
        total = torch.where(value == total, total, total * ((count - 1) / count) + value / count)
    return total
