"""Threads of a merge: what is read and copied ahead is bounded, and an error of one ends them all."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator

import pytest

from hf_merge.engines.workers import one_ahead, read_ahead, run_together


@pytest.mark.parametrize("limit", [0, 1, 10, 25, 1000])
def test_read_ahead_is_bounded(limit: int):
    sizes = [7, 1, 1, 30, 2, 9, 9, 4, 1]
    held = most = 0
    lock = threading.Lock()

    def read(index: int) -> int:
        nonlocal held, most
        with lock:
            held += sizes[index]
            most = max(most, held)
        return index

    used = []
    for index, found in read_ahead(range(len(sizes)), read, sizes.__getitem__, limit):
        used.append(found)
        assert index == found
        with lock:
            held -= sizes[index]
            assert held <= max(limit, 0)
    assert used == list(range(len(sizes)))
    assert most <= max(limit, max(sizes))


def test_one_item_is_made_ahead():
    made: list[int] = []
    closed = threading.Event()

    def items() -> Iterator[int]:
        try:
            for index in range(100):
                made.append(index)
                yield index
        finally:
            closed.set()

    ahead = one_ahead(items())
    for index in ahead:
        assert len(made) <= index + 2
        if index == 10:
            break
    ahead.close()
    assert closed.is_set()
    assert len(made) <= 12
    assert list(one_ahead(index for index in (0, 1, 2))) == [0, 1, 2]
    with pytest.raises(ZeroDivisionError):
        list(one_ahead(1 // index for index in (2, 1, 0)))


def test_the_others_stop_at_their_next_item():
    done: list[int] = []
    failed = threading.Event()

    def fail(stop: threading.Event) -> None:
        failed.set()
        raise ValueError("first")

    def go_on(stop: threading.Event) -> None:
        failed.wait(10)
        while not stop.wait(0.001) and len(done) < 10_000:
            done.append(1)

    with pytest.raises(ValueError, match="first"):
        run_together([go_on, fail, go_on])
    assert len(done) < 10_000


@pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="signals a thread")
def test_an_interrupt_stops_them_all():
    stopped: list[bool] = []

    def wait(stop: threading.Event) -> None:
        stopped.append(stop.wait(30))

    def interrupt(stop: threading.Event) -> None:
        while not stop.wait(0.3):  # one that comes just before the main thread begins to wait is lost
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs inherit that it is ignored
    try:
        with pytest.raises(KeyboardInterrupt):
            run_together([wait, interrupt, wait])
    finally:
        signal.signal(signal.SIGINT, before)
    assert stopped == [True, True]


def test_one_task_runs_in_the_thread_that_asks_for_it():
    ran: list[threading.Thread] = []
    run_together([lambda stop: ran.append(threading.current_thread())])
    run_together([])
    assert ran == [threading.current_thread()]
