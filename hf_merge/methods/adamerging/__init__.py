from ...registry import register_merge_method
from .config import AdaMergingConfig, AdaMergingPlusPlusConfig
from .method import AdaMerging, AdaMergingPlusPlus


__all__ = ["AdaMerging", "AdaMergingConfig", "AdaMergingPlusPlus", "AdaMergingPlusPlusConfig"]

register_merge_method(name="adamerging", config_cls=AdaMergingConfig, method_cls=AdaMerging)
register_merge_method(name="adamerging_pp", config_cls=AdaMergingPlusPlusConfig, method_cls=AdaMergingPlusPlus)
