"""Where the heads of attention lie in the outputs of linear layers, found by gradients: one channel of what the output layer
reads depends on one channel of the values and on a head's channels of queries and keys. No names are looked at.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..methods.backbone_base import AttentionSite, HeadPart, Topology
from .topology import backbone_of, example_inputs


def find_attention(
    model: nn.Module, topology: Topology, inputs: Mapping[str, Tensor] | None = None
) -> list[AttentionSite]:
    """The attention layers of a backbone whose heads have the usual form: softmax of queries times keys, over values.

    Args:
        model ([`~transformers.PreTrainedModel`]): With weights, in evaluation mode.
        topology ([`Topology`]): Of its backbone.
        inputs (`Mapping`, *optional*): Arguments of its forward.
    """
    backbone = backbone_of(model)
    heads = getattr(backbone.config, "num_attention_heads", None)
    if not isinstance(heads, int) or not topology.linears:
        return []
    inputs = example_inputs(model) if inputs is None else inputs
    is_rotary = any("Rotary" in type(module).__name__ for module in backbone.modules())
    with _cut(backbone, topology) as (read, written), torch.enable_grad():
        backbone(**{name: value for name, value in inputs.items() if name != "labels"})
        sites = [_site(name, heads, read[name], written, is_rotary) for name in topology.linears if name in read]
    return [site for site in sites if site is not None]


def find_elementwise(
    model: nn.Module, topology: Topology, inputs: Mapping[str, Tensor] | None = None
) -> dict[str, list[str]]:
    """The layers inside of MLPs: for each linear layer that reads, channel by channel, a function of the same channel of other
    layers' outputs, these other layers (two where one gates the other).

    Args:
        model, topology, inputs: As in [`find_attention`].
    """
    backbone = backbone_of(model)
    inputs = example_inputs(model) if inputs is None else inputs
    found = {}
    with _cut(backbone, topology) as (read, written), torch.enable_grad():
        backbone(**{name: value for name, value in inputs.items() if name != "labels"})
        for name, value in read.items():
            supports = _supports(value, value.shape[-1] // 2, written)
            if supports and all(channels == [value.shape[-1] // 2] for channels in supports.values()):
                found[name] = [layer for layer in supports if written[layer].shape[-1] == value.shape[-1]]
    return {name: layers for name, layers in found.items() if layers}


def _site(
    name: str, heads: int, value: Tensor, written: Mapping[str, Tensor], is_rotary: bool
) -> AttentionSite | None:
    if not value.requires_grad or value.shape[-1] % heads:
        return None
    size = value.shape[-1] // heads
    starts: dict[tuple[str, int], list[int]] = {}
    values: dict[str, list[int]] = {}
    for head in range(heads):
        supports = _supports(value, head * size, written)
        runs = [(layer, run) for layer, channels in supports.items() for run in _runs(channels, size)]
        if len(runs) != 3 or sorted(len(run) for _, run in runs) != sorted((1, size, size)) or size == 1:
            return None
        for order, (layer, run) in enumerate(runs):
            if len(run) == 1:
                values.setdefault(layer, []).append(run[0])
            else:
                starts.setdefault((layer, order), []).append(run[0])
    if len(values) != 1 or len(starts) != 2:
        return None
    ((layer, firsts),) = values.items()
    matched = tuple(HeadPart(one, tuple(run)) for (one, _), run in starts.items())
    return AttentionSite(name, size, matched, HeadPart(layer, tuple(firsts)), is_rotary)


def _supports(value: Tensor, channel: int, written: Mapping[str, Tensor]) -> dict[str, list[int]]:
    """The channels of the layers' outputs that one channel of a tensor depends on, directly."""
    if not value.requires_grad:
        return {}
    layers = [name for name, output in written.items() if output.requires_grad]
    weights = torch.linspace(0.5, 1.5, value[..., channel].numel(), device=value.device).reshape(value.shape[:-1])
    total = (value[..., channel] * weights).sum()
    gradients = torch.autograd.grad(total, [written[name] for name in layers], retain_graph=True, allow_unused=True)
    found = {}
    for name, gradient in zip(layers, gradients, strict=True):
        if gradient is not None:
            channels = gradient.abs().flatten(0, -2).amax(0).nonzero()[:, 0].tolist()
            if channels:
                found[name] = channels
    return found


def _runs(channels: list[int], size: int) -> Iterator[list[int]]:
    """Contiguous channels, cut where a head ends: heads of queries and keys may lie side by side."""
    run: list[int] = []
    for channel in channels:
        if run and (channel != run[-1] + 1 or len(run) == size):
            yield run
            run = []
        run.append(channel)
    if run:
        yield run


@contextmanager
def _cut(backbone: nn.Module, topology: Topology) -> Iterator[tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """What each linear layer reads and writes during a forward; what it writes is a leaf of autograd, so that gradients end
    there."""
    read: dict[str, Tensor] = {}
    written: dict[str, Tensor] = {}

    def hook_of(name: str):
        def hook(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
            read[name] = args[0]
            written[name] = output.detach().requires_grad_(True)
            # Not the leaf itself: models add to outputs in place.
            return written[name].clone()

        return hook

    handles = [backbone.get_submodule(name).register_forward_hook(hook_of(name)) for name in topology.linears]
    try:
        yield read, written
    finally:
        for handle in handles:
            handle.remove()
