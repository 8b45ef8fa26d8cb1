from ...registry import register_merge_method
from .config import MoeConfig
from .method import Moe


__all__ = ["Moe", "MoeConfig"]

register_merge_method(name="moe", config_cls=MoeConfig, method_cls=Moe)
