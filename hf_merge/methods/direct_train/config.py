"""Settings of supervised training from a merged start."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ...settings import setting
from ..model_config import ModelTrainingConfig


@dataclass
class DirectTrainConfig(ModelTrainingConfig):
    """Supervised training of the merged backbone on a few labelled samples of every task (a baseline of arXiv 2502.12706)."""

    merge_type: ClassVar[str] = "direct_train"
    papers: ClassVar[tuple[str, ...]] = ("2502.12706",)

    epochs: int = setting(20, "Passes over the samples.", minimum=1, scope="merge")
    learning_rate: float = setting(1e-4, "Adam's step on the weights.", above=0, scope="merge")
