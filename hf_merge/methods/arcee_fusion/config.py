"""Settings of Arcee Fusion."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ...config import MergeConfig


@dataclass
class ArceeFusionConfig(MergeConfig):
    """Arcee Fusion: take from an expert only the changes that stand out."""

    merge_type: ClassVar[str] = "arcee_fusion"
