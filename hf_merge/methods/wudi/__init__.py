from ...registry import register_merge_method
from .config import WudiConfig
from .low_rank import merge_low_rank
from .method import Wudi


__all__ = ["Wudi", "WudiConfig", "merge_low_rank"]

register_merge_method(name="wudi", config_cls=WudiConfig, method_cls=Wudi)
