"""The errors of hf_merge: one base class, and one subclass for each thing that can be wrong.

Every subclass keeps the matching builtin as second base, so that `except ValueError` keeps working. A message names the
file, key or field, the value that was found and what to do about it.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class MergeError(Exception):
    """Base class of everything that hf_merge raises on purpose."""


class ConfigError(MergeError, ValueError):
    """A recipe or a method setting is unknown, misspelt or out of range."""


class CheckpointError(MergeError, OSError):
    """A checkpoint is missing, truncated, inconsistent or not readable without executing code."""


class UnsupportedModelError(MergeError, NotImplementedError):
    """The model is of a kind that cannot be merged (quantised weights, unknown class, code from the Hub that is not trusted)."""


class NonFiniteError(MergeError, ArithmeticError):
    """A merged parameter holds NaN or infinity."""


class OutputError(MergeError, OSError):
    """The output folder cannot be written: it is not empty, read-only, or the disk is full."""


class RankLostError(MergeError, ConnectionError):
    """A process of a merge on several ranks was killed or does not answer. What is finished is kept: the same command continues."""


class MissingDependencyError(MergeError, ImportError):
    """An optional package is needed for what was asked."""

    def __init__(self, package: str, purpose: str, extra: str | None = None):
        target = f'"hf_merge[{extra}]"' if extra else package
        super().__init__(f"{purpose} needs the package `{package}`, which is not installed. Run: pip install {target}")


class PlanError(MergeError, ValueError):
    """The merge cannot run. Lists every problem that the headers of the checkpoints reveal, not only the first.

    **Attributes**:
        - **problems** (`list[str]`) -- One sentence for each problem.
    """

    def __init__(self, problems: Iterable[str]):
        self.problems = list(problems)
        count = len(self.problems)
        if count == 1:
            super().__init__(self.problems[0])
        else:
            listing = "\n".join(f"  - {problem}" for problem in self.problems)
            super().__init__(f"{count} problems found, nothing was written:\n{listing}")


def suggest(word: str, known: Iterable[str]) -> str:
    """Returns `" Did you mean 'x'?"` for the nearest known word, or the empty string when none is near."""
    near = difflib.get_close_matches(str(word), [str(one) for one in known], n=1, cutoff=0.6)
    return f" Did you mean '{near[0]}'?" if near else ""
