from ...registry import register_merge_method
from .config import MultiSlerpConfig
from .method import MultiSlerp


__all__ = ["MultiSlerp", "MultiSlerpConfig"]

register_merge_method(name="multislerp", config_cls=MultiSlerpConfig, method_cls=MultiSlerp)
