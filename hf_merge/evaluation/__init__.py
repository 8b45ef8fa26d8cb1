"""Evaluation: tasks, metrics, tables, comparisons of methods, and the report."""

from .comparison import Comparison, compare_merges, grid
from .evaluator import evaluate_merge
from .metrics import METRICS, Metric
from .results import EvaluationResult, TaskScore
from .tasks import EvaluationTask, read_tasks


__all__ = [
    "METRICS",
    "Comparison",
    "EvaluationResult",
    "EvaluationTask",
    "Metric",
    "TaskScore",
    "compare_merges",
    "evaluate_merge",
    "grid",
    "read_tasks",
]
