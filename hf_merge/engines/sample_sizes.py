"""How large calibration samples are, for estimates that are made before there are any."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..data.batching import Sample
from ..data.calibration import TaskSamples


if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(frozen=True)
class Samples:
    """The size of the calibration samples.

    Args:
        count (`int`): Samples of each task.
        tokens (`int`): Tokens, or patches, of a sample.
    """

    count: int
    tokens: int

    @classmethod
    def of(cls, samples: TaskSamples, config: PretrainedConfig) -> Samples:
        """The mean size of samples: tokens of texts, patches of images; 0 tokens where it is neither.

        Args:
            samples ([`TaskSamples`]): Of every expert.
            config ([`~transformers.PretrainedConfig`]): Of the merged model; it has the size of patches.
        """
        sizes = [_tokens(sample, config) for one in samples.samples for sample in one]
        return cls(math.ceil(len(sizes) / len(samples.samples)), math.ceil(sum(sizes) / len(sizes)))

    def __bool__(self) -> bool:
        return self.count > 0


def _tokens(sample: Sample, config: PretrainedConfig) -> int:
    tokens = 0
    for name, value in sample.items():
        if name in ("input_ids", "inputs_embeds", "decoder_input_ids"):
            tokens += len(value)
        elif name == "pixel_values" and isinstance(side := getattr(config, "patch_size", None), int):
            tokens += math.prod(length // side for length in value.shape[-2:]) + 1
    return tokens
