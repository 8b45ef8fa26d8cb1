"""How the ranks of a job divide calibration samples: each holds some rows of every batch, and what is learnt from them is summed.

A batch is the same samples on any number of ranks, so that the result is that of one process to the rounding of sums.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from ..data.batching import Batch
from ..data.calibration import TaskSamples
from ..errors import MergeError
from ..methods.block_base import BlockMonitor
from .block_runner import Key
from .options import EngineOptions
from .ranks import Ranks


_SHARED_OPTIONS = ("bf16", "gradient_accumulation_steps", "cache_dtype", "seed")


def own_batches(ranks: Ranks, batches: Sequence[Sequence[Batch]]) -> dict[Key, Batch]:
    """This rank's rows of every batch, by expert and number of the batch; batches that it has no row of are left out. Rows go round
    the ranks, so that none has more than one row more than another, also where batches are smaller than the job.

    Args:
        ranks ([`Ranks`]): Who divides the samples.
        batches (`Sequence[Sequence[Batch]]`): Of every expert.
    """
    keyed = {(task, index): batch for task, one in enumerate(batches) for index, batch in enumerate(one)}
    if ranks.size == 1:
        return keyed
    found, dealt = {}, 0
    for key in sorted(keyed, key=lambda key: key[::-1]):  # an update takes a batch of every expert
        rows = _rows(keyed[key].count, ranks.size, (ranks.rank - dealt) % ranks.size)
        dealt += keyed[key].count
        if rows:
            found[key] = keyed[key].rows(rows.start, rows.stop)
    return dict(sorted(found.items()))


def _rows(count: int, parts: int, part: int) -> range:
    """One of `parts` runs of `count` rows; the first ones have one row more where they are not equal."""
    size, more = divmod(count, parts)
    start = part * size + min(part, more)
    return range(start, start + size + (part < more))


def check_samples(ranks: Ranks, samples: TaskSamples, options: EngineOptions) -> None:
    """All ranks are given the same samples and options.

    Raises:
        MergeError: A rank has others than rank 0.
    """
    if ranks.size == 1:
        return
    given = ranks.gather({name: getattr(options, name) for name in _SHARED_OPTIONS})
    for name in _SHARED_OPTIONS:
        values = [str(one[name]) for one in given]
        if len(set(values)) > 1:
            raise MergeError(
                f"The ranks were given different values of '{name}': {', '.join(values)}. Pass the same args on all."
            )
    prints = ranks.gather(samples.fingerprint())
    other = next((rank for rank, print_of_rank in enumerate(prints) if print_of_rank != prints[0]), None)
    if other is not None:
        raise MergeError(
            f"Rank {other} was given other calibration samples than rank 0: pass all samples, in one order, on every rank; the merge "
            "divides them. A DataLoader that shuffles or is prepared for several processes gives each rank others."
        )


class RankMonitor(BlockMonitor):
    """The monitor of rank 0 is told, and what it decides is done on all ranks.

    Args:
        monitor ([`BlockMonitor`]): Of this rank.
        ranks ([`Ranks`]): Who trains.
    """

    def __init__(self, monitor: BlockMonitor, ranks: Ranks):
        self.monitor = monitor if ranks.is_first else BlockMonitor()
        self.ranks = ranks

    def begin(self, blocks: int) -> None:
        self.monitor.begin(blocks)

    def end(self) -> None:
        self.monitor.end()

    def begin_block(
        self, name: str, module: nn.Module, optimizer: torch.optim.Optimizer, epochs: int, steps: int
    ) -> None:
        self.monitor.begin_block(name, module, optimizer, epochs, steps)

    def begin_epoch(self) -> None:
        self.monitor.begin_epoch()

    def begin_step(self) -> None:
        self.monitor.begin_step()

    def end_step(self, loss: float, learning_rate: float) -> bool:
        return self.ranks.gather(self.monitor.end_step(loss, learning_rate))[0]

    def end_epoch(self, loss: float) -> bool:
        return self.ranks.gather(self.monitor.end_epoch(loss))[0]

    def end_block(self) -> None:
        self.monitor.end_block()
