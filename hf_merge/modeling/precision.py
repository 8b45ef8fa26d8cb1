"""Mixed precision: bfloat16 products, float32 weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel


@contextmanager
def mixed_precision(device: torch.device, enabled: bool) -> Iterator[None]:
    """Runs forwards under bfloat16 autocast.

    On a CPU, attention is composed of plain products then: the backward of the fused kernel is tens of times slower in bfloat16
    than in float32 where the processor has no matrix unit for it.

    Args:
        device (`torch.device`): Where the model is.
        enabled (`bool`): Whether anything changes at all.
    """
    with ExitStack() as stack:
        if enabled:
            stack.enter_context(torch.autocast(device.type, torch.bfloat16))
            if device.type == "cpu":
                stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        yield
