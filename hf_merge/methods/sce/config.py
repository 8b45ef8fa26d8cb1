"""Settings of SCE."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ...config import MergeConfig
from ...settings import setting


@dataclass
class SceConfig(MergeConfig):
    """SCE: select, calculate, erase (FuseChat, arXiv 2408.07990).

    Args:
        density (`float`): The fraction of the entries that are kept, those that differ most between the experts. It counts among
            the entries that differ at all.
    """

    merge_type: ClassVar[str] = "sce"
    papers: ClassVar[tuple[str, ...]] = ("2408.07990",)

    density: float = setting(1.0, "Fraction of the entries that are kept.", minimum=0.0, maximum=1.0)
