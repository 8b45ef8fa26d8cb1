"""Which engine carries out a plan, from the contract of its method. Engines are imported when they are chosen: most of them import
transformers' models, which a merge from disk to disk can do without."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from ..checkpoints.names import SaveGroup
from ..checkpoints.source import ModelSource
from ..config import MergeConfig
from ..methods.after_base import AfterMergeMethod, ExclusiveMethod
from ..methods.backbone_base import BackboneMethod
from ..methods.base import MergeMethod, TensorMethod
from ..methods.block_base import BlockMethod
from ..methods.mixture_base import MixtureMethod
from ..methods.model_base import ModelMethod
from ..methods.output_base import OutputMethod
from ..registry import get_merge_method
from .adapters import all_adapters, tensor_engine
from .estimate import NOT_FORKED, Estimate, count_processes, streaming_memory, together, traffic
from .placement import Placement
from .plan import MergePlan
from .planning import build_plan
from .report import MergeReport
from .sample_sizes import Samples
from .streaming import Sink, StreamingEngine


if TYPE_CHECKING:
    from ..data.calibration import CalibrationData
    from .options import EngineOptions


class Engine(Protocol):
    """Carries out a plan.

    **Attributes**:
        - **identity** (`str`) -- What the result depends on beside the plan, such as the samples.
        - **report** ([`MergeReport`]) -- What has happened so far.
    """

    identity: str
    report: MergeReport

    def run(self, groups: list[SaveGroup], sink: Sink) -> MergeReport: ...


def plan_merge(config: MergeConfig, experts: Sequence[ModelSource], base: ModelSource | None) -> MergePlan:
    """The plan of a merge, made for the engine that its method needs.

    Args:
        config ([`MergeConfig`]): The recipe.
        experts (`Sequence[ModelSource]`): The experts.
        base ([`ModelSource`], *optional*): The base model.
    """
    method = get_merge_method(config.merge_type).method_cls
    if issubclass(method, AfterMergeMethod):
        return _plan_after_merge(config, experts, base)
    plan = _planner_of(method)(config, experts, base)
    if config.output == "adapter":
        from .adapter_output import plan_adapter

        plan_adapter(plan)
    return plan


def _planner_of(method: type[MergeMethod]) -> Callable[..., MergePlan]:
    if issubclass(method, BackboneMethod):
        from .backbone_plan import build_backbone_plan

        return build_backbone_plan
    if issubclass(method, MixtureMethod):
        from .mixture_plan import build_mixture_plan

        return build_mixture_plan
    if issubclass(method, OutputMethod):
        from .ensembles import build_ensemble_plan

        return build_ensemble_plan
    return build_plan


def _plan_after_merge(config: MergeConfig, experts: Sequence[ModelSource], base: ModelSource | None) -> MergePlan:
    from .after_merge import outer_plan
    from .surgery import plan_surgery
    from .twin import plan_twin

    method = get_merge_method(config.merge_type).method_cls
    plan = outer_plan(config, plan_merge(config.inner_config(), experts, base))
    plan.problems += [
        one for one in method.refusals(config.merge_type, len(experts), True) if one not in plan.problems
    ]
    (plan_twin if issubclass(method, ExclusiveMethod) else plan_surgery)(plan)
    return plan


def find_data_problems(plan: MergePlan, data: CalibrationData | None, has_options: bool = False) -> list[str]:
    """What is wrong with the samples that a merge is given, or with their absence.

    Args:
        plan ([`MergePlan`]): The plan.
        data ([`CalibrationData`], *optional*): The samples.
        has_options (`bool`): Whether callbacks or arguments were given, which only methods that need data have a use for.
    """
    name = plan.config.merge_type
    method = get_merge_method(name).method_cls
    if not method.needs_data(plan.config):
        return (
            []
            if data is None
            else [f"The method '{name}' needs no data: leave the samples, callbacks and arguments out."]
        )
    if issubclass(method, AfterMergeMethod):
        return _after_merge_problems(plan, data, has_options)
    problems = [
        f"A rule chooses '{other}', which needs data: only the recipe's own method may."
        for other in sorted({p.settings.merge_type for p in plan.parameters if p.action == "merge"} - {name})
        if get_merge_method(other).method_cls.requires_data
    ]
    if data is None:
        problems.append(_missing_samples(name))
    else:
        problems += data.problems([source.name for source in plan.experts])
        keeps_samples = not issubclass(method, BackboneMethod) or is_block_wise(plan.config)
        if data.augment is not None and data.copies == 1 and keeps_samples:
            problems.append(f"The method '{name}' takes every sample as it is: with 'augment', set copies=8 or so.")
    if getattr(plan.config, "fit_heads", False) and not plan.heads and not plan.problems:
        problems.append(
            "fit_heads=True fits heads that are kept per task, and there are none: leave it out, or set heads='per_task' if the "
            "models have heads."
        )
    if issubclass(method, (BlockMethod, ModelMethod)) and not plan.problems:
        from .calibrated import initial_plan

        problems += initial_plan(plan).problems
    return problems


def _missing_samples(name: str) -> str:
    return (
        f"The method '{name}' needs calibration samples: pass them by task, merge({{task: samples}}) or "
        "save_pretrained(folder, data={task: samples}) of a Merger; on the command line only `hf-merge compare` has samples."
    )


def _after_merge_problems(plan: MergePlan, data: CalibrationData | None, has_options: bool) -> list[str]:
    """Those of the inner recipe, where it has a use for samples, and of what is added to its result."""
    if data is None:
        return [_missing_samples(plan.config.merge_type)]
    from .after_merge import inner_plan

    inner = inner_plan(plan)
    if get_merge_method(inner.config.merge_type).method_cls.needs_data(inner.config):
        return find_data_problems(inner, data, has_options)
    return data.problems([source.name for source in plan.experts])


def choose_engine(
    plan: MergePlan, placement: Placement, data: CalibrationData | None = None, options: EngineOptions | None = None
) -> Engine:
    """The engine for a checked plan.

    Args:
        plan ([`MergePlan`]): The plan.
        placement ([`Placement`]): Where to compute.
        data ([`CalibrationData`], *optional*): Samples, for methods that need them.
        options ([`EngineOptions`], *optional*): For the engines that need data.
    """
    method = get_merge_method(plan.config.merge_type).method_cls
    if issubclass(method, TensorMethod):
        return tensor_engine(plan, placement)
    if issubclass(method, OutputMethod):
        return StreamingEngine(plan, placement)
    if issubclass(method, AfterMergeMethod):
        return _after_merge_engine(plan, placement, data, options)
    return _engine_of(method, plan.config)(plan, placement, data, options)


def _after_merge_engine(
    plan: MergePlan, placement: Placement, data: CalibrationData | None, options: EngineOptions | None
) -> Engine:
    from .after_merge import inner_plan
    from .surgery import SurgeryEngine
    from .twin import TwinEngine

    inner = inner_plan(plan)
    needs_data = get_merge_method(inner.config.merge_type).method_cls.needs_data(inner.config)
    engine = choose_engine(inner, placement, data if needs_data else None, options)
    is_exclusive = issubclass(get_merge_method(plan.config.merge_type).method_cls, ExclusiveMethod)
    return (TwinEngine if is_exclusive else SurgeryEngine)(plan, engine, placement, data, options)


def _engine_of(method: type[MergeMethod], config: MergeConfig) -> Callable[..., Engine]:
    """The class of the engine for a method that needs samples or a router."""
    if issubclass(method, BlockMethod):
        from .blockwise import BlockwiseEngine

        return BlockwiseEngine
    if issubclass(method, ModelMethod):
        from .end_to_end import EndToEndEngine

        return EndToEndEngine
    if issubclass(method, BackboneMethod) and is_block_wise(config):
        from .backbone_blocks import BackboneBlocksEngine

        return BackboneBlocksEngine
    if issubclass(method, MixtureMethod):
        from .mixtures import MixtureEngine

        return MixtureEngine
    if issubclass(method, BackboneMethod):
        from .backbones import BackboneEngine

        return BackboneEngine
    raise NotImplementedError(f"{method.__name__} follows none of the contracts of hf_merge.methods")


def is_divisible(plan: MergePlan) -> bool:
    """Whether several processes can carry out a plan together, each for a part of the parameters or of the samples."""
    method = get_merge_method(plan.config.merge_type).method_cls
    if plan.adapter is not None:
        return False
    return issubclass(method, TensorMethod) or (
        issubclass(method, BlockMethod) and method.divides_samples(plan.config)
    )


def work_bytes(plan: MergePlan) -> int:
    """Bytes of the finished blocks that lie beside the output folder until it is complete; 0 where nothing is merged block by block."""
    if issubclass(get_merge_method(plan.config.merge_type).method_cls, TensorMethod):
        return 0
    from .estimate_blocks import finished_blocks

    return finished_blocks(plan)


def is_block_wise(config: MergeConfig) -> bool:
    """Whether a method without a shared base merges one block after another."""
    return getattr(config, "block_wise", False)


def estimate_merge(
    plan: MergePlan,
    placement: Placement,
    samples: Samples | None = None,
    options: EngineOptions | None = None,
    *,
    timed: bool = False,
    folder: Path | None = None,
    num_proc: int | str | None = None,
) -> Estimate:
    """What a checked plan takes when it is written to a folder.

    Args:
        plan ([`MergePlan`]): The plan.
        placement ([`Placement`]): Where to compute.
        samples ([`Samples`], *optional*): The size of the samples, for methods that need them.
        options ([`EngineOptions`], *optional*): For the engines that need data.
        timed (`bool`): Whether to try how long it takes.
        folder (`Path`, *optional*): Where the result goes.
        num_proc (`int` or `str`, *optional*): As in [`count_processes`].
    """
    if plan.members:
        parts = [replace(one, config=plan.config, members={}) for one in (plan, *plan.members.values())]
        return together(
            [estimate_merge(one, placement, timed=timed, folder=folder, num_proc=num_proc) for one in parts]
        )
    method = get_merge_method(plan.config.merge_type).method_cls
    by_block = issubclass(method, BlockMethod)
    streamed = issubclass(method, (TensorMethod, OutputMethod)) and not all_adapters(plan.experts)
    estimate = traffic(plan, by_parameter=by_block or streamed)
    if by_block:
        from .estimate_blocks import block_disk, blockwise_memory

        samples = samples or Samples(0, 0)
        estimate.memory = blockwise_memory(plan, placement, samples, options)
        estimate.disk = block_disk(plan, samples, options)
        if not samples.count:
            estimate.notes.append("without the activations of samples: say how many there are")
    elif issubclass(method, ModelMethod):
        from .estimate_models import end_to_end_memory

        samples = samples or Samples(0, 0)
        estimate.memory = end_to_end_memory(plan, placement, samples, options)
        if not estimate.memory:
            estimate.notes.append(f"the memory of '{plan.config.merge_type}' is not estimated")
        elif not samples.count:
            estimate.notes.append("without the activations of samples: say how many there are")
        start = plan.config.start_config().merge_type
        if issubclass(get_merge_method(start).method_cls, BlockMethod):
            estimate.notes.append(f"without the start, which '{start}' makes block by block")
    elif streamed:
        groups = plan.target.save_groups(plan.outputs)
        if tensor_engine(plan, placement).can_fork():
            estimate.num_proc = min(count_processes(plan, placement, groups, num_proc), len(groups))
        elif isinstance(num_proc, int) and num_proc > 1:
            estimate.notes.append(NOT_FORKED.format(num_proc))
        estimate.memory = streaming_memory(plan, placement, groups, estimate.num_proc)
        if timed:
            from .timing import merge_seconds

            estimate.seconds = merge_seconds(plan, placement, estimate, folder)
    else:
        estimate.notes.append(f"memory and time are not estimated for this merge with '{plan.config.merge_type}'")
    return estimate
