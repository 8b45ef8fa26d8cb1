"""Threads of a merge: some read or copy ahead of the one that computes, and several compute, each for a device of its own."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from typing import TypeVar


T = TypeVar("T")
Read = TypeVar("Read")

_END = object()


def read_ahead(
    items: Iterable[T], read: Callable[[T], Read], nbytes: Callable[[T], int], limit: int
) -> Generator[tuple[T, Read], None, None]:
    """Items with what is read for them, the next ones being read by a thread while the current one is used.

    Args:
        items (`Iterable`): Are asked for when it is their turn to be read.
        read (`Callable`): Reads an item.
        nbytes (`Callable`): How much that is.
        limit (`int`): How many bytes are read ahead; always at least one item.
    """
    with ThreadPoolExecutor(1, "hf_merge-read") as reader:
        waiting: list[tuple[T, Future]] = []
        remaining = iter(items)
        following, ahead = next(remaining, _END), 0
        try:
            while waiting or following is not _END:
                while following is not _END and (not waiting or ahead + nbytes(following) <= limit):
                    waiting.append((following, reader.submit(read, following)))
                    ahead += nbytes(following)
                    following = next(remaining, _END)
                item, future = waiting.pop(0)
                ahead -= nbytes(item)
                yield item, future.result()
                del future
        finally:
            for _, future in waiting:
                future.cancel()


def one_ahead(items: Generator[T, None, None]) -> Generator[T, None, None]:
    """The items of a generator, each made by a thread while the one before is used."""
    try:
        with ThreadPoolExecutor(1, "hf_merge-copy") as thread:
            future = thread.submit(next, items, _END)
            while (item := future.result()) is not _END:
                future = thread.submit(next, items, _END)
                yield item
                del item
    finally:
        items.close()


def run_together(tasks: Sequence[Callable[[threading.Event], None]]) -> None:
    """Runs tasks at the same time, each in a thread, a single one in this; returns when all have returned.

    Args:
        tasks (`Sequence[Callable]`): Each is given an event and returns early when it is set: another one has failed.

    Raises:
        Exception: What the first one that failed raised, when none runs any more.
    """
    stop = threading.Event()
    if len(tasks) < 2:
        for task in tasks:
            task(stop)
        return
    with ThreadPoolExecutor(len(tasks), "hf_merge-merge") as threads:
        try:
            running = [threads.submit(task, stop) for task in tasks]
            ended, _ = wait(running, return_when=FIRST_EXCEPTION)
            for future in ended:
                future.result()
        finally:
            stop.set()
