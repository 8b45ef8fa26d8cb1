from ...registry import register_merge_method
from .config import SceConfig
from .method import Sce


__all__ = ["Sce", "SceConfig"]

register_merge_method(name="sce", config_cls=SceConfig, method_cls=Sce)
