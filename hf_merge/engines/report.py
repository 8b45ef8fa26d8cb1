"""What happened in a merge."""

from __future__ import annotations

import os
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class MergeReport:
    """What happened: one row per parameter, and the run as a whole.

    **Attributes**:
        - **parameters** (`dict[str, dict]`) -- Per parameter: kind, action, method, norms, and what the method reports.
        - **seconds** (`dict[str, float]`) -- Wall time by phase.
        - **peak_memory_bytes** (`int`) -- The largest resident set of the process so far; the largest of all ranks.
        - **num_proc** (`int`) -- How many processes of this machine merged, of each rank.
        - **blocks** (`dict[str, dict]`) -- Per block, for methods that need data: losses and steps.
        - **heads** (`dict[str, dict]`) -- Per task whose head was fitted or whose features are corrected: which layers, and to how
          many samples.
        - **ranks** (`list[dict]`) -- Of a merge on several ranks, for each of them: how many parameters it merged (those of blocks are
          merged by all ranks together), its seconds and its peak memory.
        - **dropped** (`list[dict]`), **notes** (`list[str]`) -- As planned.
    """

    parameters: dict[str, dict[str, Any]] = field(default_factory=dict, repr=False)
    seconds: dict[str, float] = field(default_factory=dict)
    peak_memory_bytes: int = 0
    num_proc: int = 1
    blocks: dict[str, dict[str, Any]] = field(default_factory=dict, repr=False)
    heads: dict[str, dict[str, Any]] = field(default_factory=dict)
    ranks: list[dict[str, Any]] = field(default_factory=list)
    dropped: list[dict[str, str]] = field(default_factory=list, repr=False)
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready data."""
        return dict(vars(self))


def peak_memory_bytes() -> int:
    """The peak resident set of this process; 0 where the system does not tell (Windows)."""
    try:
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        return int(re.search(r"^VmHWM:\s+(\d+) kB$", status, re.MULTILINE)[1]) * 1024
    except (OSError, TypeError):  # not Linux, where `getrusage` would also count the process that started this one
        pass
    try:
        import resource
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def process_memory() -> int:
    """The resident set of this process now; its peak where the system does not tell."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, ValueError):
        return peak_memory_bytes()
    return pages * os.sysconf("SC_PAGE_SIZE")
