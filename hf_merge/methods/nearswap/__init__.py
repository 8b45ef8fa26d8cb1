from ...registry import register_merge_method
from .config import NearSwapConfig
from .method import NearSwap


__all__ = ["NearSwap", "NearSwapConfig"]

register_merge_method(name="nearswap", config_cls=NearSwapConfig, method_cls=NearSwap)
