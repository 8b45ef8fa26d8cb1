from ...registry import register_merge_method
from .config import WiseFtConfig
from .method import WiseFt


__all__ = ["WiseFt", "WiseFtConfig"]

register_merge_method(name="wise_ft", config_cls=WiseFtConfig, method_cls=WiseFt)
