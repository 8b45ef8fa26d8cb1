"""What the methods on linear layers write into `merge_report.json`."""

from __future__ import annotations

from .base import TaskMatrices, TensorGroup


def add_to_report(group: TensorGroup, task_matrices: TaskMatrices, key: str, value: float) -> None:
    """Adds a number of one linear layer to its parameter's report; the experts of a mixture share one, by their mean."""
    share = 1.0 if task_matrices.index is None else 1.0 / group.shape[0]
    group.report[key] = group.report.get(key, 0.0) + share * value
