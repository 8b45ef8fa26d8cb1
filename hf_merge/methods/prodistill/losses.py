"""What the output of the merged block is compared with the expert's by."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

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


def token_sums(targets: Iterable[Tensor]) -> dict[str, Tensor]:
    """The number of tokens, Σ ‖t‖² and Σ t over tokens t, float64; empty without targets. Each: (tokens, channels)."""
    sums: dict[str, Tensor] = {}
    for target in targets:
        target = target.double()
        count = torch.tensor(float(target.shape[0]), dtype=torch.float64)
        one = {"count": count, "squares": target.square().sum(), "total": target.sum(0)}
        sums = {key: sums[key] + value if key in sums else value for key, value in one.items()}
    return sums


def spread(sums: Mapping[str, Tensor]) -> float:
    """The variance of tokens around their mean, summed over channels; 1 when there is none.

    Args:
        sums (`Mapping[str, torch.Tensor]`): As [`token_sums`] gives them.
    """
    count = float(sums["count"])
    variance = float(sums["squares"]) / count - float((sums["total"] / count).square().sum())
    return variance if variance > 0 else 1.0
