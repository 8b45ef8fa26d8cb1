from ...registry import register_merge_method
from .config import DellaConfig
from .method import Della


__all__ = ["Della", "DellaConfig"]

register_merge_method(name="della", config_cls=DellaConfig, method_cls=Della)
