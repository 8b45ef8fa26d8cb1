from ...registry import register_merge_method
from .config import TaskArithmeticConfig
from .method import TaskArithmetic


__all__ = ["TaskArithmetic", "TaskArithmeticConfig"]

register_merge_method(name="task_arithmetic", config_cls=TaskArithmeticConfig, method_cls=TaskArithmetic)
