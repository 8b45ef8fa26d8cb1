"""[`EvaluationResult`]: how good a merged model is at each task, alone and beside the experts."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from .tables import text_table


EVALUATION_NAME = "evaluation.json"


@dataclass
class TaskScore:
    """One task.

    Args:
        value (`float`): Of the merged model.
        metric (`str`): Its name.
        count (`int`): How many predictions it is over.
        greater_is_better (`bool`): Of the metric.
        expert (`float`, *optional*): Of the task's own expert.
        normalized (`float`, *optional*): The value as a share of the expert's; 1 is as good.
    """

    value: float
    metric: str
    count: int
    greater_is_better: bool = True
    expert: float | None = None
    normalized: float | None = None


@dataclass
class EvaluationResult:
    """What [`evaluate_merge`] found.

    **Attributes**:
        - **tasks** (`dict[str, TaskScore]`) -- By task: value, metric, number of samples, the expert's value, and their ratio.
    """

    tasks: dict[str, TaskScore] = field(default_factory=dict)

    @property
    def mean(self) -> float | None:
        """The mean over the tasks; `None` where metrics are mixed that are better when greater and when smaller."""
        if len({score.greater_is_better for score in self.tasks.values()}) != 1:
            return None
        return statistics.fmean(score.value for score in self.tasks.values())

    @property
    def normalized(self) -> float | None:
        """The mean of the values divided by those of the tasks' own experts; `None` where no expert was measured."""
        known = [score.normalized for score in self.tasks.values() if score.normalized is not None]
        return statistics.fmean(known) if known else None

    @property
    def expert_mean(self) -> float | None:
        """The mean over the experts, each on its own task; `None` where one was not measured or metrics are mixed."""
        values = [score.expert for score in self.tasks.values()]
        return None if self.mean is None or None in values else statistics.fmean(values)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready data."""
        return {
            "tasks": {name: vars(score) for name, score in self.tasks.items()},
            "mean": self.mean,
            "normalized": self.normalized,
            "expert_mean": self.expert_mean,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> EvaluationResult:
        """The reverse of [`~EvaluationResult.to_dict`]."""
        return cls({name: TaskScore(**score) for name, score in data["tasks"].items()})

    def save(self, folder: str | Path) -> Path:
        """Writes `evaluation.json` into the folder of the merged model, where the report and the model card find it.

        Args:
            folder (`str` or `Path`): The folder.
        """
        if not Path(folder).is_dir():
            raise ConfigError(f"Cannot save the evaluation: the folder '{folder}' does not exist.")
        path = Path(folder) / EVALUATION_NAME
        path.write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")
        return path

    @classmethod
    def load(cls, folder: str | Path) -> EvaluationResult | None:
        """The evaluation that was saved in a folder; `None` where there is none.

        Args:
            folder (`str` or `Path`): The folder.
        """
        path = Path(folder) / EVALUATION_NAME
        if not path.is_file():
            return None
        try:
            return cls.from_dict(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(
                f"'{path}' is not an evaluation ({error}): write it again with `hf-merge eval`."
            ) from error

    def rows(self) -> list[list[Any]]:
        """The table's rows: task, metric, merged, expert, normalized, samples; the means last."""
        rows = [
            [name, score.metric, score.value, score.expert, score.normalized, score.count]
            for name, score in self.tasks.items()
        ]
        return [*rows, ["mean", "", self.mean, self.expert_mean, self.normalized, None]]

    def __str__(self) -> str:
        return text_table(RESULT_HEADER, self.rows())


RESULT_HEADER = ("task", "metric", "merged", "expert", "normalized", "samples")
