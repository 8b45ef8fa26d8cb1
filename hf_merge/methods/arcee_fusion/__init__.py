from ...registry import register_merge_method
from .config import ArceeFusionConfig
from .method import ArceeFusion


__all__ = ["ArceeFusion", "ArceeFusionConfig"]

register_merge_method(name="arcee_fusion", config_cls=ArceeFusionConfig, method_cls=ArceeFusion)
