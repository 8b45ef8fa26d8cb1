from ...registry import register_merge_method
from .config import RamConfig
from .method import Ram


__all__ = ["Ram", "RamConfig"]

register_merge_method(name="ram", config_cls=RamConfig, method_cls=Ram)
