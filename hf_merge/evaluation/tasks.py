"""[`EvaluationTask`]: what a merged model is measured on, and reading tasks from files."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from transformers import PreTrainedModel

from ..data.batching import Sample
from ..data.samples import TaskModel, read_rows, to_samples
from ..errors import ConfigError, suggest
from .metrics import Metric, get_metric


@dataclass
class EvaluationTask:
    """A labelled dataset, how its rows become inputs, and a metric.

    Args:
        dataset: The labelled rows, as [`CalibrationData`] takes them: a `datasets.Dataset`, a list of dictionaries with a column
            `label` or `labels`, a `DataLoader`, a dictionary of tensors. Causal language models need no labels.
        metric (`str`, `Callable` or [`Metric`]): `"accuracy"`, `"f1"`, `"macro_f1"`, `"matthews_correlation"`, `"pearson"`, `"mse"`,
            `"loss"`, `"perplexity"`; the path of a local module of `evaluate`, or a loaded one; or a function
            `metric(predictions, references)` of two numpy arrays.
        calibration (*optional*): Other rows of the task, labelled too: [`compare_merges`] chooses by them, and merges with some of
            them.
        processor (*optional*): A tokenizer or processor; that of the expert's folder when not given.
        columns (`str` or `list[str]`, *optional*): The column with the text or image; two for pairs of texts.
        predict (`Callable`, *optional*): `predict(model, inputs) -> predictions`, one for each sample of a batch of tensors, for models
            whose answer is not the largest logit: generated texts, spans. The metric then gets these and the labels as they are.
        max_length (`int`, *optional*): Texts are cut to this many tokens.
        num_samples (`int`, *optional*): How many rows of `dataset` are used, drawn with `seed`. All when not given.
        batch_size (`int`): Samples per forward.
        seed (`int`): Of the draw.

    Raises:
        ConfigError: The metric is unknown or a number is out of range.
    """

    dataset: Any = field(repr=False)
    metric: Any = "accuracy"
    calibration: Any = field(default=None, repr=False)
    processor: Any = None
    columns: str | Sequence[str] | None = None
    predict: Callable[[PreTrainedModel, dict[str, Tensor]], Sequence[Any]] | None = None
    max_length: int | None = None
    num_samples: int | None = None
    batch_size: int = 32
    seed: int = 0
    measure: Metric = field(init=False, repr=False)

    def __post_init__(self):
        self.measure = get_metric(self.metric)
        if isinstance(self.columns, str):
            self.columns = [self.columns]
        for name in ("max_length", "num_samples", "batch_size"):
            value = getattr(self, name)
            if value is None and name != "batch_size":
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"EvaluationTask.{name} must be a positive integer, got {value!r}.")

    @classmethod
    def of(cls, task: Any) -> EvaluationTask:
        """`task` itself, or rows as a task with the default metric."""
        return task if isinstance(task, EvaluationTask) else cls(task)

    def rows(self, name: str) -> list[Any]:
        """The rows that are used.

        Args:
            name (`str`): The task's name, for messages.
        """
        rows = read_rows(name, self.dataset, self.num_samples, self._generator(name))
        if not rows:
            raise ConfigError(f"The dataset of the task '{name}' is empty.")
        return rows

    def divide_calibration(self, name: str, merging: int) -> tuple[list[Any], list[Any]]:
        """The calibration rows in two parts: those that methods merge with, and the rest, to compare results by.

        Args:
            name (`str`): The task's name.
            merging (`int`): How many are for merging.
        """
        if self.calibration is None:
            raise ConfigError(
                f"The task '{name}' has no calibration rows: merges are compared by them, not by the test rows. Give some with "
                "EvaluationTask(..., calibration=rows), or 'calibration' in the file of tasks."
            )
        rows = read_rows(name, self.calibration, None, self._generator(name))
        if len(rows) <= merging:
            raise ConfigError(
                f"The task '{name}' has {len(rows)} calibration rows, {merging} of which are for merging: none are left to compare "
                "by. Give more, or lower num_samples."
            )
        order = self._generator(name).permutation(len(rows))
        return [rows[i] for i in order[:merging]], [rows[i] for i in order[merging:]]

    def samples(self, rows: Sequence[Any], model: TaskModel) -> tuple[list[Sample], list[Any]]:
        """Rows as arguments of a model's forward, and their labels.

        Args:
            rows (`Sequence`): As [`~EvaluationTask.rows`] returns them.
            model ([`TaskModel`]): What they have to fit.
        """
        return to_samples(rows, model, self.processor, self.columns, self.max_length)

    def _generator(self, name: str) -> np.random.Generator:
        return np.random.default_rng([self.seed, *name.encode()])


def read_tasks(path: str | Path) -> dict[str, EvaluationTask]:
    """Tasks from a YAML or JSON file: `{task: {data: file, metric: accuracy, ...}}`.

    `data` and `calibration` are files relative to it (`.json`, `.jsonl`, `.csv`, `.parquet`), folders written by
    `Dataset.save_to_disk`, or `name:split` of a dataset on the Hub. The other keys are `metric`, `columns`, `max_length`,
    `num_samples`, `batch_size` and `seed`. A task may be a file name alone.

    Raises:
        ConfigError: The file or one of its datasets cannot be read, or a key is unknown.
    """
    from ..interop.yaml import YAMLError, load_documents

    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
        documents = [json.loads(text)] if path.suffix == ".json" else load_documents(text)
    except (OSError, ValueError, YAMLError, RecursionError) as error:
        raise ConfigError(f"Cannot read the tasks '{path}': {' '.join(str(error).split())}") from error
    if len(documents) != 1 or not isinstance(documents[0], dict) or not documents[0]:
        raise ConfigError(f"'{path}' must be a mapping of tasks: {{task: {{data: file, metric: accuracy}}}}.")
    return {str(name): _task(str(name), entry, path) for name, entry in documents[0].items()}


_KEYS = ("data", "calibration", "metric", "columns", "max_length", "num_samples", "batch_size", "seed")


def _task(name: str, entry: Any, path: Path) -> EvaluationTask:
    where = f"'{path}', task '{name}'"
    entry = {"data": entry} if isinstance(entry, str) else entry
    if not isinstance(entry, dict) or "data" not in entry:
        raise ConfigError(f"{where}: 'data' is missing, the file with the labelled rows.")
    unknown = [key for key in entry if key not in _KEYS]
    if unknown:
        raise ConfigError(
            f"{where}: unknown key '{unknown[0]}'.{suggest(str(unknown[0]), _KEYS)} Known: {', '.join(_KEYS)}."
        )
    arguments = {key: value for key, value in entry.items() if key not in ("data", "calibration")}
    if isinstance(arguments.get("metric"), str) and (path.parent / arguments["metric"]).exists():
        arguments["metric"] = str(path.parent / arguments["metric"])
    calibration = entry.get("calibration")
    return EvaluationTask(
        read_dataset(entry["data"], path.parent, where),
        calibration=None if calibration is None else read_dataset(calibration, path.parent, where),
        **arguments,
    )


def read_dataset(name: Any, folder: Path, where: str) -> Any:
    """The rows of a file, a saved dataset or a dataset on the Hub.

    Args:
        name (`str`): A path, or `name:split`.
        folder (`Path`): What paths are relative to.
        where (`str`): For messages.
    """
    if not isinstance(name, str):
        raise ConfigError(f"{where}: a dataset is the name of a file, got {name!r}.")
    path = folder / Path(name).expanduser()
    try:
        if path.is_dir():
            return _saved(path)
        if path.is_file():
            return _READERS.get(path.suffix, _unknown)(path)
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{where}: the dataset '{path}' cannot be read: {reason}") from error
    if ":" not in name:
        raise ConfigError(f"{where}: there is no file '{path}'. A dataset on the Hub is written 'owner/name:split'.")
    return _from_hub(name, where)


def _saved(path: Path) -> Any:
    import datasets

    return datasets.load_from_disk(str(path))


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _json_lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def _csv(path: Path) -> list[dict[str, Any]]:
    from pyarrow import csv

    return csv.read_csv(path).to_pylist()


def _parquet(path: Path) -> Any:
    import datasets
    from pyarrow import parquet

    return datasets.Dataset(parquet.read_table(path))  # the file's metadata know which columns hold images


def _unknown(path: Path) -> Any:
    raise ValueError(f"its ending is none of {', '.join(_READERS)}")


_READERS = {".json": _json, ".jsonl": _json_lines, ".csv": _csv, ".parquet": _parquet}


def _from_hub(name: str, where: str) -> Any:
    import datasets

    dataset, _, split = name.rpartition(":")
    try:
        return datasets.load_dataset(dataset, split=split)
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(f"{where}: the dataset '{name}' cannot be loaded from the Hub: {reason}") from error
