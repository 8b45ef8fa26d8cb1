from ...registry import register_merge_method
from .config import FeatureTrainingConfig, FsMergeConfig, KdConfig
from .method import FsMerge, Kd


__all__ = ["FeatureTrainingConfig", "FsMerge", "FsMergeConfig", "Kd", "KdConfig"]

register_merge_method(name="fs_merge", config_cls=FsMergeConfig, method_cls=FsMerge)
register_merge_method(name="kd", config_cls=KdConfig, method_cls=Kd)
