from ...registry import register_merge_method
from .config import MagMaxConfig
from .method import MagMax


__all__ = ["MagMax", "MagMaxConfig"]

register_merge_method(name="magmax", config_cls=MagMaxConfig, method_cls=MagMax)
