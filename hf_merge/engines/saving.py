"""From a checked plan and its engine to a folder: which files, made by whom, and sealed."""

from __future__ import annotations

import logging
import socket
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoints.folder import OutputFolder
from ..checkpoints.layout import CheckpointLayout, plan_layout
from ..checkpoints.names import SaveGroup
from ..hub import MEMBERS_FOLDER
from .choice import Engine
from .division import run_part, shared_output
from .estimate import NOT_FORKED, count_processes
from .identity import fingerprint
from .placement import Placement
from .plan import MergePlan
from .ranks import Ranks
from .report import MergeReport
from .sealing import seal
from .streaming import StreamingEngine, on_disk


if TYPE_CHECKING:
    from transformers import PreTrainedModel


logger = logging.getLogger(__name__)


def save_on_ranks(ranks: Ranks, divided: bool, save: Callable[[Ranks], MergeReport]) -> MergeReport:
    """Saves on all ranks together, or on rank 0 while the others wait. Inside a step of all ranks.

    Args:
        ranks ([`Ranks`]): Who is there.
        divided (`bool`): Whether this rank can do a part of it.
        save (`Callable`): Saves as one of the ranks that it is given.
    """
    if ranks.size == 1 or all(ranks.gather(divided)):
        return save(ranks)
    logger.warning(
        "Rank 0 merges and the other ranks wait: only merges into a model, without data or block by block, are divided."
    )
    return ranks.on_first(lambda: save(Ranks()))


@contextmanager
def temporary_folder(ranks: Ranks) -> Iterator[tuple[Path, bool]]:
    """A folder that rank 0 makes and removes, and whether all ranks see it: on other hosts they do not. Inside a step of all ranks.

    Args:
        ranks ([`Ranks`]): Who needs it.
    """
    with tempfile.TemporaryDirectory() as own:
        places = ranks.gather((own, socket.gethostname()))
        yield Path(places[0][0]), len({host for _, host in places}) == 1


def save_merge(
    ranks: Ranks,
    plan: MergePlan,
    engine: Engine,
    folder: Path,
    max_shard_size: int | str,
    num_proc: int | str | None = None,
) -> MergeReport:
    """Runs the engine into a folder. Inside a step of all ranks.

    Args:
        ranks ([`Ranks`]): Who merges; several only where `is_divisible` says so.
        plan ([`MergePlan`]): A checked plan.
        engine ([`Engine`]): Of the plan.
        folder (`Path`): The folder.
        max_shard_size (`int` or `str`): The largest weight file.
        num_proc (`int` or `str`, *optional*): As in [`count_processes`].
    """
    if plan.adapter is not None:
        return _save_adapter(plan, engine, folder)
    groups, layout = _files(plan, max_shard_size)
    if isinstance(engine, StreamingEngine) and engine.can_fork():
        engine.num_proc = min(count_processes(plan, engine.placement, groups, num_proc, ranks.size), len(groups))
        engine.report.num_proc = engine.num_proc
    elif isinstance(num_proc, int) and num_proc > 1:
        engine.report.notes.append(NOT_FORKED.format(num_proc))
    with shared_output(ranks, folder, plan, layout, engine.identity) as output:
        kept = output.kept_rows()
        if output.finished:
            found = f"{len(output.finished)} of {len(layout.shards)} weight files"
            engine.report.notes.append(f"continued: {found} were there; seconds and memory are those of the others")
        names = {key: group.names for group in groups for key in group.disk}
        output.rows_of = lambda shard: _rows(engine.report, [name for key in shard.infos for name in names[key]])
        report = engine.run(groups, output) if ranks.size == 1 else run_part(ranks, engine, groups, output)
        report.parameters = _completed(report.parameters, kept, groups)
        if ranks.is_first:
            _save_members(plan, output.partial, max_shard_size, num_proc)
            seal(plan, output, report)
    return report


def _rows(report: MergeReport, names: Iterable[str]) -> dict[str, Any]:
    return {name: report.parameters[name] for name in names if name in report.parameters}


def _completed(rows: dict[str, Any], kept: Mapping[str, Any], groups: list[SaveGroup]) -> dict[str, Any]:
    """The rows of this run with those of the run that it continues, in the order of writing."""
    missing = [
        name for group in groups for name in group.names if name not in rows and isinstance(kept.get(name), dict)
    ]
    if not missing:
        return rows
    known = {name: kept[name] for name in missing} | rows
    order = dict.fromkeys(name for group in groups for name in group.names)
    return {name: known[name] for name in (*order, *known) if name in known}


def _save_adapter(plan: MergePlan, engine: Engine, folder: Path) -> MergeReport:
    from .adapter_output import AdapterSink, checkpoint_layout, seal_adapter

    layout = checkpoint_layout(plan.adapter)
    with OutputFolder(folder, layout, fingerprint(plan, layout, engine.identity)) as output:
        sink = AdapterSink(plan, output.write, output.wants)
        report = engine.run(plan.groups, sink)
        sink.finish(report)
        seal_adapter(plan, output, report)
    return report


def save_model(
    plan: MergePlan, model: PreTrainedModel, report: MergeReport, folder: Path, max_shard_size: int | str
) -> None:
    """Writes a model that was merged in memory.

    Args:
        plan, folder, max_shard_size: As in [`save_merge`].
        model ([`~transformers.PreTrainedModel`]): The result.
        report ([`MergeReport`]): Of its merge.
    """
    groups, layout = _files(plan, max_shard_size)
    state = model.state_dict()
    with OutputFolder(folder, layout, fingerprint(plan, layout, str(uuid.uuid4()))) as output:
        for group in groups:
            merged = {name: state[name].to("cpu", plan.outputs[name].dtype) for name in group.names}
            for key, tensor in on_disk(plan, group, merged).items():
                output.write(key, tensor)
        _save_members(plan, output.partial, max_shard_size)
        seal(plan, output, report)


def _save_members(plan: MergePlan, folder: Path, max_shard_size: int | str, num_proc: int | str | None = None) -> None:
    """Writes the experts that are kept whole, each as a folder that loads by itself."""
    for name, member in plan.members.items():
        engine = StreamingEngine(member, Placement())
        save_merge(Ranks(), member, engine, folder / MEMBERS_FOLDER / name, max_shard_size, num_proc)


def _files(plan: MergePlan, max_shard_size: int | str) -> tuple[list[SaveGroup], CheckpointLayout]:
    """What is written together, and the weight files."""
    groups = plan.target.save_groups(plan.outputs)
    return groups, plan_layout({key: info for group in groups for key, info in group.disk.items()}, max_shard_size)
