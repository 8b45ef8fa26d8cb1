from ...registry import register_merge_method
from .config import SvcConfig
from .method import Svc


__all__ = ["Svc", "SvcConfig"]

register_merge_method(name="svc", config_cls=SvcConfig, method_cls=Svc)
