"""What a report is about: the files of a merged folder, and what reading its models again tells."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...config import MergeConfig
from ...engines.inspection import Inspection, inspect_models
from ...engines.sealing import REPORT_NAME
from ...errors import ConfigError, MergeError
from ...hub import merged_folder
from ...merger import Merger
from ...methods.task_arithmetic import TaskArithmeticConfig
from ..comparison_results import INDIVIDUAL, Comparison, ComparisonRow, ResultsFile
from ..results import EvaluationResult


logger = logging.getLogger(__name__)

LINEAR_KINDS = ("linear", "transposed_linear", "expert_linear", "transposed_expert_linear")
_BLOCK = re.compile(r"^(?P<stem>.*?)\.(?P<index>\d+)\.(?P<module>.+)$")


@dataclass
class ReportData:
    """Everything that a report shows.

    Args:
        title (`str`): The folder's name.
        recipe ([`MergeConfig`]): As it was carried out.
        report (`dict`): `merge_report.json`.
        evaluation ([`EvaluationResult`], *optional*): As saved by `hf-merge eval`.
        inspection ([`Inspection`], *optional*): The task vectors; `None` where the models were not read.
        comparison ([`Comparison`], *optional*): Of several recipes.
        remarks (`list[str]`): What is missing in the report, and why.
    """

    title: str
    recipe: MergeConfig
    report: dict[str, Any]
    evaluation: EvaluationResult | None
    inspection: Inspection | None
    comparison: Comparison | None
    remarks: list[str]

    @property
    def experts(self) -> list[str]:
        """Their names, in order."""
        return list(self.recipe.experts or {})

    def parameters_with(self, key: str) -> dict[str, dict[str, Any]]:
        """The rows of the report that say something about `key`."""
        return {name: row for name, row in self.report["parameters"].items() if row.get(key) is not None}


def read_folder(
    folder: Path, comparison: Path | None = None, models: bool = True, trust_remote_code: bool = False
) -> ReportData:
    """Collects what a report shows.

    Args:
        folder (`Path`): A merged folder.
        comparison (`Path`, *optional*): The results of `hf-merge compare`.
        models (`bool`): Whether base and experts are read again, where they are on this machine.
        trust_remote_code (`bool`): Whether code from the models' repositories may run.

    Raises:
        CheckpointError: The folder holds no `merge_config.json` or no `merge_report.json`.
        ConfigError: A file is not what it should be.
    """
    path = merged_folder(folder, REPORT_NAME) / REPORT_NAME
    recipe = MergeConfig.from_pretrained(folder)
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        _check(report)
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"'{path}' cannot be used: {error}") from error
    remarks: list[str] = []
    inspection = _inspect(recipe, trust_remote_code, remarks) if models else None
    known = None if comparison is None else read_comparison(comparison)
    return ReportData(folder.resolve().name, recipe, report, EvaluationResult.load(folder), inspection, known, remarks)


def _check(report: Any) -> None:
    if not isinstance(report, dict) or not isinstance(report.get("parameters"), dict):
        raise TypeError("it has no 'parameters'")
    for key, kind in {"seconds": dict, "blocks": dict, "heads": dict, "dropped": list, "notes": list}.items():
        if not isinstance(report.setdefault(key, kind()), kind):
            raise TypeError(f"'{key}' is a {type(report[key]).__name__}")


def _inspect(recipe: MergeConfig, trust_remote_code: bool, remarks: list[str]) -> Inspection | None:
    """The task vectors of the recipe's models. Nothing is downloaded."""
    if recipe.base_model is None:
        remarks.append("There is no base model, so there are no task vectors to compare.")
        return None
    try:
        merger = Merger.from_pretrained(
            recipe.experts,
            TaskArithmeticConfig(heads=recipe.heads, tokenizer=recipe.tokenizer),
            base_model=recipe.base_model,
            trust_remote_code=trust_remote_code,
            local_files_only=True,
        )
        return inspect_models(merger.check())
    except MergeError as error:
        remarks.append(f"The task vectors were not compared: {' '.join(str(error).split())}")
        return None


def read_comparison(path: Path) -> Comparison:
    """The rows of a file that `hf-merge compare --results` wrote. Where the file has rows of several comparisons, those with the
    tasks of the last one."""
    if not path.is_file():
        raise ConfigError(f"There is no file '{path}': it is written by `hf-merge compare --results`.")
    rows = ResultsFile(path).rows
    individual = next((row for row in reversed(rows) if row.name == INDIVIDUAL), None)
    if individual is None:
        raise ConfigError(f"'{path}' has no row '{INDIVIDUAL}': it was not written by `hf-merge compare`.")
    candidates: dict[str, ComparisonRow] = {
        row.name: row for row in rows if row.name != INDIVIDUAL and set(row.scores) == set(individual.scores)
    }
    return Comparison(list(candidates.values()), individual)


def by_module(values: Mapping[str, float]) -> tuple[list[str], list[int], list[list[float]]]:
    """Values of parameters as a table: one row for each kind of module, one column for each block.

    Args:
        values (`Mapping[str, float]`): By module name. Names without a number are left out.

    Returns:
        `tuple`: The modules, the blocks, and the values; NaN where a block has no such module.
    """
    cells: dict[tuple[str, int], float] = {}
    for name, value in values.items():
        match = _BLOCK.match(name)
        if match is not None:
            cells[match["module"].removesuffix(".weight"), int(match["index"])] = value
    modules = list(dict.fromkeys(module for module, _ in cells))
    blocks = sorted({block for _, block in cells})
    missing = float("nan")
    return modules, blocks, [[cells.get((module, block), missing) for block in blocks] for module in modules]


def block_of(name: str) -> int | None:
    """The number of the block that a parameter belongs to."""
    match = _BLOCK.match(name)
    return int(match["index"]) if match is not None else None


def mean(values: Iterable[float]) -> float:
    """The mean; NaN of nothing."""
    values = list(values)
    return sum(values) / len(values) if values else float("nan")
