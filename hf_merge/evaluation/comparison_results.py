"""The rows of a comparison: quality and cost of each candidate, which are on the Pareto front, and the file that keeps them."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from .tables import show_bytes, text_table


logger = logging.getLogger(__name__)

INDIVIDUAL = "individual"
"""The name of the experts' own row."""


@dataclass
class ComparisonRow:
    """One candidate.

    Args:
        name (`str`): Its name.
        fingerprint (`str`): Identifies recipe, models, rows and this version.
        scores (`dict[str, float]`): By task, on calibration rows that no method has merged with.
        mean, normalized (`float`, *optional*): Of the scores; see [`EvaluationResult`].
        test (`dict[str, float]`, *optional*): By task, on the test rows.
        seconds (`float`, *optional*): Of the merge.
        peak_memory_bytes (`int`, *optional*): What the merge added to the memory of the process.
        recipe (`dict`, *optional*): Without the experts.
    """

    name: str
    fingerprint: str
    scores: dict[str, float]
    mean: float | None = None
    normalized: float | None = None
    test: dict[str, float] | None = None
    seconds: float | None = None
    peak_memory_bytes: int | None = None
    recipe: dict[str, Any] | None = None

    @property
    def test_mean(self) -> float | None:
        """The mean over the tasks on test rows."""
        return sum(self.test.values()) / len(self.test) if self.test and self.mean is not None else None


@dataclass
class Comparison:
    """What [`compare_merges`] found.

    **Attributes**:
        - **rows** (`list[ComparisonRow]`) -- The candidates, in the order given.
        - **individual** (`ComparisonRow`) -- The experts, each on its own task.
        - **failed** (`dict[str, str]`) -- Candidates that could not be merged, and why.
        - **greater_is_better** (`bool`) -- Whether a greater mean is better.
    """

    rows: list[ComparisonRow]
    individual: ComparisonRow
    failed: dict[str, str] = field(default_factory=dict)
    greater_is_better: bool = True

    @property
    def best(self) -> ComparisonRow | None:
        """The candidate with the best mean share of the experts' scores, or the best mean; the first of equals."""
        return max(self.rows, key=self._quality, default=None)

    def front(self, cost: str) -> list[str]:
        """The candidates that no other one beats in quality at the same or less cost: the Pareto front.

        Args:
            cost (`str`): `"seconds"` or `"peak_memory_bytes"`.
        """
        return [row.name for row in self.rows if not any(self._beats(other, row, cost) for other in self.rows)]

    def _quality(self, row: ComparisonRow) -> float:
        if row.normalized is not None:
            return row.normalized
        if row.mean is None:
            return float("-inf")
        return row.mean if self.greater_is_better else -row.mean

    def _beats(self, other: ComparisonRow, row: ComparisonRow, cost: str) -> bool:
        better = (self._quality(other), -getattr(other, cost))
        worse = (self._quality(row), -getattr(row, cost))
        return better != worse and better[0] >= worse[0] and better[1] >= worse[1]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready data."""
        best = self.best
        return {
            "individual": vars(self.individual),
            "rows": [vars(row) | {"test_mean": row.test_mean} for row in self.rows],
            "failed": self.failed,
            "best": best.name if best is not None else None,
            "front": {cost: self.front(cost) for cost in ("seconds", "peak_memory_bytes")},
        }

    def table(self) -> tuple[list[str], list[list[Any]]]:
        """Titles and rows: scores by task, means, time, memory, and which of both the row is on the front of."""
        tasks = list(self.individual.scores)
        has_test = any(row.test for row in self.rows)
        header = ["", *tasks, "mean", "normalized", *(["test mean"] if has_test else []), "seconds", "memory", "front"]
        fronts = {"time": self.front("seconds"), "memory": self.front("peak_memory_bytes")}
        rows = []
        for row in [self.individual, *self.rows]:
            on = ", ".join(name for name, front in fronts.items() if row.name in front)
            memory = show_bytes(row.peak_memory_bytes)
            test = [row.test_mean] if has_test else []
            scores = [row.scores[task] for task in tasks]
            rows.append([row.name, *scores, row.mean, row.normalized, *test, row.seconds, memory, on])
        return header, rows

    def __str__(self) -> str:
        text = text_table(*self.table())
        best = self.best
        if best is not None:
            text += f"\n\nbest on the calibration rows: {best.name}"
        return text + "".join(f"\nfailed: {name}: {reason}" for name, reason in self.failed.items())


class ResultsFile:
    """Finished rows as JSON lines, appended one by one.

    Args:
        path (`str`, *optional*): The file; nothing is kept when not given.

    Raises:
        ConfigError: The file holds something else, or cannot be read.
    """

    def __init__(self, path: str | os.PathLike | None):
        self.path = Path(path) if path is not None else None
        self._rows: dict[str, ComparisonRow] = {}
        if self.path is not None and self.path.exists():
            self._read()

    def _read(self) -> None:
        try:
            text = self.path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"The results '{self.path}' cannot be read: {error}") from error
        lines = text.split("\n")
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = ComparisonRow(**json.loads(line))
            except (ValueError, TypeError) as error:
                if number == len(lines):
                    self._cut(text, line)  # a run was killed while it wrote its last line
                    continue
                raise ConfigError(
                    f"Line {number} of '{self.path}' is no row of a comparison ({error}): choose another file for results."
                ) from error
            self._rows[row.fingerprint] = row

    def _cut(self, text: str, line: str) -> None:
        logger.warning("The last line of '%s' is incomplete and is measured again.", self.path)
        self.path.write_text(text[: len(text) - len(line)], encoding="utf-8")

    @property
    def rows(self) -> list[ComparisonRow]:
        """The finished rows, in the order of the file."""
        return list(self._rows.values())

    def find(self, key: str, name: str) -> ComparisonRow | None:
        """The finished row with a fingerprint, under the name that it has now."""
        row = self._rows.get(key)
        return dataclasses.replace(row, name=name) if row is not None else None

    def add(self, row: ComparisonRow) -> ComparisonRow:
        """Keeps a row and returns it."""
        self._rows[row.fingerprint] = row
        if self.path is not None:
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with self.path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(vars(row), default=list) + "\n")
                    file.flush()
                    os.fsync(file.fileno())
            except OSError as error:
                raise ConfigError(f"The results '{self.path}' cannot be written: {error}") from error
        return row
