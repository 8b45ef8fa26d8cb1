"""Merges whose result is an adapter: which changes it holds and as what, and the sink that brings merged values into its files."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from ..adapters.opening import SAFE_WEIGHTS
from ..adapters.reading import Added
from ..adapters.writing import AdapterLayout, AdapterPlan, can_hold
from ..card import adapter_card
from ..checkpoints.folder import OutputFolder
from ..checkpoints.layout import CheckpointLayout, ShardLayout
from ..checkpoints.storage import TensorInfo
from ..errors import MergeError, PlanError
from ..kinds import ParameterKind
from ..low_rank import Factors, factorized, truncated
from ..methods.base import TensorMethod
from ..registry import get_merge_method
from .adapters import merges_changes
from .plan import MergePlan, PlannedParameter
from .report import MergeReport
from .retokenized import RetokenizedSource
from .sealing import HEADS_FOLDER, head_tensors, write_records


_STACKED = (ParameterKind.EXPERT_LINEAR, ParameterKind.TRANSPOSED_EXPERT_LINEAR)


def plan_adapter(plan: MergePlan) -> None:
    """Turns the plan of a merge into one whose result is an adapter; adds what prevents it to the problems.

    Parameters that no expert changes leave the plan: they stay the base model's.
    """
    if plan.base is None:
        plan.problems.append(
            "output='adapter' is a change of a base model: pass base_model=... (`base_model` in a recipe, --base on the command line)."
        )
    if plan.config.align is not None or plan.config.tokens or plan.config.pad_to_multiple_of is not None:
        plan.problems.append("output='adapter' cannot align experts or change the vocabulary: use output='model'.")
    elif any(isinstance(source, RetokenizedSource) for source in plan.sources):
        plan.problems.append(
            "The vocabularies of the models differ, and output='adapter' is a change of the base model with its own: use "
            "output='model'."
        )
    if plan.problems:
        return
    try:
        plan.parameters = [parameter for parameter in plan.parameters if _is_changed(plan, parameter)]
        planned = AdapterPlan(modules=_whole_modules(plan))
        for parameter in plan.parameters:
            # Rounded once, when the factors are written.
            parameter.info = TensorInfo(parameter.info.shape, torch.float32)
            _place(plan, planned, parameter)
        _add_twins(plan, planned)
        if not plan.problems:
            plan.adapter = result_layout(plan, planned)
    except PlanError as error:
        plan.problems += error.problems
    except MergeError as error:
        plan.problems.append(str(error))


def _is_changed(plan: MergePlan, parameter: PlannedParameter) -> bool:
    if parameter.action == "copy":
        return parameter.copy_from != "base" and plan.target.anatomy.parameters[parameter.name].is_task_head
    return any(
        not source.is_adapter or name in source.deltas
        for source, name in zip(plan.experts, parameter.experts, strict=True)
    )


def _whole_modules(plan: MergePlan) -> list[str]:
    """The modules that some expert saves whole, by their names in the result."""
    canonical = plan.target.anatomy.by_canonical
    found = set()
    for source in plan.experts:
        if source.is_adapter:
            for module in source.whole_modules:
                leaf = next(name for name in source.anatomy.parameters if name.startswith(f"{module}."))
                name = canonical.get(source.anatomy.canonical(leaf))
                if name is not None:
                    found.add(name.removesuffix(leaf[len(module) :]))
    return sorted(found)


def _place(plan: MergePlan, planned: AdapterPlan, parameter: PlannedParameter) -> None:
    """Decides whether a parameter's change is written as factors, as a bias of the second factor, or whole."""
    name = parameter.name
    owner = plan.target.shell.get_submodule(name.rpartition(".")[0])
    inside = any(name.startswith(f"{module}.") for module in planned.modules)
    if parameter.action == "copy" or inside or parameter.base is None:
        planned.values.append(name)
        if not inside:
            planned.modules.append(name.rpartition(".")[0])
        return
    deltas = _deltas(plan, parameter)
    holds = (can_hold(owner) and name.endswith(".weight")) or parameter.kind in _STACKED
    if not holds and deltas is not None and any(delta is not None and delta.factors is not None for delta in deltas):
        holds = True  # a parameter that was targeted directly
    if holds:
        rank = _rank(plan, parameter, deltas)
        if rank is not None:
            planned.ranks[name] = rank
    elif deltas is not None and all(delta is None or isinstance(delta, Added) for delta in deltas):
        planned.vectors.append(name)
    else:
        planned.values.append(name)
        if not name.endswith(".bias"):
            planned.modules.append(name.rpartition(".")[0])


