from ...registry import register_merge_method
from .config import TwinConfig
from .method import Twin


__all__ = ["Twin", "TwinConfig"]

register_merge_method(name="twin", config_cls=TwinConfig, method_cls=Twin)
