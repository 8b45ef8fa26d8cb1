from ...registry import register_merge_method
from .config import TiesConfig
from .method import Ties


__all__ = ["Ties", "TiesConfig"]

register_merge_method(name="ties", config_cls=TiesConfig, method_cls=Ties)
