"""Settings of isotropic merging."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ...config import LinearLayersConfig
from ...settings import setting
from ..tsv_m.config import TruncatedSvdConfig


@dataclass
class IsoCConfig(LinearLayersConfig):
    """Isotropic merging in the common subspace, Iso-C (arXiv 2502.04959).

    Args:
        scaling (`float`): The coefficient λ of the merged task vector.
    """

    merge_type: ClassVar[str] = "iso_c"
    papers: ClassVar[tuple[str, ...]] = ("2502.04959",)

    scaling: float = setting(1.0, "Scaling coefficient of the merged task vector.")


@dataclass
class IsoCtsConfig(TruncatedSvdConfig):
    """Isotropic merging in common and task-specific subspaces, Iso-CTS (arXiv 2502.04959).

    Args:
        scaling (`float`): The coefficient λ of the merged task vector.
        common_space_fraction (`float`): The part of the directions that is taken from the sum of the task vectors; the rest is
            shared among the tasks' own directions.
    """

    merge_type: ClassVar[str] = "iso_cts"
    papers: ClassVar[tuple[str, ...]] = ("2502.04959",)

    scaling: float = setting(1.0, "Scaling coefficient of the merged task vector.")
    common_space_fraction: float = setting(0.8, "Part of the directions taken from the sum.", minimum=0, maximum=1)
