from ...registry import register_merge_method
from .config import CoreSpaceConfig, KnotsConfig
from .method import CoreSpace, Knots


__all__ = ["CoreSpace", "CoreSpaceConfig", "Knots", "KnotsConfig"]

register_merge_method(name="knots", config_cls=KnotsConfig, method_cls=Knots)
register_merge_method(name="core_space", config_cls=CoreSpaceConfig, method_cls=CoreSpace)
