"""How much memory a piece of work takes."""

from __future__ import annotations

import threading

import psutil
import torch
from typing_extensions import Self


INTERVAL = 0.02
"""Seconds between two looks."""


class PeakMemory:
    """A context manager that watches this process: the largest growth of its resident set over what it was at the start, and of the
    memory of CUDA devices.

    The high-water mark that the system keeps never falls, so it cannot tell one merge from another in the same process.

    **Attributes**:
        - **nbytes** (`int`) -- The growth, after the work.
    """

    def __init__(self):
        self.nbytes = 0
        self._process = psutil.Process()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="hf_merge-memory", daemon=True)

    def __enter__(self) -> Self:
        self._start = self._peak = self._process.memory_info().rss
        self._devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
        self._allocated = [torch.cuda.memory_allocated(device) for device in self._devices]
        for device in self._devices:
            torch.cuda.reset_peak_memory_stats(device)
        self._thread.start()
        return self

    def __exit__(self, *error) -> None:
        self._done.set()
        self._thread.join()
        self._look()
        peaks = [torch.cuda.max_memory_allocated(device) for device in self._devices]
        on_devices = sum(peak - start for peak, start in zip(peaks, self._allocated, strict=True))
        self.nbytes = self._peak - self._start + on_devices

    def _watch(self) -> None:
        while not self._done.wait(INTERVAL):
            self._look()

    def _look(self) -> None:
        self._peak = max(self._peak, self._process.memory_info().rss)
