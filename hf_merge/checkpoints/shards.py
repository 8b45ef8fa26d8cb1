"""Weight files being written, tensor by tensor in any order, by one process or divided among several."""

from __future__ import annotations

import errno
import json
import os
import secrets
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import Tensor
from torch import uint8 as torch_uint8

from ..errors import OutputError
from .layout import CheckpointLayout, ShardLayout
from .memory import empty_tensor


SYNCED = 1 << 26
"""Bytes after which the disk is told to write them while more is merged, so that little is left for the end of a shard."""

_STOPPED = "stopped"
_ROWS = ".rows.json"


class StoppedError(OutputError):
    """Another process that writes into the same folder has failed, and says why itself."""


class ShardWriter:
    """Writes tensors into the shards of an unfinished output folder. A shard gets its final name when it is complete.

    Args:
        folder (`Path`): The final folder.
        layout ([`CheckpointLayout`]): The weight files.

    **Attributes**:
        - **finished** (`set[str]`) -- The shards that are complete, by file name.
        - **rows_of** (`Callable`, *optional*) -- Gives, for a shard that becomes complete, what the report says about its parameters:
          JSON-ready data, which is kept beside the shard for a run that continues this one.
    """

    def __init__(self, folder: Path, layout: CheckpointLayout):
        self.folder = folder.absolute()
        self.partial = partial_of(self.folder)
        self.layout = layout
        self.finished: set[str] = set()
        self.rows_of: Callable[[ShardLayout], dict[str, Any]] | None = None
        self._elsewhere: frozenset[str] = frozenset()
        self._open: dict[str, _ShardFile] = {}
        self._opening = threading.Lock()
        # A process of an earlier run that is still alive must not give the name of a shard to what this one is writing.
        self._mark = secrets.token_hex(4)

    def leave(self, shards: Iterable[str]) -> None:
        """Leaves shards, by file name, to other processes that write into the same folder."""
        self._elsewhere = frozenset(shards)

    def stop(self) -> None:
        """Makes the other processes that write into the same folder stop at their next tensor."""
        with suppress(OSError):  # the disk may be the reason; the others are told at the end, too
            (self.partial / _STOPPED).touch()

    def wants(self, keys: Iterable[str]) -> bool:
        """Whether any of the tensors still has to be written here."""
        return any(self._is_wanted(self.layout.shard_of[key]) for key in keys)

    def _is_wanted(self, shard: ShardLayout) -> bool:
        return shard.filename not in self.finished and shard.filename not in self._elsewhere

    def write(self, key: str, tensor: Tensor) -> None:
        """Writes one tensor into its place; its shard is synced and gets its name when it is complete.

        Raises:
            OutputError: The disk is full or fails, or another process has stopped the merge.
        """
        self.fill(key, tensor)
        self.complete(key)

    def fill(self, key: str, tensor: Tensor) -> None:
        """The part of [`~ShardWriter.write`] that forks of this process may do; this one is told by [`~ShardWriter.complete`]."""
        shard = self.layout.shard_of[key]
        if not self._is_wanted(shard):
            return
        info = shard.infos[key]
        if tuple(tensor.shape) != info.shape or tensor.dtype != info.dtype:
            raise OutputError(
                f"'{key}' is {tuple(tensor.shape)} {tensor.dtype}, planned was {info.shape} {info.dtype}."
            )
        self.fill_part(key, tensor.reshape(-1), 0)

    def fill_part(self, key: str, entries: Tensor, start: int) -> None:
        """[`~ShardWriter.fill`] with some entries of a tensor, flat, from one on."""
        shard = self.layout.shard_of[key]
        if not self._is_wanted(shard):
            return
        if self._elsewhere and (self.partial / _STOPPED).exists():
            raise StoppedError(f"The merge into '{self.folder}' was stopped by another process.")
        try:
            self._file(shard).write(key, entries, start)
        except OSError as error:
            raise output_error(self.folder, error) from error

    def filled_part(self, key: str, start: int, count: int) -> Tensor:
        """Entries that were filled in, flat, in a new tensor."""
        try:
            return self._file(self.layout.shard_of[key]).read(key, start, count)
        except OSError as error:
            raise output_error(self.folder, error) from error

    def complete(self, key: str) -> None:
        """Finishes the shard of a tensor that is in its place, if it was the last one."""
        shard = self.layout.shard_of[key]
        if not self._is_wanted(shard):
            return
        try:
            file = self._file(shard)
            file.missing.discard(key)
            if file.missing:
                file.settle(shard.infos[key].nbytes)
            else:
                if self.rows_of is not None:
                    rows_path(self.partial / shard.filename).write_text(
                        json.dumps(self.rows_of(shard)), encoding="utf-8"
                    )
                file.finish()
                self.finished.add(shard.filename)
                del self._open[shard.filename]
        except OSError as error:
            raise output_error(self.folder, error) from error

    def _file(self, shard: ShardLayout) -> _ShardFile:
        with self._opening:
            if shard.filename not in self._open:
                self._open[shard.filename] = _ShardFile(self.partial, shard, self._mark)
            return self._open[shard.filename]

    def kept_rows(self) -> dict[str, Any]:
        """What the report said about the parameters of finished shards, as far as it can be read."""
        rows: dict[str, Any] = {}
        for name in sorted(self.finished):
            with suppress(OSError, ValueError, TypeError):
                rows.update(json.loads(rows_path(self.partial / name).read_text(encoding="utf-8")))
        return rows

    def close(self) -> None:
        """Closes the shards that are not complete."""
        for file in self._open.values():
            file.close()
        self._open.clear()


