from ...registry import register_merge_method
from .config import DirectDistillConfig, DistillMergeConfig
from .method import DirectDistill, DistillMerge


__all__ = ["DirectDistill", "DirectDistillConfig", "DistillMerge", "DistillMergeConfig"]

register_merge_method(name="distill_merge", config_cls=DistillMergeConfig, method_cls=DistillMerge)
register_merge_method(name="direct_distill", config_cls=DirectDistillConfig, method_cls=DirectDistill)
