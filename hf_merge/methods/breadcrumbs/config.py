"""Settings of Model Breadcrumbs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ...settings import setting
from ..sparsify import SparseMergeConfig


@dataclass
class BreadcrumbsConfig(SparseMergeConfig):
    """Model Breadcrumbs: drop the outliers and the negligible entries of the task vectors (arXiv 2312.06795).

    Args:
        density (`float`): The fraction of the entries of each task vector that are kept, the largest ones below the outliers.
        gamma (`float`): The fraction of largest entries that are dropped as outliers; fewer are where `density` + `gamma` > 1.
        rescale (`str`): `"norm"`: what is kept is scaled to the L1 norm that the whole task vector of the parameter had, which
            mergekit can do. `"none"`: it stays as it is.
        scaling, weights, normalize, combination, majority_sign: See [`SparseMergeConfig`].
    """

    merge_type: ClassVar[str] = "breadcrumbs"
    papers: ClassVar[tuple[str, ...]] = ("2312.06795",)

    density: float = setting(
        0.9, "Fraction of each task vector that is kept.", minimum=0.0, maximum=1.0, scope="expert"
    )
    gamma: float = setting(
        0.01, "Fraction of largest entries that are dropped.", minimum=0.0, maximum=1.0, scope="expert"
    )
    rescale: str = setting(
        "none", "Scale what is kept to the L1 'norm' of the whole, or 'none'.", choices=("none", "norm")
    )
