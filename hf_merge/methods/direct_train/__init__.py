from ...registry import register_merge_method
from .config import DirectTrainConfig
from .method import DirectTrain


__all__ = ["DirectTrain", "DirectTrainConfig"]

register_merge_method(name="direct_train", config_cls=DirectTrainConfig, method_cls=DirectTrain)
