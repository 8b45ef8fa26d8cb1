"""Settings of ensembles."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

from ...config import MergeConfig
from ...errors import ConfigError
from ...settings import setting


_OF_MERGED_WEIGHTS = (
    "include",
    "exclude",
    "rules",
    "then",
    "heads",
    "output",
    "adapter_rank",
    "align",
    "tokenizer",
    "tokens",
    "pad_to_multiple_of",
)


@dataclass
class EnsembleConfig(MergeConfig):
    """The mean of the experts' logits, or of their probabilities (deep ensembles, arXiv 1612.01474).

    Every expert is kept whole, and all of them run on every input: no merge, but what merges of experts for the same classes or the
    same vocabulary are compared with.

    Nothing is merged, so that of the fields which all recipes have only `dtype`, `chat_template` and the models can be set.

    Args:
        average (`str`): What is averaged: `"logits"`, or `"probabilities"` (the logits are then the logarithms of their mean).
    """

    merge_type: ClassVar[str] = "ensemble"
    papers: ClassVar[tuple[str, ...]] = ("1612.01474",)

    average: str = setting(
        "logits",
        "What is averaged: 'logits' or 'probabilities'.",
        choices=("logits", "probabilities"),
        scope="merge",
    )

    def __post_init__(self):
        super().__post_init__()
        for field in dataclasses.fields(self):
            default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
            if field.name in _OF_MERGED_WEIGHTS and getattr(self, field.name) != default:
                raise ConfigError(
                    f"EnsembleConfig.{field.name} is about weights or heads that are merged, and an ensemble keeps every expert as it "
                    "is: leave it out."
                )
