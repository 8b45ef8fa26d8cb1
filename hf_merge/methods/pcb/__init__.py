from ...registry import register_merge_method
from .config import PcbConfig
from .method import Pcb


__all__ = ["Pcb", "PcbConfig"]

register_merge_method(name="pcb", config_cls=PcbConfig, method_cls=Pcb)
