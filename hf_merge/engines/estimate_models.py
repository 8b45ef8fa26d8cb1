"""The peak memory of an end-to-end merge, from its plan and the size of the calibration samples."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..methods.base import FLOAT32
from ..methods.model_base import ModelMethod
from ..modeling.shell import output_embeddings
from ..registry import get_merge_method
from .calibrated import initial_plan, is_left_to_method
from .estimate import loaded_bytes, process_memory, working_memory
from .estimate_blocks import saved_by_autograd
from .options import EngineOptions
from .placement import Placement
from .plan import MergePlan, PlannedParameter
from .sample_sizes import Samples


SAVED_ACTIVATIONS = 2.1
"""As in `estimate_blocks.py`, for all layers at once: attention and gates too, and the gradients that pass through. Measured."""

LOGIT_COPIES = 3
"""How many float32 tensors of the logits' size a loss on predictions holds: the logits, their softmax, and a gradient."""


def end_to_end_memory(
    plan: MergePlan, placement: Placement, samples: Samples, options: EngineOptions | None = None
) -> dict[str, int]:
    """The peak of the process, and of the device that the models run on where that is another one; empty where the method does
    not say what it holds.

    It is the larger of two: the merged model in float32 with the base model's values as stored, what the method holds and what a
    forward keeps for its backward; or the same model while its start is merged without data.

    Args:
        plan ([`MergePlan`]): A plan of a [`ModelMethod`].
        placement ([`Placement`]): Models run on the device of `""`.
        samples ([`Samples`]): The size of the samples.
        options ([`EngineOptions`], *optional*): How the merge is run.
    """
    options = options or EngineOptions()
    method: type[ModelMethod] = get_merge_method(plan.config.merge_type).method_cls
    merged = [parameter for parameter in plan.parameters if is_left_to_method(plan, parameter)]
    held = method.working_memory([parameter.info.numel for parameter in merged], len(plan.experts), plan.config)
    if held is None:
        return {}
    model = FLOAT32 * sum(parameter.info.numel for parameter in plan.parameters)
    stored = [plan.base.parameters[p.base] for p in merged if plan.base is not None and p.base is not None]
    base = sum(info.nbytes for info in stored)
    if method.requires_base:  # task vectors are taken from float32 values
        base += sum(FLOAT32 * info.numel for info in stored if info.dtype != torch.float32)
    training = base + held + _forward(plan, method, merged, samples) + (model // 2 if options.bf16 else 0)
    start = initial_plan(plan)
    starting = max((loaded_bytes(start, one) + working_memory(start, one) for one in start.parameters), default=0)
    targets = _targets(plan, method, samples)
    results = sum(parameter.info.nbytes for parameter in merged)
    device = placement.device_of("")
    if device.type == "cpu":
        return {"cpu": process_memory() + model + max(training + targets, starting, results)}
    return {"cpu": process_memory() + targets + results + starting, str(device): model + training}


def _forward(plan: MergePlan, method: type[ModelMethod], merged: Sequence[PlannedParameter], samples: Samples) -> int:
    """What autograd keeps of one batch."""
    tokens = min(method.batch_size(plan.config), samples.count) * samples.tokens
    kept = saved_by_autograd(merged, tokens, SAVED_ACTIVATIONS)
    head = output_embeddings(plan.target.shell)
    if head is not None and method.reads_logits(plan.config):
        kept += LOGIT_COPIES * FLOAT32 * head.weight.shape[0] * tokens
    return kept


def _targets(plan: MergePlan, method: type[ModelMethod], samples: Samples) -> int:
    """The experts' outputs on all samples, where the method keeps them."""
    if not method.keeps_targets:
        return 0
    width = getattr(plan.target.config.get_text_config(), "hidden_size", None) or 0
    return FLOAT32 * width * samples.tokens * samples.count * len(plan.experts)
