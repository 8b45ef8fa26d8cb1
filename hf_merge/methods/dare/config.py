"""Settings of DARE."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ...settings import setting
from ..sparsify import SparseMergeConfig


@dataclass
class DareConfig(SparseMergeConfig):
    """DARE: drop entries of the task vectors at random and rescale the rest (arXiv 2311.03099).

    Args:
        density (`float`): The probability with which an entry of a task vector is kept, 1 − p.
        rescale (`bool`): Divide the entries that are kept by the density, so that the expected task vector is the original.
        scaling, weights, normalize, combination, majority_sign: See [`SparseMergeConfig`].
    """

    merge_type: ClassVar[str] = "dare"

    density: float = setting(0.5, "Probability of keeping an entry.", minimum=0.0, maximum=1.0, scope="expert")
    rescale: bool = setting(True, "Divide the entries that are kept by the density.")
