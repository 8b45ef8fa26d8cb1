from ...registry import register_merge_method
from .config import SurgeryConfig
from .method import Surgery


__all__ = ["Surgery", "SurgeryConfig"]

register_merge_method(name="surgery", config_cls=SurgeryConfig, method_cls=Surgery)
