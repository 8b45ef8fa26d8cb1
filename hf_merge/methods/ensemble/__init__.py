from ...registry import register_merge_method
from .config import EnsembleConfig
from .method import Ensemble


__all__ = ["Ensemble", "EnsembleConfig"]

register_merge_method(name="ensemble", config_cls=EnsembleConfig, method_cls=Ensemble)
