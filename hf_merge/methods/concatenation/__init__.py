from ...registry import register_merge_method
from .config import CatConfig, SvdConfig
from .method import Cat, Svd


__all__ = ["Cat", "CatConfig", "Svd", "SvdConfig"]

register_merge_method(name="cat", config_cls=CatConfig, method_cls=Cat)
register_merge_method(name="svd", config_cls=SvdConfig, method_cls=Svd)
