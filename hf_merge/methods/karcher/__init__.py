from ...registry import register_merge_method
from .config import KarcherConfig
from .method import Karcher


__all__ = ["Karcher", "KarcherConfig"]

register_merge_method(name="karcher", config_cls=KarcherConfig, method_cls=Karcher)
