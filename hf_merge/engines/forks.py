"""Several processes of one machine for one merge: forks of this process, which share with it all that was opened and planned."""

from __future__ import annotations

import ctypes
import logging
import multiprocessing
import os
import pickle
import signal
import struct
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import psutil
import torch

from ..errors import MergeError, RankLostError


logger = logging.getLogger(__name__)

T = TypeVar("T")

MOST_PROCESSES = 8
"""How many processes are used by default at most: more gain little, as they share the memory's bandwidth and the disk."""

CGROUP = Path("/sys/fs/cgroup")

_PR_SET_PDEATHSIG = 1  # of <sys/prctl.h>
_TOKEN = struct.Struct("<I")
_MOST_TOKENS = 4096 // _TOKEN.size  # the smallest pipe that the system makes holds a page


def processors() -> int:
    """How many processors this process may use."""
    own = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota, _, period = _of_container("cpu.max").partition(" ")
    return max(1, min(own, int(quota) // int(period))) if quota.isdecimal() and period.isdecimal() else own


def free_memory() -> int:
    """How many bytes this process may still take."""
    own, limit = psutil.virtual_memory().available, _of_container("memory.max")
    if not limit.isdecimal():
        return own
    used = dict(line.split() for line in _of_container("memory.stat").splitlines())
    return max(0, min(own, int(limit) - int(used.get("anon", 0))))


def _of_container(name: str) -> str:
    """A limit of the container that this process is in (cgroup v2); empty where there is none."""
    try:
        return (CGROUP / name).read_text(encoding="utf-8").strip()
    except OSError:
        return ""


def can_fork() -> bool:
    """Whether this process can divide its work. Not on Windows; not on macOS, whose libraries do not survive it; not in a process
    that may have no children."""
    return sys.platform == "linux" and not multiprocessing.current_process().daemon


class _Claims:
    """A list of work that processes share: each item is given to the one that asks first.

    The places in the list lie in a pipe. Reading one is a single step of the system, and nothing stays locked when a process dies.
    """

    def __init__(self, items: Sequence[T]):
        self._items = items
        self._run = -(-len(items) // _MOST_TOKENS) or 1
        self._end, writing = os.pipe()
        with os.fdopen(writing, "wb") as file:
            file.write(b"".join(map(_TOKEN.pack, range(0, len(items), self._run))))

    def __iter__(self) -> Iterator[T]:
        while token := os.read(self._end, _TOKEN.size):
            (start,) = _TOKEN.unpack(token)
            yield from self._items[start : start + self._run]

    def give_up(self) -> None:
        """Leaves nothing to claim."""
        while os.read(self._end, 1 << 16):
            pass

    def close(self) -> None:
        os.close(self._end)


class _Failed(NamedTuple):
    error: Exception
    traceback: str


class _Done(NamedTuple):
    result: Any


def run_forked(
    count: int,
    items: Sequence[T],
    work: Callable[[Iterator[T], Callable[[Any], None]], Any],
    told: Callable[[Any], None],
) -> list[Any]:
    """Works on a list in this process and in forks of it.

    Args:
        count (`int`): How many processes, this one included.
        items (`Sequence`): What is to do.
        work (`Callable`): Is called in each process with its items and with a function that tells this process something; what it tells
            and returns can be pickled.
        told (`Callable`): Is called in this process with what any of them tells, by one thread at a time.

    Returns:
        `list`: What `work` returned in each process, this one's first.

    Raises:
        MergeError: What one of them raised.
        RankLostError: One of them was killed.
    """
    claims = _Claims(items)
    forks: dict[Connection, BaseProcess] = {}
    listener = _Listener(forks, told, claims)
    try:
        while len(forks) < count - 1 and _start(forks, claims, work):
            pass
        if len(forks) < count - 1:
            logger.warning("Merging in %d processes instead of %d: the system starts no more.", 1 + len(forks), count)
        listener.start()
        own = work(iter(claims), listener.tell)
        listener.join()
        return [own, *listener.results()]
    finally:
        started = [fork for fork in forks.values() if fork.pid is not None]
        for fork in started:
            fork.kill()  # those that are done have ended already, and what others do is not wanted any more
        for fork in started:
            fork.join()
        if listener.ident is not None:
            listener.join()
        for connection in forks:
            connection.close()
        claims.close()


def _start(forks: dict[Connection, BaseProcess], claims: _Claims, work: Callable) -> bool:
    """Starts one more fork, unless the system refuses."""
    context = multiprocessing.get_context("fork")
    try:
        receiving, sending = context.Pipe(duplex=False)
    except OSError:
        return False
    arguments = (claims, work, sending, [receiving, *forks])
    fork = forks[receiving] = context.Process(target=_work_apart, args=arguments, daemon=True)
    try:
        with warnings.catch_warnings():
            # A fork takes no lock but those that are made anew in it.
            warnings.filterwarnings("ignore", message=".*use of fork", category=DeprecationWarning)
            fork.start()
    except OSError:
        del forks[receiving]
        receiving.close()
        return False
    finally:
        sending.close()
    return True


def _work_apart(claims: _Claims, work: Callable, sending: Connection, foreign: list[Connection]) -> None:
    """The life of a fork."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that it comes from decides
    _end_with(multiprocessing.parent_process().pid)
    for connection in foreign:
        connection.close()
    torch.set_num_threads(1)  # OpenMP's threads do not survive a fork
    try:
        answer: Any = _Done(work(iter(claims), sending.send))
        message = pickle.dumps(answer)
    except Exception as error:  # noqa: BLE001  raised again by the process that it comes from
        claims.give_up()
        message = pickle.dumps(_Failed(_portable(error), traceback.format_exc()))
    with suppress(BrokenPipeError):
        sending.send_bytes(message)


def _end_with(parent: int) -> None:
    """Lets the system end this process with its parent: it holds the parent's locks."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


def _portable(error: Exception) -> Exception:
    """The error, or one with the same message that can be pickled."""
    with suppress(Exception):  # classes raise what they like when they are made from other arguments
        if str(pickle.loads(pickle.dumps(error))) == str(error):
            return error
    return MergeError(f"{type(error).__name__}: {error}")


class _Listener(threading.Thread):
    """Hears what forks tell, until all of them have ended."""

    def __init__(self, forks: dict[Connection, BaseProcess], told: Callable[[Any], None], claims: _Claims):
        super().__init__(name="hf_merge-listen", daemon=True)
        self._forks = forks
        self._told = told
        self._claims = claims
        self._lock = threading.Lock()
        self._answers: dict[Connection, Any] = {}
        self._error: Exception | None = None

    def tell(self, something: Any) -> None:
        """What this process tells itself."""
        with self._lock:
            self._told(something)

    def run(self) -> None:
        open_ones = list(self._forks)
        while open_ones:
            for connection in wait(open_ones):
                try:
                    heard = connection.recv()
                except (EOFError, OSError):  # also in the middle of a message
                    open_ones.remove(connection)
                    if connection not in self._answers:
                        self._claims.give_up()
                    continue
                if isinstance(heard, (_Done, _Failed)):
                    self._answers[connection] = heard
                elif self._error is None:
                    self._hear(heard)

    def _hear(self, something: Any) -> None:
        try:
            self.tell(something)
        except Exception as error:  # noqa: BLE001  raised again by `results`
            self._error = error
            self._claims.give_up()

    def results(self) -> list[Any]:
        """What the forks returned.

        Raises:
            MergeError: The first error.
        """
        if self._error is not None:
            raise self._error
        for answer in self._answers.values():
            if isinstance(answer, _Failed):
                raise answer.error from MergeError(f"in a fork of this process:\n{answer.traceback}")
        for connection, fork in self._forks.items():
            if connection not in self._answers:
                fork.join()
                raise RankLostError(
                    f"A process that merges a part was ended (exit code {fork.exitcode}; the system ends processes when memory runs out). "
                    "The same command continues the merge; num_proc=1 takes the least memory."
                )
        return [self._answers[connection].result for connection in self._forks]
