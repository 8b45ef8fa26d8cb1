"""The peak memory of a block-wise merge, and the disk that it needs, from its plan and the size of the calibration samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..methods.after_base import AfterMergeMethod
from ..methods.base import FLOAT32, LINEAR_KINDS
from ..methods.block_base import BlockMethod
from ..modeling.blocks import find_block_lists
from ..modeling.shell import output_embeddings
from ..registry import get_merge_method
from .after_merge import inner_plan
from .calibrated import is_left_to_method
from .estimate import loaded_bytes, process_memory
from .options import EngineOptions
from .placement import Placement
from .plan import MergePlan, PlannedParameter
from .sample_sizes import Samples


SAVED_ACTIVATIONS = 1.5
"""What autograd keeps of a block, in inputs and outputs of its linear layers: theirs, and those of norms and nonlinearities."""


def blocks_of(plan: MergePlan) -> dict[str, list[PlannedParameter]]:
    """The parameters of every block, by the block's name; those outside of blocks under the empty name."""
    names = {
        f"{name}.{index}"
        for name, blocks in find_block_lists(plan.target.shell).items()
        for index in range(len(blocks))
    }
    found: dict[str, list[PlannedParameter]] = {"": []}
    for parameter in plan.parameters:
        prefix = parameter.name
        while prefix and prefix not in names:
            prefix = prefix.rpartition(".")[0]
        found.setdefault(prefix, []).append(parameter)
    return found


def blockwise_memory(
    plan: MergePlan, placement: Placement, samples: Samples, options: EngineOptions | None = None
) -> dict[str, int]:
    """The peak of the process, and of the device that the models run on where that is another one.

    It is the largest of three: the outside of one model in float32 while batches run up to their next block; one block, the
    experts' blocks and what the method trains; a parameter of every model when the result is written. To each of them the merged
    values outside of blocks and the activations are added.

    Args:
        plan ([`MergePlan`]): A plan of a [`BlockMethod`].
        placement ([`Placement`]): Models run on the device of `""`.
        samples ([`Samples`]): The size of the samples.
        options ([`EngineOptions`], *optional*): How the merge is run.
    """
    options = options or EngineOptions()
    blocks = blocks_of(plan)
    outside = blocks.pop("")
    running = _outside_of_runs(plan, outside)
    cached = activations(plan, samples, options)
    kept = sum(parameter.info.nbytes for parameter in running) + cached - _cached_on_disk(cached, options)
    advance = FLOAT32 * sum(p.info.numel for p in running) + max((p.info.nbytes for p in running), default=0)
    train = max((block_memory(plan, block, samples, options) for block in blocks.values()), default=0)
    write = max((loaded_bytes(plan, p) + p.info.nbytes + FLOAT32 * p.info.numel for p in plan.parameters), default=0)
    device = placement.device_of("")
    if device.type == "cpu":
        return {"cpu": process_memory() + kept + max(advance, train, write)}
    return {"cpu": process_memory() + kept + write, str(device): max(advance, train)}


def block_disk(plan: MergePlan, samples: Samples, options: EngineOptions | None = None) -> int:
    """Bytes on disk before the result is complete: the result, the finished blocks in `<folder>.work`, cached activations.

    Args:
        plan, samples, options: As for [`blockwise_memory`].
    """
    options = options or EngineOptions()
    return plan.nbytes + finished_blocks(plan) + activations_on_disk(plan, samples, options)


def finished_blocks(plan: MergePlan) -> int:
    """Bytes of the finished blocks of a [`BlockMethod`]; 0 for a plan of another method."""
    method = get_merge_method(plan.config.merge_type).method_cls
    if issubclass(method, AfterMergeMethod):
        return finished_blocks(inner_plan(plan))
    if not issubclass(method, BlockMethod):
        return 0
    blocks = blocks_of(plan)
    return sum(p.info.nbytes for name in blocks if name for p in blocks[name] if is_left_to_method(plan, p))


def activations_on_disk(plan: MergePlan, samples: Samples, options: EngineOptions) -> int:
    """Bytes of the activations of a [`BlockMethod`] that go to disk."""
    return _cached_on_disk(activations(plan, samples, options), options)


def _cached_on_disk(cached: int, options: EngineOptions) -> int:
    """How much of the activations goes to disk."""
    if options.cache == "disk":
        return cached
    return 0 if options.cache_limit is None else max(0, cached - options.cache_limit)


def block_memory(
    plan: MergePlan, parameters: Sequence[PlannedParameter], samples: Samples, options: EngineOptions
) -> int:
    """Bytes while one block is merged: the merged model's block in float32, the base model's as stored, and what the method
    holds."""
    method: type[BlockMethod] = get_merge_method(plan.config.merge_type).method_cls
    merged = [parameter for parameter in parameters if is_left_to_method(plan, parameter)]
    base = sum(plan.base.parameters[p.base].nbytes for p in merged if plan.base is not None and p.base is not None)
    shapes = {parameter.name: parameter.info.shape for parameter in merged}
    held = method.working_memory(shapes, len(plan.experts), plan.config)
    tokens = min(plan.config.batch_size, samples.count) * samples.tokens
    entries = sum(p.info.numel for p in parameters)
    casts = 2 * entries if options.bf16 else 0
    return FLOAT32 * entries + base + held + casts + saved_by_autograd(merged, tokens)


def saved_by_autograd(parameters: Sequence[PlannedParameter], tokens: int, factor: float = SAVED_ACTIVATIONS) -> int:
    """Bytes that the linear layers of a forward, and what lies between them, keep for the backward of so many tokens."""
    widths = sum(sum(p.info.shape[-2:]) for p in parameters if p.kind in LINEAR_KINDS)
    return int(factor * FLOAT32 * widths * tokens)


def activations(plan: MergePlan, samples: Samples, options: EngineOptions) -> int:
    """Bytes of the activations that are kept between two blocks: of each token what enters a block and what leaves it, in the
    merged model and in the token's expert."""
    method: type[BlockMethod] = get_merge_method(plan.config.merge_type).method_cls
    width = getattr(plan.target.config.get_text_config(), "hidden_size", None) or 0
    models = int(method.reads_student) + int(method.reads_teachers)
    itemsize = 2 if options.cache_dtype is not None else FLOAT32
    return 2 * models * itemsize * width * samples.tokens * samples.count * len(plan.experts)


def _outside_of_runs(plan: MergePlan, outside: Sequence[PlannedParameter]) -> list[PlannedParameter]:
    """The parameters outside of blocks that a run reaches: not those of the output embeddings."""
    shell = plan.target.shell
    head = output_embeddings(shell)
    owners: Mapping[str, object] = dict(shell.named_modules())
    return [p for p in outside if head is None or owners[p.name.rpartition(".")[0]] is not head]
