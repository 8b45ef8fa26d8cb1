from ...registry import register_merge_method
from .config import LinearConfig
from .method import LinearMerge


__all__ = ["LinearConfig", "LinearMerge"]

register_merge_method(name="linear", config_cls=LinearConfig, method_cls=LinearMerge)
