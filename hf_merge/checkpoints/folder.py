"""The output folder: complete or absent.

Everything is written into `<folder>.partial`. Shards get their final names when they are finished, so that a merge that
was killed goes on where it stopped; the folder itself appears by one rename at the end.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from typing_extensions import Self

from ..errors import MergeError, OutputError, RankLostError
from .layout import CheckpointLayout
from .shards import ShardWriter, is_finished, output_error, partial_of, rows_path


logger = logging.getLogger(__name__)

_PROGRESS = "progress.json"
_PROGRESS_WRITING = _PROGRESS + ".writing"
CONFIG_MARK = "merge_config.json"
SHARED_WITHIN = 60.0
"""Seconds within which a folder that one host made is seen by the others; network file systems keep lists of files for a while."""


def check_output(folder: Path, nbytes: int, beside: Mapping[Path, int] | None = None) -> list[str]:
    """What prevents writing `nbytes` into `folder`, as sentences. Writes nothing.

    Args:
        folder (`Path`): The output folder; it must be absent or empty.
        nbytes (`int`): The size of what will be written.
        beside (`Mapping[Path, int]`, *optional*): Bytes that other folders hold until this one is complete.
    """
    problems = []
    folder = folder.absolute()
    if folder.is_symlink() or os.path.ismount(folder) or folder == Path.cwd():
        reason = (
            f"The output '{folder}' is a link, a mount point or the current folder, which cannot be replaced in one step. "
            f"Choose a new folder inside it, such as '{folder / 'merged'}'."
        )
        return [reason]
    if folder.is_file():
        problems.append(f"The output '{folder}' is a file: choose another folder.")
    elif folder.is_dir() and any(folder.iterdir()):
        problems.append(f"The output folder '{folder}' is not empty: choose another one, or remove it first.")
    parent = next((path for path in folder.parents if path.exists()), None)
    if parent is None or not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        problems.append(f"The output folder '{folder}' cannot be made: '{parent}' is not a writable folder.")
        return problems
    return problems + space_problems({partial_of(folder): nbytes, **(beside or {})})


def space_problems(sizes: Mapping[Path, int]) -> list[str]:
    """Which disks are too small for what folders will hold, as sentences. What is there from a merge that is continued, or that will
    be replaced, needs no more space.

    Args:
        sizes (`Mapping[Path, int]`): Bytes that each folder will hold at the most. It need not exist yet.
    """
    disks: dict[int, list[tuple[Path, Path, int]]] = {}
    for folder, nbytes in sizes.items():
        disk = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir())
        missing = max(0, nbytes - sum(path.stat().st_size for path in folder.glob("*.safetensors*")))
        disks.setdefault(disk.stat().st_dev, []).append((folder, disk, missing))
    problems = []
    for places in disks.values():
        needed, free = sum(missing for *_, missing in places), shutil.disk_usage(places[0][1]).free
        if needed > free:
            names = " and ".join(f"'{folder}'" for folder, _, missing in places if missing)
            problems.append(
                f"Not enough disk space for {names}: {needed / 1e9:.2f} GB are needed, {free / 1e9:.2f} GB are free."
            )
    return problems


def work_folder_of(folder: Path) -> Path:
    """Where the finished blocks of an unfinished merge are."""
    return folder.with_name(folder.name + ".work")


class OutputFolder(ShardWriter):
    """Writes a model folder atomically. Use as a context manager: an error inside removes what was written; a kill, or the loss of
    a process that writes a part, leaves finished shards, which the next run with the same fingerprint keeps.

    Args:
        folder (`Path`): The final folder.
        layout ([`CheckpointLayout`]): The weight files.
        fingerprint (`str`): Identifies recipe and inputs; files of another fingerprint are discarded.
    """

    def __init__(self, folder: Path, layout: CheckpointLayout, fingerprint: str):
        super().__init__(folder, layout)
        self.fingerprint = fingerprint
        self._lock: FileLock | None = None

    def __enter__(self) -> Self:
        try:
            self.partial.mkdir(parents=True, exist_ok=True)
            self._lock = FileLock(self.partial.with_name(self.partial.name + ".lock"))
            self._lock.acquire(timeout=0)
            self._refuse_foreign_files()
            self._recover()
        except Timeout:
            raise OutputError(
                f"Another process is writing '{self.partial}': wait for it, or choose another folder."
            ) from None
        except OSError as error:
            with suppress(OSError):
                self.partial.rmdir()  # where it is still empty
            self._unlock()
            raise output_error(self.folder, error) from error
        return self

    def __exit__(self, kind, error, traceback) -> None:
        self.close()
        failed = isinstance(error, Exception) and not isinstance(error, RankLostError)
        if failed:
            shutil.rmtree(self.partial, ignore_errors=True)
        if error is None or failed:
            shutil.rmtree(work_folder_of(self.folder), ignore_errors=True)
        self._unlock()
        if isinstance(error, OSError) and not isinstance(error, MergeError):
            raise output_error(self.folder, error) from error

    def _unlock(self) -> None:
        """The lock lies beside the folder, so that it is held until the folder has been renamed or removed."""
        if self._lock is not None and self._lock.is_locked:
            with suppress(
                OSError
            ):  # the disk may be the reason for leaving; a lock file that nobody holds locks nobody out
                Path(self._lock.lock_file).unlink(missing_ok=True)
            self._lock.release()

    def _refuse_foreign_files(self) -> None:
        entries = {path.name for path in self.partial.iterdir()}
        if entries and not entries & {_PROGRESS, _PROGRESS_WRITING, CONFIG_MARK}:
            raise OutputError(
                f"'{self.partial}' was not made by a merge: move it away, or choose another output folder."
            )

    def _recover(self) -> None:
        """Keeps the finished shards of the same merge, or begins anew."""
        try:
            self._keep_finished()
        except OSError:
            if not self.finished:
                shutil.rmtree(self.partial, ignore_errors=True)
            raise

    def _keep_finished(self) -> None:
        """Removes everything but the finished shards of the same merge. The record of whose shards they are is replaced in one
        step, and only when no other merge's are left."""
        record = self.partial / _PROGRESS
        known = _read_fingerprint(record)
        paths = {self.partial / shard.filename: shard for shard in self.layout.shards}
        kept = {path for path in paths if known == self.fingerprint and is_finished(path, paths[path])}
        self.finished.update(path.name for path in kept)
        kept |= {record, *map(rows_path, kept)}
        for path in self.partial.iterdir():
            if path in kept:
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        writing = self.partial / _PROGRESS_WRITING
        writing.write_text(json.dumps({"fingerprint": self.fingerprint}), encoding="utf-8")
        _sync(writing)
        _sync(self.partial)
        os.replace(writing, record)

    def write_json(self, name: str, content: Any) -> None:
        """Writes a JSON file beside the weights."""
        path = self.partial / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    def seal(self) -> None:
        """Checks that all shards are there, writes the index, syncs everything and renames the folder into place."""
        try:
            missing = [
                shard.filename
                for shard in self.layout.shards
                if shard.filename not in self.finished and not is_finished(self.partial / shard.filename, shard)
            ]
            if missing:
                raise OutputError(f"Cannot complete '{self.folder}': {', '.join(missing)} not written.")
            for path in self.partial.glob("*.writing"):  # of a process of an earlier run that went on for a while
                path.unlink()
            for shard in self.layout.shards:
                rows_path(self.partial / shard.filename).unlink(missing_ok=True)
            index = self.layout.index()
            if index is not None:
                self.write_json("model.safetensors.index.json", index)
            for path in self.partial.rglob("*"):
                _sync(path)
            self._rename()
        except OSError as error:
            raise output_error(self.folder, error) from error

    def _rename(self) -> None:
        (self.partial / _PROGRESS).unlink()
        _sync(self.partial)
        if self.folder.is_dir():
            self.folder.rmdir()  # empty, or this raises
        os.rename(self.partial, self.folder)
        try:
            _sync(self.folder.parent)
        except OSError as error:
            logger.warning("'%s' is complete, but a power cut could still undo it (%s).", self.folder, error)


class OutputPart(ShardWriter):
    """What one process writes into the [`OutputFolder`] of another one. Use as a context manager.

    Args:
        folder (`Path`): The final folder.
        layout ([`CheckpointLayout`]): The weight files.
        fingerprint (`str`): That of the other process.
    """

    def __init__(self, folder: Path, layout: CheckpointLayout, fingerprint: str):
        super().__init__(folder, layout)
        self.fingerprint = fingerprint

    def __enter__(self) -> Self:
        deadline = time.monotonic() + SHARED_WITHIN
        while _read_fingerprint(self.partial / _PROGRESS) != self.fingerprint:
            if time.monotonic() > deadline:
                raise OutputError(
                    f"'{self.partial}' is not the folder that rank 0 made: all ranks must be given one output folder, on a file "
                    "system that their hosts share."
                )
            time.sleep(0.05)
        return self

    def __exit__(self, kind, error, traceback) -> None:
        self.close()
        if isinstance(error, OSError) and not isinstance(error, MergeError):
            raise output_error(self.folder, error) from error


def _read_fingerprint(record: Path) -> str | None:
    """Whose shards an unfinished folder holds; `None` where that is not known."""
    try:
        return json.loads(record.read_text(encoding="utf-8"))["fingerprint"]
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
