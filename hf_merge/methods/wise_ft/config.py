"""Settings of WiSE-FT."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ...config import MergeConfig
from ...settings import setting


@dataclass
class WiseFtConfig(MergeConfig):
    """WiSE-FT: between the base model and one fine-tuned model (arXiv 2109.01903).

    Args:
        alpha (`float`): The mixing coefficient α: 0 is the base model, 1 the expert.
    """

    merge_type: ClassVar[str] = "wise_ft"
    papers: ClassVar[tuple[str, ...]] = ("2109.01903",)

    alpha: float = setting(0.5, "0 is the base model, 1 the expert.", minimum=0.0, maximum=1.0)