def _add_twins(plan: MergePlan, planned: AdapterPlan) -> None:
    """Weights that the result shares with a planned one, because no expert has untied them."""
    own = {parameter.name for parameter in plan.parameters}
    for twin, name in plan.target.anatomy.ties.items():
        if name in own and twin not in own and twin not in plan.target.parameters:
            planned.twins.setdefault(name, []).append(twin)
            if name in planned.values:
                planned.modules.append(twin.rpartition(".")[0])


def _deltas(plan: MergePlan, parameter: PlannedParameter) -> list | None:
    """The experts' changes, `None` for those that leave the parameter alone; `None` where an expert is a full model."""
    if not all(source.is_adapter for source in plan.experts):
        return None
    return [source.deltas.get(name) for source, name in zip(plan.experts, parameter.experts, strict=True)]


def _rank(plan: MergePlan, parameter: PlannedParameter, deltas: list | None) -> int | None:
    shape = parameter.info.shape
    stack = parameter.kind in _STACKED
    rows = shape[1] if stack else shape[0]
    columns = shape[2] if stack else TensorInfo(shape[1:], torch.uint8).nbytes
    limit = min(rows, columns)
    if plan.config.adapter_rank is not None:
        limit = min(limit, plan.config.adapter_rank)
    if not merges_changes(parameter) and plan.config.adapter_rank is None:
        message = (
            f"'{parameter.settings.merge_type}' with these settings is not a function of the adapters' changes alone, so "
            "output='adapter' can only approximate its result: choose the rank with adapter_rank=..., or use 'cat' or "
            "'task_arithmetic'."
        )
        plan.problems += [] if message in plan.problems else [message]
        return None
    changed = [delta for delta in deltas if delta is not None] if deltas is not None else []
    if deltas is None or any(delta.factors is None for delta in changed):
        if plan.config.adapter_rank is None:
            message = _no_rank(plan)
            plan.problems += [] if message in plan.problems else [message]
            return None
        return limit
    method = get_merge_method(parameter.settings.merge_type).method_cls
    ranks = [delta.factors.rank for delta in changed]
    known = method.merged_rank(ranks, parameter.settings) if issubclass(method, TensorMethod) else None
    if known is None or parameter.then:
        known = sum(ranks) if plan.config.adapter_rank is None else limit
        note = f"'{parameter.settings.merge_type}' does not keep the rank of the experts: the adapter approximates its result"
        plan.notes += [] if note in plan.notes else [note]
    return max(1, min(limit, known))


def _no_rank(plan: MergePlan) -> str:
    culprit = next(
        source
        for source in plan.experts
        if not source.is_adapter
        or any(delta.factors is None and not isinstance(delta, Added) for delta in source.deltas.values())
    )
    return (
        f"{culprit} changes weights by more than two factors, so output='adapter' can only approximate the result: choose its "
        "rank with adapter_rank=..."
    )


def result_layout(plan: MergePlan, planned: AdapterPlan) -> AdapterLayout:
    """The files of an adapter for the plan's base model."""
    adapters = [source for source in plan.experts if source.is_adapter]
    tasks = {str(source.adapter.config.task_type) for source in adapters if source.adapter.config.task_type}
    wanted = getattr(torch, plan.config.dtype) if plan.config.dtype else None
    dtypes = [source.adapter_dtype for source in adapters] or [torch.float32]
    dtype = wanted or reduce(torch.promote_types, dtypes)
    base, model_class = plan.base.reference, plan.target.model_class
    task = next(iter(tasks)) if len(tasks) == 1 else None
    # What PEFT's auto classes load an adapter without a task by.
    named = {"base_model_class": model_class.__name__, "parent_library": model_class.__module__}
    return AdapterLayout(
        model_class,
        plan.target.config,
        planned,
        dtype,
        task_type=task,
        auto_mapping=named if task is None else None,
        base_model_name_or_path=base.model,
        revision=base.revision,
    )


