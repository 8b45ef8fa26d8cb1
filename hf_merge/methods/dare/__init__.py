from ...registry import register_merge_method
from .config import DareConfig
from .method import Dare


__all__ = ["Dare", "DareConfig"]

register_merge_method(name="dare", config_cls=DareConfig, method_cls=Dare)
