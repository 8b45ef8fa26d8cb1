"""Which engine carries out a plan, from the contract of its method."""

from __future__ import annotations

from typing import Protocol

from ..checkpoints.conversion import SaveGroup
from ..data.calibration import CalibrationData
from ..methods.base import TensorMethod
from ..methods.block_base import BlockMethod
from ..registry import get_merge_method
from .blockwise import BlockwiseEngine, initial_plan
from .options import EngineOptions
from .placement import Placement
from .plan import MergePlan
from .streaming import MergeReport, Sink, StreamingEngine


class Engine(Protocol):
    """Carries out a plan.

    **Attributes**:
        - **identity** (`str`) -- What the result depends on beside the plan, such as the samples.
    """

    identity: str

    def run(self, groups: list[SaveGroup], sink: Sink) -> MergeReport: ...


def find_data_problems(plan: MergePlan, data: CalibrationData | None, has_options: bool = False) -> list[str]:
    """What is wrong with the samples that a merge is given, or with their absence.

    Args:
        plan ([`MergePlan`]): The plan.
        data ([`CalibrationData`], *optional*): The samples.
        has_options (`bool`): Whether callbacks or arguments were given, which only methods that need data have a use for.
    """
    name = plan.config.merge_type
    method = get_merge_method(name).method_cls
    if not method.requires_data:
        return (
            []
            if data is None
            else [f"The method '{name}' needs no data: leave the samples, callbacks and arguments out."]
        )
    problems = [
        f"A rule chooses '{other}', which needs data: only the recipe's own method may."
        for other in sorted({p.settings.merge_type for p in plan.parameters if p.action == "merge"} - {name})
        if get_merge_method(other).method_cls.requires_data
    ]
    if data is None:
        problems.append(
            f"The method '{name}' needs calibration samples: pass them by task, merge({{task: samples}}) or "
            "save_pretrained(folder, data={task: samples})."
        )
    else:
        problems += data.problems([source.name for source in plan.experts])
    if issubclass(method, BlockMethod) and not plan.problems:
        problems += initial_plan(plan).problems
    return problems


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
    if issubclass(method, BlockMethod):
        return BlockwiseEngine(plan, placement, data, options)
    if issubclass(method, TensorMethod):
        return StreamingEngine(plan, placement)
    raise NotImplementedError(f"{method.__name__} follows none of the contracts of hf_merge.methods")