class AdapterSink:
    """Takes merged values, or merged changes, by parameter and writes the adapter's tensors.

    Args:
        plan ([`MergePlan`]): With its adapter's layout.
        report ([`MergeReport`]): Gets the energy that ranks discard.
        write (`Callable`): Takes the name on disk and the tensor.
        wants (`Callable`): Whether any of some names on disk is still to be written.
    """

    def __init__(
        self,
        plan: MergePlan,
        write: Callable[[str, Tensor], None],
        wants: Callable[[list[str]], bool] = lambda keys: True,
    ):
        self.plan = plan
        self.layout = plan.adapter
        self.discarded: dict[str, float] = {}
        self._write = write
        self._wants = wants
        self._kinds = {parameter.name: parameter.kind for parameter in plan.parameters}
        self._bases = {parameter.name: parameter.base for parameter in plan.parameters}

    def wants(self, names: list[str]) -> bool:
        return self._wants([key for name in names for key in self.layout.keys(name)])

    def write(self, name: str, value: Tensor) -> None:
        """A merged value."""
        if name in self.layout.planned.values:
            self._put(name, value)
            return
        base = self.plan.base.read(self._bases[name])
        self.write_change(name, value.float() - base.float())

    def write_change(self, name: str, change: Factors | Tensor) -> None:
        """A merged change."""
        rank = self.layout.planned.ranks.get(name)
        if rank is not None:
            if isinstance(change, Factors):
                change, lost = truncated(change, rank)
            else:
                change, lost = factorized(matrix_of(self._kinds[name], change), rank)
            self.discarded[name] = lost
        self._put(name, change)

    def _put(self, name: str, value: Factors | Tensor) -> None:
        for key, tensor in self.layout.tensors(name, value).items():
            self._write(key, tensor)

    def finish(self, report: MergeReport) -> None:
        """Writes what the file format holds beside the plan, and the discarded energy into the report."""
        for key, name in self.layout.unplanned:
            info = self.layout.infos[key]
            if self._wants([key]):
                base = self.plan.base
                value = (
                    torch.zeros(info.shape) if self.layout.is_extra(key) else base.read(_base_name(self.plan, name))
                )
                self._write(key, value.to(info.dtype))
        for name, lost in self.discarded.items():
            report.parameters.setdefault(name, {})["discarded_energy"] = lost
        if self.discarded and max(self.discarded.values()) > 1e-9:
            worst = max(self.discarded, key=self.discarded.get)
            mean = sum(self.discarded.values()) / len(self.discarded)
            report.notes.append(
                f"the rank of the adapter discards {mean:.2%} of the energy of the merged changes on average, at most "
                f"{self.discarded[worst]:.2%} ('{worst}'): a larger adapter_rank keeps more"
            )


def matrix_of(kind: ParameterKind, change: Tensor) -> Tensor:
    """A change as the matrix, or the stack of matrices, that LoRA factorises: filters of convolutions are its rows."""
    return change if kind in _STACKED else change.flatten(1)


def _base_name(plan: MergePlan, name: str) -> str:
    return plan.base.by_canonical[plan.target.anatomy.canonical(name)]


def checkpoint_layout(layout: AdapterLayout) -> CheckpointLayout:
    """The one file that PEFT reads."""
    return CheckpointLayout([ShardLayout(SAFE_WEIGHTS, layout.infos)])


def seal_adapter(plan: MergePlan, output: OutputFolder, report: MergeReport) -> None:
    """Writes everything but the weights and makes the folder appear.

    Args:
        plan ([`MergePlan`]): What was merged.
        output ([`OutputFolder`]): With the weights written.
        report ([`MergeReport`]): Of the run.
    """
    folder = output.partial
    plan.adapter.config.save_pretrained(str(folder))
    for task, head in plan.heads.items():
        source = next(source for source in plan.experts if source.name == task)
        _save_with_head(plan, head_tensors(source, head), source, folder, folder / HEADS_FOLDER / task)
    write_records(plan, output, report, adapter_card)


def _save_with_head(plan: MergePlan, head: dict[str, Tensor], source: Any, folder: Path, target: Path) -> None:
    """The same adapter with another task's head: a folder that PEFT loads."""
    layout = AdapterLayout(
        source.model_class,
        source.config,
        plan.adapter.planned,
        next(iter(plan.adapter.infos.values())).dtype,
        task_type=plan.adapter.config.task_type,
        base_model_name_or_path=plan.adapter.config.base_model_name_or_path,
        revision=plan.adapter.config.revision,
    )
    own = {key: tensor for name, value in head.items() for key, tensor in layout.tensors(name, value).items()}
    with safe_open(folder / SAFE_WEIGHTS, framework="pt") as file:
        tensors = {key: own[key] if key in own else file.get_tensor(key) for key in layout.infos}
    target.mkdir(parents=True)
    (target / SAFE_WEIGHTS).write_bytes(save(tensors, metadata={"format": "pt"}))
    config = copy.deepcopy(layout.config)
    config.save_pretrained(str(target))
