from ...registry import register_merge_method
from .config import ProDistillConfig
from .method import ProDistill


__all__ = ["ProDistill", "ProDistillConfig"]

register_merge_method(name="prodistill", config_cls=ProDistillConfig, method_cls=ProDistill)
