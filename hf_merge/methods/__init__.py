"""The merge methods: WHAT is computed. One folder per method or close family; importing one registers it."""

from .linear import LinearConfig, LinearMerge
from .task_arithmetic import TaskArithmetic, TaskArithmeticConfig


__all__ = [
    "LinearConfig",
    "LinearMerge",
    "TaskArithmetic",
    "TaskArithmeticConfig",
]
