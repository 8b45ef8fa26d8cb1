"""Settings of Reinforced Agent Merging."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ...config import MergeConfig
from ...settings import setting


@dataclass
class RamConfig(MergeConfig):
    """Reinforced Agent Merging: average what several experts changed, keep what one changed (arXiv 2601.13572).

    Args:
        epsilon (`float`): An entry counts as changed when it moved by more than this.
        rescale (`str`): RAM+, which amplifies the entries that only one expert changed: `"none"`, by a factor for each parameter
            (`"tensor"`) or for the whole model, as in the paper (`"model"`; reads the weights twice).
        r (`float`): With `rescale`: how much the overlap of an expert with the others amplifies.
        alpha (`float`): With `rescale`: the largest overlap that counts.
    """

    merge_type: ClassVar[str] = "ram"
    papers: ClassVar[tuple[str, ...]] = ("2601.13572",)

    epsilon: float = setting(1e-5, "Smallest change that counts.", minimum=0.0)
    rescale: str = setting(
        "none", "RAM+ for each 'tensor' or the 'model'.", choices=("none", "tensor", "model"), scope="merge"
    )
    r: float = setting(0.1, "How much overlap amplifies (RAM+).", minimum=0.0)
    alpha: float = setting(0.2, "Largest overlap that counts (RAM+).", minimum=0.0)
