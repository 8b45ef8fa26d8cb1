"""What the output of the merged block is compared with the expert's by."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor


Loss = Callable[[Tensor, Tensor], Tensor]


def squared_error(output: Tensor, target: Tensor) -> Tensor:
    """‖output − target‖², summed over all entries. Both: (tokens, channels)."""
    return (output - target).square().sum()


def cosine_distance(output: Tensor, target: Tensor) -> Tensor:
    """Σ 1 − cos(output, target) over tokens. Both: (tokens, channels)."""
    return (1 - torch.nn.functional.cosine_similarity(output, target, dim=-1)).sum()


def divergence(logits: Tensor, targets: Tensor) -> Tensor:
    """Σ KL(softmax(targets) ‖ softmax(logits)) over rows. Both: (rows, classes)."""
    return torch.nn.functional.kl_div(
        torch.log_softmax(logits, -1), torch.log_softmax(targets, -1), reduction="sum", log_target=True
    )


def spread(targets: Iterable[Tensor]) -> float:
    """The variance of targets around their mean token, summed over channels; 1 when there is none. Each: (tokens, channels)."""
    count, squares, total = 0, 0.0, 0.0
    for target in targets:
        target = target.double()
        count += target.shape[0]
        squares += float(target.square().sum())
        total = total + target.sum(0)
    variance = squares / count - float((total / count).square().sum())
    return variance if variance > 0 else 1.0
