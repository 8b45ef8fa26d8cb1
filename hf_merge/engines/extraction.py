"""A fine-tuned model as an adapter of its base: the leading singular triplets of each task vector."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..adapters.writing import AdapterLayout
from ..checkpoints.folder import OutputFolder, check_output
from ..config import MergeConfig
from ..errors import ConfigError, NonFiniteError, PlanError
from ..low_rank import Factors, factorized
from ..methods.groups import keyed_generator
from ..methods.linalg import Triplets, randomized_triplets, singular_triplets
from ..progress import progress
from .adapter_output import AdapterSink, checkpoint_layout, matrix_of, result_layout, seal_adapter
from .choice import plan_merge
from .opening import Opening
from .plan import MergePlan, PlannedParameter
from .report import MergeReport


_OVERSAMPLING = 8
_POWER_ITERATIONS = 2


@dataclass
class Extraction:
    """How a fine-tune becomes an adapter.

    Args:
        rank (`int`, *optional*): The rank of every weight; the largest rank, where `energy` is given too.
        energy (`float`, *optional*): The part of ‖T‖² that every weight keeps, by the smallest rank that does.
        exact (`bool`): Decompose exactly instead of by a random range finder.
        include, exclude (`list[str]`, *optional*): Regular expressions on module names.
        keep_others (`bool`): Also save what factors cannot hold, whole: norms and biases that were trained.
        dtype (`str`): What the adapter is stored in.
        seed (`int`): Of the random range finder.
    """

    rank: int | None = None
    energy: float | None = None
    exact: bool = False
    include: list[str] | None = None
    exclude: list[str] | None = None
    keep_others: bool = True
    dtype: str = "float32"
    seed: int = 0
    opening: Opening = field(default_factory=Opening)

    def __post_init__(self):
        if self.rank is None and self.energy is None:
            raise ConfigError("Say how good the adapter has to be: rank=16, or energy=0.95.")
        if self.rank is not None and self.rank < 1:
            raise ConfigError(f"Invalid rank: {self.rank}. It must be at least 1.")
        if self.energy is not None and not 0 < self.energy <= 1:
            raise ConfigError(f"Invalid energy: {self.energy}. It must be in (0, 1].")


def extract_lora(model: Any, base_model: Any, folder: Path, settings: Extraction) -> MergeReport:
    """Writes the adapter that turns a base model into a fine-tune of it, as nearly as its rank allows.

    Args:
        model: The fine-tuned model: anything that a merge takes as an expert.
        base_model: The base model.
        folder (`Path`): Where the adapter goes; absent or empty.
        settings ([`Extraction`]): Rank, energy and what to take.

    Returns:
        [`MergeReport`]: For each weight `rank`, `discarded_energy` and `task_vector_norm`.

    Raises:
        PlanError: The models do not belong together, or nothing differs; lists every reason.
    """
    folder = Path(folder).absolute()
    config = MergeConfig.from_merge_type(
        "cat",
        output="adapter",
        adapter_rank=settings.rank or 1,
        include=settings.include,
        exclude=settings.exclude,
        dtype=settings.dtype,
        seed=settings.seed,
    )
    experts, base = settings.opening.models({"model": model}, base_model, infer=True)
    plan = plan_merge(config, experts, base)
    problems = plan.problems or check_output(folder, plan.nbytes)
    if problems:
        raise PlanError(problems)
    report = MergeReport(notes=list(plan.notes))
    changes = _changes(plan, settings, report)
    layout = _final_layout(plan, changes)
    plan.adapter = layout
    with OutputFolder(folder, checkpoint_layout(layout), str(uuid.uuid4())) as output:
        for name, change in changes.items():
            for key, tensor in layout.tensors(name, change).items():
                output.write(key, tensor)
        AdapterSink(plan, output.write).finish(report)
        seal_adapter(plan, output, report)
    return report


@torch.no_grad()
def _changes(plan: MergePlan, settings: Extraction, report: MergeReport) -> dict[str, Factors | Tensor]:
    """What the adapter holds for every parameter that differs; whole values stay as they are."""
    planned = plan.adapter.planned
    expert, changes, left_out = plan.experts[0], {}, []
    with progress(sum(parameter.info.nbytes for parameter in plan.parameters), "Extracting") as bar:
        for parameter in plan.parameters:
            bar.update(parameter.info.nbytes)
            value = expert.read(parameter.experts[0])
            if not torch.isfinite(value).all():
                raise NonFiniteError(
                    f"{expert} holds NaN or infinity in '{parameter.experts[0]}': no adapter can be taken from it."
                )
            change = None if parameter.base is None else value.float() - plan.base.read(parameter.base).float()
            if change is not None and not change.any():
                continue
            if parameter.name in planned.ranks:
                changes[parameter.name] = _decompose(parameter, change, settings, report)
            elif settings.keep_others or change is None:
                changes[parameter.name] = value if parameter.name in planned.values else change
            else:
                left_out.append(parameter.name)
    if left_out:
        report.notes.append(
            f"the changes of {len(left_out)} norms, biases and other parameters that factors cannot hold are left out"
        )
    if not any(isinstance(change, Factors) for change in changes.values()):
        raise PlanError(["The model and its base do not differ in any weight that an adapter can hold."])
    return changes


def _decompose(parameter: PlannedParameter, change: Tensor, settings: Extraction, report: MergeReport) -> Factors:
    matrix = matrix_of(parameter.kind, change).double()
    whole = matrix.square().sum().item()
    most = min(matrix.shape[-2:])
    most = most if settings.rank is None else min(most, settings.rank)
    if matrix.dim() > 2:
        factors, lost = _stack(matrix, most, settings)
    else:
        found = _leading(parameter, matrix, most, settings, whole)
        factors, lost = found.factors(1.0, change.dtype), max(0.0, 1 - found.values.square().sum().item() / whole)
    report.parameters[parameter.name] = {
        "kind": parameter.kind.value,
        "rank": factors.rank,
        "discarded_energy": lost,
        "task_vector_norm": whole**0.5,
    }
    return factors.to(change.dtype)


def _leading(parameter: PlannedParameter, matrix: Tensor, most: int, settings: Extraction, whole: float) -> Triplets:
    """The triplets of the wanted rank, or the smallest number of them that keeps the energy: it is doubled until it does."""
    rank = most if settings.energy is None else min(8, most)
    while True:
        found = _triplets(parameter, matrix, rank, settings)
        kept = found.values.square().cumsum(0) / whole
        if settings.energy is None or rank == most or kept[-1] >= settings.energy:
            break
        rank = min(2 * rank, most)
    if settings.energy is None:
        return found
    enough = torch.nonzero(kept >= settings.energy * (1 - 1e-12))
    return found.top(int(enough[0]) + 1) if len(enough) else found


def _triplets(parameter: PlannedParameter, matrix: Tensor, rank: int, settings: Extraction) -> Triplets:
    if settings.exact or 4 * (rank + _OVERSAMPLING) > min(matrix.shape):
        return singular_triplets(matrix).top(rank)
    generator = keyed_generator(settings.seed, parameter.name, "extraction")
    return randomized_triplets(matrix, rank, _OVERSAMPLING, _POWER_ITERATIONS, generator)


def _stack(matrix: Tensor, most: int, settings: Extraction) -> tuple[Factors, float]:
    """The experts of a mixture, which share one rank."""
    factors, lost = factorized(matrix, most)
    if settings.energy is None:
        return factors, lost
    energies = (
        factors.left.square().sum(dim=-2).square().sum(dim=0)
    )  # both factors hold the roots of the singular values
    kept = energies.cumsum(0) / matrix.square().sum()
    enough = torch.nonzero(kept >= settings.energy * (1 - 1e-12))
    rank = int(enough[0]) + 1 if len(enough) else most
    return Factors(factors.left[..., :rank], factors.right[..., :rank, :]), max(0.0, 1 - kept[rank - 1].item())


def _final_layout(plan: MergePlan, changes: dict[str, Factors | Tensor]) -> AdapterLayout:
    """The layout of what differs, under the ranks that were found."""
    planned = plan.adapter.planned
    planned.ranks = {name: change.rank for name, change in changes.items() if isinstance(change, Factors)}
    planned.values = [name for name in planned.values if name in changes]
    planned.vectors = [name for name in planned.vectors if name in changes]
    planned.modules = [module for module in planned.modules if _holds_value(module, planned.values)]
    return result_layout(plan, planned)


def _holds_value(module: str, values: Sequence[str]) -> bool:
    return any(name.startswith(f"{module}.") for name in values)
