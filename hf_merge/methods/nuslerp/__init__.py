from ...registry import register_merge_method
from .config import NuSlerpConfig
from .method import NuSlerp


__all__ = ["NuSlerp", "NuSlerpConfig"]

register_merge_method(name="nuslerp", config_cls=NuSlerpConfig, method_cls=NuSlerp)
