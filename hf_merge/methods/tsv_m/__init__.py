from ...registry import register_merge_method
from .config import TsvMConfig
from .method import TsvM


__all__ = ["TsvM", "TsvMConfig"]

register_merge_method(name="tsv_m", config_cls=TsvMConfig, method_cls=TsvM)
