"""What a model's config and class say, as plain data: all that planning a merge asks of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


@dataclass
class Description:
    """A config and a class in words and numbers.

    Args:
        class_path (`str`): The class with its module.
        model_type (`str`): The architecture.
        values (`dict`): What the config says, as JSON has it.
        text (`str`): The config as transformers writes it, for telling it from others.
        labels (`dict[int, str]`): The names of a classifier's labels.
        vocabulary_size (`int`, *optional*): The number of rows of the embeddings; `None` for a model without one vocabulary.
        quantization (`str`, *optional*): How the weights are quantised.
        has_code (`bool`): Whether the class is defined by code beside the weights.
    """

    class_path: str
    model_type: str
    values: dict[str, Any]
    text: str
    labels: dict[int, str]
    vocabulary_size: int | None
    quantization: str | None
    has_code: bool

    @property
    def class_name(self) -> str:
        """The class without its module."""
        return self.class_path.rpartition(".")[2]

    @classmethod
    def of(cls, config: PretrainedConfig, model_class: type[PreTrainedModel]) -> Description:
        """Args:
        config ([`~transformers.PretrainedConfig`]): The config.
        model_class (`type`): The class.
        """
        from ..modeling.vocabulary import vocabulary_size

        return cls(
            class_path=f"{model_class.__module__}.{model_class.__qualname__}",
            model_type=config.model_type,
            values=json.loads(json.dumps(config.to_dict(), default=str)),
            text=config.to_json_string(),
            labels=dict(getattr(config, "id2label", None) or {}),
            vocabulary_size=vocabulary_size(config),
            quantization=_quantization_of(config),
            has_code=bool(getattr(model_class, "_auto_class", None) or getattr(config, "auto_map", None)),
        )


def _quantization_of(config: PretrainedConfig) -> str | None:
    """The name of the quantisation that a config says its weights have."""
    quantization = getattr(config, "quantization_config", None)
    if quantization is None:
        return None
    if isinstance(quantization, Mapping):
        return str(quantization.get("quant_method", "unknown method"))
    return str(getattr(quantization, "quant_method", "unknown method"))
