"""What the engines of methods without a shared base have in common: maps to the experts' features, heads with these maps folded in,
rounding, and what identifies a merge.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import __version__
from ..data.calibration import TaskSamples
from ..errors import NonFiniteError
from ..methods.backbone_base import FeatureTap, OutputMap
from .options import EngineOptions
from .plan import MergePlan


def make_map(
    model: nn.Module, tap: FeatureTap | None, merged: int, expert: int, device: torch.device
) -> OutputMap | None:
    """The map from the merged features to an expert's; `None` without a head.

    Args:
        model (`torch.nn.Module`): The expert; weights are not looked at.
        tap ([`FeatureTap`], *optional*): What its head reads.
        merged, expert (`int`): The two widths.
        device (`torch.device`): Where to.
    """
    if tap is None:
        return None
    layers = [model.get_submodule(name) for name in tap.layers]
    has_bias = all(getattr(layer, "bias", None) is not None for layer in layers)
    return OutputMap(merged, expert, has_bias).to(device)


@torch.no_grad()
def folded_head(
    model: nn.Module, state: Mapping[str, Tensor], names: Sequence[str], tap: FeatureTap, output_map: OutputMap
) -> dict[str, Tensor]:
    """An expert's head for merged features, by module name.

    Args:
        model (`torch.nn.Module`): The expert; weights are not looked at.
        state (`Mapping`): The values of its head.
        names (`Sequence[str]`): The parameters of the head.
        tap ([`FeatureTap`]): What it reads.
        output_map ([`OutputMap`]): To the expert's features.
    """
    values = {name: state[name].detach().clone() for name in names}
    for layer in tap.layers:
        transposed = not isinstance(model.get_submodule(layer), nn.Linear)
        weight = state[f"{layer}.weight"].detach()
        bias = state.get(f"{layer}.bias")
        folded, bias = output_map.fold_into(weight.mT if transposed else weight, bias)
        values[f"{layer}.weight"] = folded.mT if transposed else folded
        if bias is not None:
            values[f"{layer}.bias"] = bias
    return values


def rounded(plan: MergePlan, name: str, value: Tensor, dtype: torch.dtype) -> Tensor:
    """A merged parameter in its output dtype, on the CPU.

    Raises:
        NonFiniteError: It holds NaN or infinity.
    """
    result = value.to("cpu", dtype).contiguous()
    if result.is_floating_point() and not bool(torch.isfinite(result).all()):
        raise NonFiniteError(
            f"Merging '{name}' with '{plan.config.merge_type}' gave NaN or infinity: lower the learning rate, or check the samples."
        )
    return result


def identity_of(plan: MergePlan, samples: TaskSamples | None, augment: Any, options: EngineOptions) -> str:
    """Identifies what is computed: recipe, models, samples and precision."""
    content: list[Any] = [
        __version__,
        plan.config.to_dict(),
        plan.to_dict()["parameters"],
        [source.fingerprint() for source in plan.experts],
        samples.fingerprint() if samples is not None else None,
        repr(augment),
        [options.bf16, options.gradient_accumulation_steps, options.seed],
    ]
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()
