from ...registry import register_merge_method
from .config import LocalizeAndStitchConfig
from .method import LocalizeAndStitch


__all__ = ["LocalizeAndStitch", "LocalizeAndStitchConfig"]

register_merge_method(name="localize_and_stitch", config_cls=LocalizeAndStitchConfig, method_cls=LocalizeAndStitch)
