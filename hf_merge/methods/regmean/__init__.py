from ...registry import register_merge_method
from .config import RegMeanConfig, RegMeanPlusPlusConfig
from .method import RegMean, RegMeanPlusPlus


__all__ = ["RegMean", "RegMeanConfig", "RegMeanPlusPlus", "RegMeanPlusPlusConfig"]

register_merge_method(name="regmean", config_cls=RegMeanConfig, method_cls=RegMean)
register_merge_method(name="regmean_pp", config_cls=RegMeanPlusPlusConfig, method_cls=RegMeanPlusPlus)
