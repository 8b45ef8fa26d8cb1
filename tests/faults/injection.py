"""Faults of a disk, made inside of a process that merges: the n-th operation on files below some folders fails, is the process's
last one, or is when somebody else changes an input.

Opening, renaming, making and removing are seen by an audit hook, which may also refuse them; reading and writing data by the files
that hf_merge opens. The process is thrown away afterwards: a hook cannot be removed.
"""

from __future__ import annotations

import builtins
import errno
import io
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from hf_merge.checkpoints import storage as input_module


READ, CHANGE, REMOVE = "read", "change", "remove"
_CHANGES = {"os.mkdir": 0, "os.rename": 1, "os.truncate": 0, "os.link": 1, "os.symlink": 1}
_REMOVALS = {"os.remove": 0, "os.rmdir": 0}
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC

_pwrite = os.pwrite  # what notes are written with is no operation of the merge

Strike = Callable[[str], None]
"""What happens at the chosen operation and, where it is told so, at every later one: is given the kind of the operation."""


@dataclass
class Disk:
    """Counts operations and strikes.

    Args:
        root (`Path`): Operations below it count.
        kinds (`tuple[str]`): The kinds that count, of `READ`, `CHANGE` and `REMOVE`.
        strike (`Callable`): What happens.
        at (`int`): At which operation, counted from 0.
        lasting (`bool`): Also at every later one.
    """

    root: Path
    kinds: tuple[str, ...]
    strike: Strike
    at: int
    lasting: bool = False

    def __call__(self) -> None:
        """Installs the faults in this process."""
        self.count, self._lock, self._busy = 0, threading.Lock(), False
        self._prefix = str(self.root) + os.sep
        sys.addaudithook(self._audit)
        input_module.open = self._opener()
        os.preadv, os.pwrite = self._reading(os.preadv), self._writing(os.pwrite)
        os.fsync = lambda descriptor: self.meet(CHANGE)  # the system survives, and writes what the process wrote

    def meet(self, kind: str) -> None:
        """One operation is about to happen."""
        if kind not in self.kinds or self._busy:
            return
        with self._lock:
            number = self.count
            self.count += 1
        if number == self.at or (self.lasting and number > self.at):
            self._busy = not self.lasting  # what the strike itself does is no operation of the merge
            try:
                self.strike(kind)
            finally:
                self._busy = False

    def _audit(self, event: str, arguments: tuple) -> None:
        if event == "open":
            path, mode, flags = arguments
            writes = bool(flags & _WRITING) or any(letter in (mode or "") for letter in "wax+")
            kind, place = (CHANGE if writes else READ), path
        elif event in _CHANGES:
            kind, place = CHANGE, arguments[_CHANGES[event]]
        elif event in _REMOVALS:
            kind, place = REMOVE, arguments[_REMOVALS[event]]
        else:
            return
        if isinstance(place, (str, os.PathLike)) and os.fspath(place).startswith(self._prefix):
            self.meet(kind)

    def _reading(self, read: Callable) -> Callable:
        def met(*arguments) -> int:
            self.meet(READ)
            return read(*arguments)

        return met

    def _writing(self, write: Callable) -> Callable:
        def met(descriptor: int, data: memoryview, position: int) -> int:
            written = write(descriptor, data[: max(1, len(data) // 2)], position)  # a disk that fills up takes a part
            self.meet(CHANGE)
            return written

        return met

    def _opener(self) -> Callable:
        meet = self.meet

        class File(io.FileIO):
            def readinto(self, target) -> int:
                meet(READ)
                return super().readinto(target)

        def opened(path, mode="r", buffering=-1, **options):
            return File(path, mode) if buffering == 0 else builtins.open(path, mode, buffering, **options)

        return opened


# -- strikes ------------------------------------------------------------------------------------------------------


def die(kind: str) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def no_space(kind: str) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def broken(kind: str) -> None:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


def read_only(kind: str) -> None:
    raise OSError(errno.EROFS, os.strerror(errno.EROFS))


@dataclass
class Note:
    """Writes down how many operations there are: the strike of a rehearsal."""

    path: Path
    count: int = 0

    def __call__(self, kind: str) -> None:
        self.count += 1
        descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT)
        _pwrite(descriptor, str(self.count).encode(), 0)
        os.close(descriptor)


@dataclass
class Replacement:
    """Somebody changes an input.

    Args:
        path (`Path`): The file.
        content (`bytes`, *optional*): Its new content; it is removed when not given.
        in_place (`bool`): Whether the file stays the same one, rather than being replaced by a new one.
    """

    path: Path
    content: bytes | None
    in_place: bool = False

    def __call__(self, kind: str = "") -> None:
        if self.content is None:
            self.path.unlink()
            return
        target = self.path if self.in_place else self.path.with_name(self.path.name + ".new")
        with builtins.open(target, "r+b" if self.in_place else "wb") as file:
            file.write(self.content)
            file.truncate()
        if not self.in_place:
            os.replace(target, self.path)


# -- other states of the system -----------------------------------------------------------------------------------


@dataclass
class SmallFiles:
    """No file may exceed `limit` bytes: a write fails half-way after every check has passed."""

    limit: int

    def __call__(self) -> None:
        import resource  # POSIX only

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.limit, self.limit))


@dataclass
class JumpingClock:
    """The time of day goes forward and back by up to ten years each time somebody asks for it."""

    seed: int

    def __call__(self) -> None:
        draw, now = random.Random(self.seed), time.time()
        time.time = lambda: now + draw.uniform(-3e8, 3e8)
        time.time_ns = lambda: int(time.time() * 1e9)
