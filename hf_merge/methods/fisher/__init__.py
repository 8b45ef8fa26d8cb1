from ...registry import register_merge_method
from .config import FisherConfig
from .method import Fisher


__all__ = ["Fisher", "FisherConfig"]

register_merge_method(name="fisher", config_cls=FisherConfig, method_cls=Fisher)
