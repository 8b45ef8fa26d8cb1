"""The processes of a `torch.distributed` job, its ranks: joining them, exchanging small objects, summing tensors, and failing together.

Everything goes over a gloo group of its own, so that a group that the user initialised, with NCCL or any timeout, is left as it is.
"""

from __future__ import annotations

import atexit
import logging
import os
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ..checkpoints.shards import StoppedError
from ..errors import MergeError, RankLostError


logger = logging.getLogger(__name__)

K = TypeVar("K")
T = TypeVar("T")

MEETING = timedelta(minutes=30)
"""How long the ranks wait for one another to begin; torch's own default."""
REMINDER = 60.0
"""After how many seconds of it a warning says so."""
PATIENCE = timedelta(days=30)
"""How long a rank waits for the work of another. The end of a process is noticed at once."""
_ENVIRONMENT = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass
class _Failure:
    """Why a rank failed, for the others."""

    rank: int
    host: str
    message: str
    stopped: bool


@dataclass
class Ranks:
    """The ranks that work together. Made by [`all_ranks`]; without arguments, this process alone.

    All ranks have to call [`~Ranks.gather`], [`~Ranks.all_reduce`], [`~Ranks.step`] and [`~Ranks.on_first`] in the same order.

    Args:
        rank (`int`): Of this process.
        size (`int`): How many there are.
        group (`ProcessGroup`, *optional*): Connects them; gloo.
    """

    rank: int = 0
    size: int = 1
    group: Any = None
    _depth: int = field(default=0, repr=False)
    _failed: bool = field(default=False, repr=False)
    _lost: bool = field(default=False, repr=False)

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which makes folders and speaks to the user."""
        return self.rank == 0

    def gather(self, value: T) -> list[T]:
        """The values of all ranks, in their order.

        Args:
            value: Anything that can be pickled.

        Raises:
            MergeError: Another rank failed in the meantime.
            RankLostError: Another rank ended.
        """
        values, failures = self._exchange(value, None)
        self._raise(failures)
        return values

    def all_reduce(self, tensors: Mapping[K, Tensor], device: torch.device) -> dict[K, Tensor]:
        """Sums tensors over all ranks, by key, with the same bits on all of them. A key that a rank does not have counts as zero there.

        Args:
            tensors (`Mapping[K, torch.Tensor]`): Of equal shapes and dtypes on all ranks, on any device. They may be overwritten.
            device (`torch.device`): Where sums go that this rank had no part of; the others go where its part is.

        Raises:
            MergeError: Another rank failed in the meantime.
            RankLostError: Another rank ended.
        """
        if self.size == 1:
            return dict(tensors)
        outlines: dict[K, tuple[torch.Size, torch.dtype]] = {}
        for part in self.gather({key: (tensor.shape, tensor.dtype) for key, tensor in tensors.items()}):
            outlines |= part
        try:
            return {key: self._sum(tensors.get(key), *outline, device) for key, outline in outlines.items()}
        except RankLostError:
            raise
        except BaseException:
            self._failed = True
            self._abandon()  # the others are in the middle of a sum
            raise

    def _sum(self, own: Tensor | None, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
        part = torch.zeros(shape, dtype=dtype) if own is None else own.detach().cpu().contiguous()
        with self._communicating():
            dist.all_reduce(part, group=self.group)
        return part.to(device if own is None else own.device)

    def step(self, work: Callable[[], T], what: str = "merge") -> T:
        """Does something on every rank and returns this one's result. Where it fails on one, it fails on all, when all have stopped;
        an outermost step ends on all ranks at the same time.

        Args:
            work (`Callable`): Does it. May contain further steps.
            what (`str`): What it does, for the message on the other ranks.

        Raises:
            MergeError: Another rank failed. This rank's own error is raised as it is.
            RankLostError: Another rank ended.
        """
        if self.size == 1:
            return work()
        self._depth += 1
        try:
            return self._step(work, what)
        except Exception:
            if self._depth == 1 and not self._lost:
                with suppress(RankLostError):
                    self._exchange(None, None)  # no process ends before rank 0 has cleaned up
            raise
        except BaseException:
            self._abandon()
            raise
        finally:
            self._depth -= 1
            if self._depth == 0:
                self._failed = False

    def _step(self, work: Callable[[], T], what: str) -> T:
        try:
            result = work()
        except Exception as error:
            if self._failed:
                raise
            message = f"could not {what}: {error if str(error) else type(error).__name__}"
            _, failures = self._exchange(
                None, _Failure(self.rank, socket.gethostname(), message, isinstance(error, StoppedError))
            )
            self._failed = True
            if isinstance(error, StoppedError):
                self._raise(failures)
            raise
        self.gather(None)
        return result

    def on_first(self, work: Callable[[], T], what: str = "merge") -> T:
        """Does something on rank 0 while the others wait, and returns its result on all of them.

        Args:
            work (`Callable`): Does it; its result can be pickled.
            what (`str`): What it does, for the message on the other ranks.
        """
        result = self.step(lambda: work() if self.is_first else None, what)
        return self.gather(result)[0] if self.size > 1 else result

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """Nothing but errors is logged inside, and there are no progress bars, on any rank but the first."""
        if self.is_first:
            yield
            return
        from transformers.utils import logging as transformers_logging

        loggers = [logging.getLogger(name) for name in ("hf_merge", "transformers", "py.warnings")]
        levels = [one.level for one in loggers]
        has_bars = transformers_logging.is_progress_bar_enabled()
        transformers_logging.disable_progress_bar()
        for one in loggers:
            one.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for one, level in zip(loggers, levels, strict=True):
                one.setLevel(level)
            if has_bars:
                transformers_logging.enable_progress_bar()

    def _exchange(self, value: Any, failure: _Failure | None) -> tuple[list[Any], list[_Failure]]:
        if self.size == 1:
            return [value], []
        received: list[Any] = [None] * self.size
        with self._communicating():
            dist.all_gather_object(received, (value, failure), group=self.group)
        return [value for value, _ in received], [failure for _, failure in received if failure is not None]

    @contextmanager
    def _communicating(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            self._failed = self._lost = True
            reason = str(error).splitlines()[0]
            raise RankLostError(
                f"A rank ended before the others were done: the same command continues the merge, on any number of ranks. ({reason})"
            ) from error

    def _raise(self, failures: list[_Failure]) -> None:
        if failures:
            self._failed = True
            cause = next((failure for failure in failures if not failure.stopped), failures[0])
            raise MergeError(f"Rank {cause.rank} on {cause.host} {cause.message}")

    def _abandon(self) -> None:
        """Leaves the others, who notice it."""
        global _joined
        if not self._lost and dist.is_initialized():
            self._lost = True
            group, self.group, _joined = self.group, None, None
            dist.destroy_process_group(group)


@dataclass
class _Joined:
    """The groups that were made beside a default group of torch.distributed."""

    world: Any
    meeting: Any
    group: Any


_joined: _Joined | None = None


def all_ranks(purpose: str = "merge") -> Ranks:
    """Waits until every rank of the job has called this, and returns what connects them. Outside of a job, and in a job of one process,
    that is this process alone. A job that a launcher (`torchrun`, `accelerate launch`) describes in the environment is joined with
    gloo unless torch.distributed is initialised already.

    Args:
        purpose (`str`): What all ranks are about to do, for messages.

    Raises:
        MergeError: Some ranks do not come.
    """
    global _joined
    if not dist.is_available() or not (dist.is_initialized() or _is_launched()):
        return Ranks()
    with _reminder(purpose):
        try:
            if not dist.is_initialized():
                dist.init_process_group("gloo", timeout=MEETING)
                atexit.register(dist.destroy_process_group)
            if dist.get_world_size() == 1:
                return Ranks()
            if _joined is None or _joined.world is not dist.group.WORLD:
                meeting = dist.new_group(backend="gloo", timeout=MEETING)
                dist.monitored_barrier(meeting, timeout=MEETING)
                _joined = _Joined(dist.group.WORLD, meeting, dist.new_group(backend="gloo", timeout=PATIENCE))
                atexit.register(_leave)
            else:
                dist.monitored_barrier(_joined.meeting, timeout=MEETING)
        except (RuntimeError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise MergeError(f"Not all ranks of the job came to {purpose}. {_REMEDY} ({reason})") from error
    return Ranks(dist.get_rank(), dist.get_world_size(), _joined.group)


_REMEDY = (
    "All ranks must make the same call; save_pretrained(folder, distributed=False) is for one alone. Outside of a job, unset RANK "
    "and WORLD_SIZE."
)


def _leave() -> None:
    """Closes the connections at the end of the process, while the interpreter is whole: gloo's threads do not survive its clean-up."""
    global _joined
    joined, _joined = _joined, None
    if joined is not None and dist.is_initialized() and dist.group.WORLD is joined.world:
        dist.destroy_process_group(joined.group)
        dist.destroy_process_group(joined.meeting)


def _is_launched() -> bool:
    """Whether a launcher describes a job of several processes in the environment."""
    return all(os.environ.get(name) for name in _ENVIRONMENT) and os.environ["WORLD_SIZE"] != "1"


@contextmanager
def _reminder(purpose: str) -> Iterator[None]:
    """Says what is waited for when it takes long."""
    timer = threading.Timer(
        REMINDER, logger.warning, [f"Still waiting for the other ranks to come to {purpose}. {_REMEDY}"]
    )
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
