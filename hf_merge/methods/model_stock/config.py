"""Settings of Model Stock."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ...config import MergeConfig
from ...settings import setting


@dataclass
class ModelStockConfig(MergeConfig):
    """Model Stock: between the base model and the mean of the experts, as far as the experts agree (arXiv 2403.19522).

    Args:
        filter_wise (`bool`): One interpolation ratio for each output unit (row or filter) instead of one for each parameter.
    """

    merge_type: ClassVar[str] = "model_stock"
    papers: ClassVar[tuple[str, ...]] = ("2403.19522",)

    filter_wise: bool = setting(False, "One ratio for each output unit instead of one for each parameter.")
