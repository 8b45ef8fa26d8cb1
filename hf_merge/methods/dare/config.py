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
        rescale (`str`): `"probability"`: the entries that are kept are divided by the density, so that the expected task vector is
            the original, as in the paper. `"norm"`: they are scaled to the L1 norm that the whole task vector of the parameter
            had, as in mergekit. `"none"`: they stay as they are.
        scaling, weights, normalize, combination, majority_sign: See [`SparseMergeConfig`].
    """

    merge_type: ClassVar[str] = "dare"
    papers: ClassVar[tuple[str, ...]] = ("2311.03099",)

    density: float = setting(0.5, "Probability of keeping an entry.", minimum=0.0, maximum=1.0, scope="expert")
    rescale: str = setting(
        "probability",
        "Divide what is kept by its 'probability', scale it to the L1 'norm' of the whole, or 'none'.",
        choices=("probability", "norm", "none"),
    )
