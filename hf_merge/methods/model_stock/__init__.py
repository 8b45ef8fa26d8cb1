from ...registry import register_merge_method
from .config import ModelStockConfig
from .method import ModelStock


__all__ = ["ModelStock", "ModelStockConfig"]

register_merge_method(name="model_stock", config_cls=ModelStockConfig, method_cls=ModelStock)
