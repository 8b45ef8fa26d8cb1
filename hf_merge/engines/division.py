"""How the ranks of a job divide a merge: whole shards to each, one output folder, one report."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoints.folder import OutputFolder, OutputPart
from ..checkpoints.layout import CheckpointLayout
from ..checkpoints.names import SaveGroup
from ..checkpoints.shards import ShardWriter
from ..errors import MergeError
from ..methods.base import TensorMethod
from ..registry import get_merge_method
from .identity import fingerprint, outline
from .plan import MergePlan
from .ranks import Ranks


if TYPE_CHECKING:
    from .blockwise import BlockwiseEngine
    from .report import MergeReport
    from .streaming import StreamingEngine


logger = logging.getLogger(__name__)


def divide(sizes: Sequence[int], count: int) -> list[range]:
    """Runs of neighbours, so that what lies in two neighbouring shards is mostly computed once; the largest run is as small as
    possible.

    Args:
        sizes (`Sequence[int]`): Of the things to divide, in bytes.
        count (`int`): How many runs; the last ones may be empty.
    """
    low, high = max(sizes, default=0), sum(sizes)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if len(_runs(sizes, middle)) <= count else (middle + 1, high)
    runs = _runs(sizes, low)
    return runs + [range(0)] * (count - len(runs))


def _runs(sizes: Sequence[int], limit: int) -> list[range]:
    """Runs of at most `limit` in sum, each as long as possible."""
    runs, start, total = [], 0, 0
    for index, size in enumerate(sizes):
        if total + size > limit and index > start:
            runs.append(range(start, index))
            start, total = index, 0
        total += size
    return [*runs, range(start, len(sizes))] if sizes else []


@contextmanager
def shared_output(
    ranks: Ranks, folder: Path, plan: MergePlan, layout: CheckpointLayout, identity: str = ""
) -> Iterator[ShardWriter]:
    """The output folder, made by rank 0, in which every rank writes shards of its own. Inside a step of all ranks.

    Args:
        ranks ([`Ranks`]): Who writes.
        folder (`Path`): The final folder.
        plan ([`MergePlan`]): What is merged.
        layout ([`CheckpointLayout`]): The weight files.
        identity (`str`): What the result depends on beside the plan.

    Raises:
        OutputError: The folder cannot be written, or not every rank sees it.
        MergeError: A rank plans another merge than rank 0.
    """
    mark = outline(plan, layout) if ranks.size > 1 else ""
    if ranks.is_first:
        with OutputFolder(folder, layout, fingerprint(plan, layout, identity)) as output:
            ranks.gather((output.fingerprint, output.finished, mark))
            _take_part(output, ranks)
            idle = ranks.size - len(layout.shards)
            if idle > 0 and issubclass(get_merge_method(plan.config.merge_type).method_cls, TensorMethod):
                logger.warning(
                    "The result has %d weight file(s), which %d of the ranks have no part of: a smaller max_shard_size divides it "
                    "further.",
                    len(layout.shards),
                    idle,
                )
            yield output
        return
    print_of_first, finished, mark_of_first = ranks.gather(None)[0]
    if mark != mark_of_first:
        raise MergeError(
            f"Rank {ranks.rank} plans another merge than rank 0: all ranks need the same recipe, models and version of hf_merge."
        )
    with OutputPart(folder, layout, print_of_first) as output:
        output.finished = finished
        _take_part(output, ranks)
        yield output


def _take_part(output: ShardWriter, ranks: Ranks) -> None:
    """Leaves to the other ranks their parts of the shards that are not finished."""
    shards = [shard for shard in output.layout.shards if shard.filename not in output.finished]
    own = divide([shard.nbytes for shard in shards], ranks.size)[ranks.rank]
    output.leave(shard.filename for index, shard in enumerate(shards) if index not in own)


def run_part(
    ranks: Ranks, engine: StreamingEngine | BlockwiseEngine, groups: list[SaveGroup], output: ShardWriter
) -> MergeReport:
    """Merges what this rank writes, and returns the report of all ranks when all of them are done.

    Args:
        ranks ([`Ranks`]): Who merges.
        engine ([`StreamingEngine`] or [`BlockwiseEngine`]): Of the plan.
        groups (`list[SaveGroup]`): All parameters of the result.
        output ([`ShardWriter`]): Where this rank's part goes.
    """
    engine.ranks = ranks

    def run() -> MergeReport:
        try:
            return engine.run(groups, output)
        except Exception:
            output.stop()
            output.close()  # before rank 0 removes the folder
            raise

    return ranks.step(run)


def gather_report(ranks: Ranks, report: MergeReport, noticed: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Makes the report of a rank's part that of all ranks: rows in the order of the ranks, the longest times, the largest memory.

    Args:
        ranks ([`Ranks`]): Who merged.
        report ([`MergeReport`]): This rank's; it is changed.
        noticed (`Mapping[str, Any]`): By method, what it noticed on this rank.

    Returns:
        `list`: `noticed` of every rank.
    """
    if ranks.size == 1:
        return [noticed]
    parts = ranks.gather((report.parameters, report.seconds, report.peak_memory_bytes, noticed))
    report.parameters = {name: row for rows, *_ in parts for name, row in rows.items()}
    report.seconds = {phase: max(seconds[phase] for _, seconds, *_ in parts) for phase in report.seconds}
    report.peak_memory_bytes = max(peak for _, _, peak, _ in parts)
    report.ranks = [
        {"parameters": len(rows), "seconds": seconds, "peak_memory_bytes": peak} for rows, seconds, peak, _ in parts
    ]
    return [noticed for *_, noticed in parts]
