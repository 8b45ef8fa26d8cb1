"""Reading what layers see, and comparing features of real tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def captured(backbone: nn.Module, sites: Mapping[str, str]) -> Iterator[dict[str, Tensor]]:
    """What some layers read during a forward.

    Args:
        backbone (`torch.nn.Module`): The model.
        sites (`Mapping[str, str]`): The layers, by the names that the tensors get.
    """
    read: dict[str, Tensor] = {}
    with ExitStack() as stack:
        for name, layer in sites.items():
            handle = backbone.get_submodule(layer).register_forward_pre_hook(_reader(read, name))
            stack.callback(handle.remove)
        yield read


def _reader(read: dict[str, Tensor], name: str) -> Callable[[nn.Module, tuple], None]:
    def hook(module: nn.Module, args: tuple) -> None:
        read[name] = args[0]

    return hook


def real_rows(values: Tensor, mask: Tensor | None) -> Tensor:
    """The vectors of real tokens, (count, channels)."""
    if mask is None or values.ndim != 3 or mask.shape != values.shape[:2]:
        return values.reshape(-1, values.shape[-1])
    return values[mask.bool()]


def mean_square(difference: Tensor, mask: Tensor | None) -> Tensor:
    return real_rows(difference, mask).square().mean()


def variance_of(parts: Sequence[Tensor]) -> Tensor:
    """The mean variance of the channels of (count, channels); the mean square of a single row."""
    rows = torch.cat(list(parts))
    spread = rows.var(0, correction=0).mean() if len(rows) > 1 else rows.square().mean()
    return spread.clamp_min(1e-12)
