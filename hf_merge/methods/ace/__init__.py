from ...registry import register_merge_method
from .config import AceConfig
from .method import Ace


__all__ = ["Ace", "AceConfig"]

register_merge_method(name="ace", config_cls=AceConfig, method_cls=Ace)