class _ShardFile:
    """A safetensors file being filled in any order, maybe by several processes; its space is reserved at the start."""

    def __init__(self, folder: Path, shard: ShardLayout, mark: str):
        self.shard = shard
        self.path = folder / f"{shard.filename}.{mark}.writing"
        self.target = folder / shard.filename
        self.missing = set(shard.infos)
        self._seeking = threading.Lock()
        self._unsettled = 0
        self._settling: threading.Thread | None = None
        self._error: OSError | None = None
        # Another process may have made it.
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666)
        self._file = open(descriptor, "r+b", buffering=0)  # noqa: SIM115  closed by finish() or close()
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(self._file.fileno(), 0, shard.nbytes)
        self._write(memoryview(shard.header), 0)

    def write(self, key: str, entries: Tensor, start: int) -> None:
        """Writes entries of a tensor, flat, from one on."""
        info = self.shard.infos[key]
        if entries.dtype != info.dtype or start + len(entries) > info.numel:
            raise OutputError(
                f"'{key}' gets {len(entries)} entries of {entries.dtype} at {start}, planned was {info.shape} {info.dtype}."
            )
        self._write(_bytes(entries.contiguous()), self._position(key, start))

    def read(self, key: str, start: int, count: int) -> Tensor:
        """Reads entries of a tensor that were written."""
        entries = empty_tensor((count,), self.shard.infos[key].dtype)
        data, position = _bytes(entries), self._position(key, start)
        while len(data):
            done = self._read_some(data, position)
            if not done:
                raise OSError(errno.EIO, f"'{self.path}' was truncated")
            data, position = data[done:], position + done
        return entries

    def _position(self, key: str, start: int) -> int:
        return len(self.shard.header) + self.shard.offsets[key] + start * self.shard.infos[key].dtype.itemsize

    def _write(self, data: memoryview, position: int) -> None:
        while len(data):
            done = self._write_some(data, position)
            data, position = data[done:], position + done

    # Threads and forks share the descriptor, and with it the place that a seek leaves it at: where the system has reads and writes with
    # positions, these; where it has none, there are no forks either, and a lock is enough.

    def _write_some(self, data: memoryview, position: int) -> int:
        if hasattr(os, "pwrite"):
            return os.pwrite(self._file.fileno(), data, position)
        with self._seeking:
            self._file.seek(position)
            return self._file.write(data)

    def _read_some(self, data: memoryview, position: int) -> int:
        if hasattr(os, "preadv"):
            return os.preadv(self._file.fileno(), [data], position)
        with self._seeking:
            self._file.seek(position)
            return self._file.readinto(data)

    def settle(self, nbytes: int) -> None:
        """Takes note of so many bytes more that are in their place, and has the disk write them when they are many."""
        self._unsettled += nbytes
        if self._unsettled >= SYNCED and (self._settling is None or not self._settling.is_alive()):
            self._unsettled = 0
            self._settling = threading.Thread(target=self._sync, name="hf_merge-sync", daemon=True)
            self._settling.start()

    def _sync(self) -> None:
        try:
            os.fsync(self._file.fileno())
        except OSError as error:  # the system tells it once
            self._error = error

    def finish(self) -> None:
        self._wait()
        if self._error is not None:
            raise self._error
        os.fsync(self._file.fileno())
        self.close()
        os.rename(self.path, self.target)

    def close(self) -> None:
        self._wait()
        self._file.close()

    def _wait(self) -> None:
        if self._settling is not None:
            self._settling.join()


def _bytes(flat: Tensor) -> memoryview:
    return memoryview(flat.view(torch_uint8).numpy()) if len(flat) else memoryview(b"")


def is_finished(path: Path, shard: ShardLayout) -> bool:
    """Whether a file has the size and the header of a shard."""
    if path.is_symlink() or not path.is_file() or path.stat().st_size != shard.nbytes:
        return False
    with open(path, "rb") as file:
        return file.read(len(shard.header)) == shard.header


def rows_path(shard: Path) -> Path:
    """The file beside a shard with the rows of the report about its parameters."""
    return shard.with_name(shard.name + _ROWS)


def partial_of(folder: Path) -> Path:
    """Where the files of an unfinished output folder are."""
    return folder.with_name(folder.name + ".partial")


def output_error(folder: Path, error: OSError) -> OutputError:
    if isinstance(error, OutputError):
        return error
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return OutputError(
            f"The disk is full: '{folder}' could not be written. Free some space and run the merge again."
        )
    return OutputError(f"Cannot write '{folder}': {error}.")
