"""Merges in processes of their own, which may be killed, and what they leave on the disk."""

from __future__ import annotations

import functools
import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path

from .testing_utils import run_cli


def contents(folder: Path) -> dict[str, bytes]:
    """Every file but the report, which holds times."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "merge_report.json"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def _merge(arguments: Sequence[str], prepare: Callable[[], None] | None, log: Path) -> None:
    with open(log, "w", encoding="utf-8", buffering=1) as file, redirect_stdout(file), redirect_stderr(file):
        if prepare is not None:
            prepare()
        sys.exit(run_cli(arguments))


@functools.cache
def _fork_server():
    """Starts processes in milliseconds: the libraries are imported once, in a server without threads."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.warm_up"])
    return context


def start(
    arguments: Sequence[str], *, prepare: Callable[[], None] | None = None, log: Path = Path(os.devnull)
) -> BaseProcess:
    """Starts `hf-merge` with these arguments.

    Args:
        arguments (`Sequence[str]`): Of the command line.
        prepare (`Callable`, *optional*): Called in the process before the command; it can be pickled.
        log (`Path`): Where the process writes what it prints.
    """
    process = _fork_server().Process(target=_merge, args=(list(arguments), prepare, log))
    process.start()
    return process


def kill_after(process: BaseProcess, out: Path, delay: float) -> None:
    """Kills the process `delay` seconds after the merge began to write: its start-up is not worth shooting at."""
    while process.is_alive() and not any(out.parent.iterdir()):
        time.sleep(0.002)
    time.sleep(delay)
    process.kill()
    process.join()


# -- ranks of a job -----------------------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def as_rank(rank: int, size: int, port: int, then: Callable[[int], None] | None = None) -> None:
    """Makes this process what a launcher makes it."""
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    if then is not None:
        then(rank)


def launch(
    arguments: Sequence[str], size: int, logs: Path, then: Callable[[int], None] | None = None
) -> tuple[list[int], list[str]]:
    """Runs `hf-merge` on every rank; returns exit codes and what each printed.

    Args:
        arguments (`Sequence[str]`): Of the command line.
        size (`int`): The number of ranks.
        logs (`Path`): A folder for what they print.
        then (`Callable`, *optional*): Called with the rank in its process before the command.
    """
    logs.mkdir(parents=True, exist_ok=True)
    port = free_port()
    files = [logs / f"rank{rank}.txt" for rank in range(size)]
    processes = [
        start(arguments, prepare=partial(as_rank, rank, size, port, then), log=file) for rank, file in enumerate(files)
    ]
    for process in processes:
        process.join(120)
    hung = [rank for rank, process in enumerate(processes) if process.is_alive()]
    for rank in hung:
        processes[rank].kill()
    assert not hung, f"ranks {hung} hang"
    return [process.exitcode for process in processes], [file.read_text() for file in files]
