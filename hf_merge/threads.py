"""How many threads operations of torch use."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch


_lock, _inside, _threads = threading.Lock(), 0, 1


def _begin_anew() -> None:
    """In a fork, which has none of the other threads."""
    global _lock, _inside
    _lock, _inside = threading.Lock(), 0


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_begin_anew)


@contextmanager
def one_thread() -> Iterator[None]:
    """Runs operations in the calling thread alone. One on a piece takes some microseconds: to divide it among threads gains little
    where they are idle, and costs a multiple where they have to be waited for.

    Several threads may be inside at once: the number that the first one found is the one that comes back.
    """
    global _inside, _threads
    with _lock:
        if _inside == 0:
            _threads = torch.get_num_threads()
        _inside += 1
        torch.set_num_threads(1)
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            torch.set_num_threads(_threads)  # by every thread, as a part of the setting is its own
