from ...registry import register_merge_method
from .config import PassthroughConfig
from .method import Passthrough


__all__ = ["Passthrough", "PassthroughConfig"]

register_merge_method(name="passthrough", config_cls=PassthroughConfig, method_cls=Passthrough)
