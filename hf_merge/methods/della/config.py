"""Settings of DELLA-Merging."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ...settings import setting
from ..sparsify import SparseMergeConfig


@dataclass
class DellaConfig(SparseMergeConfig):
    """DELLA-Merging: DARE with drop probabilities that fall with the magnitude (MAGPRUNE, arXiv 2406.11617).

    Args:
        density (`float`): The mean probability with which an entry of a task vector is kept, 1 − p.
        epsilon (`float`): The width of the range of the probabilities: from p − ε/2 for the largest entry of a row to p + ε/2
            for the smallest. It narrows where it would leave [0, 1], so that the mean stays p.
        rescale (`str`): `"probability"`: each entry that is kept is divided by its own probability of being kept, as in the paper.
            `"norm"`: they are scaled to the L1 norm that the whole task vector of the parameter had, as in mergekit. `"none"`: they
            stay as they are.
        combination (`str`): `"ties"`, as in the paper, or `"linear"`.
        scaling, weights, normalize, majority_sign: See [`SparseMergeConfig`].
    """

    merge_type: ClassVar[str] = "della"
    papers: ClassVar[tuple[str, ...]] = ("2406.11617",)

    combination: str = setting("ties", "How sparse task vectors combine.", choices=("linear", "ties"))
    density: float = setting(0.5, "Mean probability of keeping an entry.", minimum=0.0, maximum=1.0, scope="expert")
    epsilon: float = setting(0.1, "Width of the range of probabilities.", minimum=0.0, maximum=1.0, scope="expert")
    rescale: str = setting(
        "probability",
        "Divide what is kept by its 'probability', scale it to the L1 'norm' of the whole, or 'none'.",
        choices=("probability", "norm", "none"),
    )
