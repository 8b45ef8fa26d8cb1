"""[`compare_merges`]: several recipes on the same experts, measured by calibration rows. Finished rows are kept in a file, so that
a comparison that was interrupted, or gets another candidate, measures only what is new."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import logging
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

from .. import __version__
from ..config import MergeConfig
from ..data.calibration import CalibrationData
from ..errors import ConfigError, MergeError, suggest
from ..merger import Merger
from ..registry import get_merge_method
from .comparison_results import INDIVIDUAL, Comparison, ComparisonRow, ResultsFile
from .evaluator import evaluate_experts, evaluate_merge
from .fingerprints import fingerprint, folder_fingerprint
from .memory import PeakMemory
from .results import EvaluationResult
from .subjects import MergerSubject
from .tasks import EvaluationTask


logger = logging.getLogger(__name__)


def grid(config: MergeConfig | str, **values: Sequence[Any]) -> dict[str, MergeConfig]:
    """Variants of a recipe, one for each combination of values, named after them.

    Args:
        config ([`MergeConfig`] or `str`): The recipe, or a method's name.
        values: The values of each setting.

    Example:

        >>> grid("task_arithmetic", scaling=[0.2, 0.3, 0.4])
    """
    config = MergeConfig.from_merge_type(config) if isinstance(config, str) else config
    known = {one.name for one in dataclasses.fields(config)}
    for key in values:
        if key not in known:
            raise ConfigError(f"The method '{config.merge_type}' has no setting '{key}'.{suggest(key, known)}")
    combinations = [dict(zip(values, chosen, strict=True)) for chosen in itertools.product(*values.values())]
    return {name_of(config.merge_type, one): MergeConfig.from_dict(config.to_dict() | one) for one in combinations}


def name_of(merge_type: str, settings: Mapping[str, Any]) -> str:
    """What a variant is called: `ties density=0.2`."""
    return " ".join([merge_type, *(f"{key}={json.dumps(value, default=str)}" for key, value in settings.items())])


def compare_merges(
    experts: Any,
    configs: Mapping[str, MergeConfig] | Sequence[MergeConfig],
    tasks: Mapping[str, EvaluationTask],
    *,
    base_model: Any = None,
    results: str | os.PathLike | None = None,
    num_samples: int = 64,
    test: bool = False,
    args: Any = None,
    dtype: Any = None,
    device: Any = None,
    device_map: Any = None,
    trust_remote_code: bool = False,
) -> Comparison:
    """Merges the experts with every recipe, in memory, and measures the results.

    The calibration rows of each task are divided once, by its seed: `num_samples` are for methods that need samples, the others
    measure. The test rows are never looked at, except with `test`.

    Args:
        experts (`dict` or `list`): As in [`Merger.from_pretrained`].
        configs (`dict` or `list`): The recipes, by name or in order; see [`grid`] for a sweep over settings.
        tasks (`dict[str, EvaluationTask]`): By the experts' names, each with `calibration` rows.
        base_model (*optional*): As in [`Merger.from_pretrained`].
        results (`str`, *optional*): A file of JSON lines that keeps finished rows. What is in it already is not measured again.
        num_samples (`int`): How many calibration rows of each task methods merge with.
        test (`bool`): Also measure every result on the test rows, to report them. Choose by the calibration rows.
        args ([`ProDistillArguments`], *optional*): For methods that need samples.
        dtype, device_map, trust_remote_code: As in [`Merger.from_pretrained`].
        device (*optional*): Where models are measured.

    Returns:
        [`Comparison`]: Print it for the table.

    Raises:
        ConfigError: There are no recipes, a task has no calibration rows, or `results` is no such file.
    """
    if isinstance(num_samples, bool) or not isinstance(num_samples, int) or num_samples < 0:
        raise ConfigError(f"num_samples must be an integer of at least 0, got {num_samples!r}.")
    candidates = _named(configs)
    opening = {
        "base_model": base_model,
        "dtype": dtype,
        "device_map": device_map,
        "trust_remote_code": trust_remote_code,
    }
    first = Merger.from_pretrained(experts, next(iter(candidates.values())), **opening)
    run = _Run(first, tasks, num_samples, test, args, device, ResultsFile(results))
    comparison = Comparison([], run.individual(), greater_is_better=run.greater_is_better)
    for name, config in candidates.items():
        try:
            comparison.rows.append(run.row(name, Merger.from_pretrained(experts, config, **opening)))
        except MergeError as error:
            logger.warning("%s: %s", name, error)
            comparison.failed[name] = " ".join(str(error).split())
    return comparison


def _named(configs: Any) -> dict[str, MergeConfig]:
    if not isinstance(configs, Mapping):
        listed = list(configs) if isinstance(configs, (list, tuple)) else [configs]
        names = [getattr(config, "merge_type", "?") for config in listed]
        configs = {
            name if names.count(name) == 1 else f"{name} {i}": config
            for i, (name, config) in enumerate(zip(names, listed, strict=True), start=1)
        }
    if not configs:
        raise ConfigError("There are no recipes to compare.")
    wrong = [name for name, config in configs.items() if not isinstance(config, MergeConfig)]
    if wrong:
        raise ConfigError(f"The recipe '{wrong[0]}' must be a MergeConfig such as WudiConfig().")
    if INDIVIDUAL in configs:
        raise ConfigError(f"'{INDIVIDUAL}' is the name of the experts' own row: call the recipe something else.")
    return dict(configs)


class _Run:
    """What all candidates of a comparison share: the rows, the experts' scores, the file of results."""

    def __init__(
        self,
        merger: Merger,
        tasks: Mapping[str, EvaluationTask],
        num_samples: int,
        test: bool,
        args: Any,
        device: Any,
        file: ResultsFile,
    ):
        if not isinstance(tasks, Mapping) or not tasks:
            raise ConfigError("tasks must be a dictionary {task: EvaluationTask} with at least one task.")
        self.merger, self.args, self.device, self.file = merger, args, device, file
        parts = {name: EvaluationTask.of(task).divide_calibration(name, num_samples) for name, task in tasks.items()}
        self.tests = {name: EvaluationTask.of(task) for name, task in tasks.items()} if test else None
        self.tasks = {
            name: dataclasses.replace(EvaluationTask.of(task), dataset=parts[name][1], num_samples=None)
            for name, task in tasks.items()
        }
        self.merging = {name: rows for name, (rows, _) in parts.items() if rows}
        self.greater_is_better = all(task.measure.greater_is_better for task in self.tasks.values())
        content = [
            __version__,
            [source.fingerprint() for source in [*merger.experts, *([merger.base] if merger.base else [])]],
            [source.name for source in merger.experts],
            [folder_fingerprint(source.processor_folder) for source in merger.experts],
            {name: fingerprint(task.rows(name), task) for name, task in self.tasks.items()},
            {name: fingerprint(rows, self.tasks[name]) for name, rows in self.merging.items()},
            {name: fingerprint(task.rows(name), task) for name, task in (self.tests or {}).items()},
        ]
        self.identity = _digest(content)

    def individual(self) -> ComparisonRow:
        """The experts, each on its own task."""
        key = _digest([self.identity, INDIVIDUAL])
        known = self.file.find(key, INDIVIDUAL)
        if known is not None:
            return known
        subject = MergerSubject(self.merger)
        scores = evaluate_experts(subject, self.tasks)
        unknown = [task for task in self.tasks if task not in scores]
        if unknown:
            names = ", ".join(source.name for source in self.merger.experts)
            raise ConfigError(f"No expert is called like the task '{unknown[0]}'. Experts: {names}.")
        test = evaluate_experts(subject, self.tests) if self.tests else None
        mean = sum(scores.values()) / len(scores)
        return self.file.add(ComparisonRow(INDIVIDUAL, key, scores, mean, 1.0, test))

    def row(self, name: str, merger: Merger) -> ComparisonRow:
        """One candidate, from the file or measured."""
        recipe = {k: v for k, v in merger.config.to_dict().items() if k not in ("experts", "base_model")}
        arguments = self.args.to_dict() if hasattr(self.args, "to_dict") else str(self.args)
        key = _digest([self.identity, recipe, arguments])
        known = self.file.find(key, name)
        if known is not None:
            return known
        data = self._data(merger)
        start = time.perf_counter()
        with PeakMemory() as memory:
            merger.merge(data, args=self.args if data is not None else None)
        seconds = time.perf_counter() - start
        result = self._measure(merger, self.tasks, self.individual().scores)
        test = (
            {task: score.value for task, score in self._measure(merger, self.tests, False).tasks.items()}
            if self.tests
            else None
        )
        scores = {task: score.value for task, score in result.tasks.items()}
        return self.file.add(
            ComparisonRow(name, key, scores, result.mean, result.normalized, test, seconds, memory.nbytes, recipe)
        )

    def _data(self, merger: Merger) -> CalibrationData | None:
        if not get_merge_method(merger.config.merge_type).method_cls.needs_data(merger.config):
            return None
        if not self.merging:
            raise ConfigError(f"'{merger.config.merge_type}' needs samples: num_samples must be at least 1.")
        lengths = [task.max_length for task in self.tasks.values() if task.max_length is not None]
        return CalibrationData(
            self.merging,
            processor={name: one.processor for name, one in self.tasks.items()},
            columns={name: one.columns for name, one in self.tasks.items()},
            max_length=max(lengths, default=None),
        )

    def _measure(self, merger: Merger, tasks: Mapping[str, EvaluationTask], experts: Any) -> EvaluationResult:
        return evaluate_merge(merger, tasks, experts=experts, device=self.device)


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()
