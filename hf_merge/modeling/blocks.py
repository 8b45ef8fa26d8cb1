"""The blocks of a transformer: the lists of layers that a model's forward runs one after another."""

from __future__ import annotations

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer


def find_block_lists(model: nn.Module) -> dict[str, nn.ModuleList]:
    """The outermost lists of blocks by module name: encoder, decoder, towers.

    A list of blocks is an `nn.ModuleList` whose items are all `GradientCheckpointingLayer`s, which transformers uses for
    what can be recomputed as one unit. Classes that do not use it fall back to the longest list of equal items.
    """
    found: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not _inside(name, found) and _holds_blocks(module):
            found[name] = module
    return found or _longest_uniform_list(model)


def _holds_blocks(module: nn.ModuleList) -> bool:
    return len(module) > 0 and all(isinstance(item, GradientCheckpointingLayer) for item in module)


def _inside(name: str, found: dict[str, nn.ModuleList]) -> bool:
    return any(name.startswith(f"{outer}.") for outer in found)


def _longest_uniform_list(model: nn.Module) -> dict[str, nn.ModuleList]:
    lists = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) > 0 and len({type(item) for item in module}) == 1
    }
    if not lists:
        return {}
    best = max(lists, key=lambda name: (len(lists[name]), -name.count(".")))
    return {best: lists[best]}
