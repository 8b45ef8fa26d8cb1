from ...registry import register_merge_method
from .config import AlignmentConfig, GitRebasinConfig, OtFusionConfig, ZipItConfig
from .method import AlignmentMethod, GitRebasin, OtFusion, ZipIt


__all__ = [
    "AlignmentConfig",
    "AlignmentMethod",
    "GitRebasin",
    "GitRebasinConfig",
    "OtFusion",
    "OtFusionConfig",
    "ZipIt",
    "ZipItConfig",
]

register_merge_method(name="git_rebasin", config_cls=GitRebasinConfig, method_cls=GitRebasin)
register_merge_method(name="zipit", config_cls=ZipItConfig, method_cls=ZipIt)
register_merge_method(name="ot_fusion", config_cls=OtFusionConfig, method_cls=OtFusion)
