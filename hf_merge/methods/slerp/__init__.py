from ...registry import register_merge_method
from .config import SlerpConfig
from .method import Slerp


__all__ = ["Slerp", "SlerpConfig"]

register_merge_method(name="slerp", config_cls=SlerpConfig, method_cls=Slerp)
