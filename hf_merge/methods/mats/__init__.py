from ...registry import register_merge_method
from .config import MatsConfig
from .method import Mats


__all__ = ["Mats", "MatsConfig"]

register_merge_method(name="mats", config_cls=MatsConfig, method_cls=Mats)
