from ...registry import register_merge_method
from .config import ConsensusTaConfig
from .method import ConsensusTa


__all__ = ["ConsensusTa", "ConsensusTaConfig"]

register_merge_method(name="consensus_ta", config_cls=ConsensusTaConfig, method_cls=ConsensusTa)
