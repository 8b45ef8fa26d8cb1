from ...registry import register_merge_method
from .config import IsoCConfig, IsoCtsConfig
from .method import IsoC, IsoCts


__all__ = ["IsoC", "IsoCConfig", "IsoCts", "IsoCtsConfig"]

register_merge_method(name="iso_c", config_cls=IsoCConfig, method_cls=IsoC)
register_merge_method(name="iso_cts", config_cls=IsoCtsConfig, method_cls=IsoCts)
