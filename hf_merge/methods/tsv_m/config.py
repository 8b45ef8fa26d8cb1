"""Settings of TSV-Merge, and of the decomposition that it shares with other spectral methods."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ...config import LinearLayersConfig
from ...settings import setting


@dataclass
class TruncatedSvdConfig(LinearLayersConfig):
    """Base class of the configs of methods that need only the leading singular triplets of a task vector.

    Args:
        svd (`str`): `"exact"`, or `"randomized"`: only the leading triplets, from a random range finder. The report gives the
            residual of its triplets.
        oversampling (`int`): Extra columns of the random range finder.
        power_iterations (`int`): Its power iterations; task vectors have slowly decaying spectra and need some.
    """

    svd: str = setting("exact", "Decomposition: 'exact' or 'randomized'.", choices=("exact", "randomized"))
    oversampling: int = setting(10, "Extra columns of the random range finder.", minimum=0)
    power_iterations: int = setting(4, "Power iterations of the random range finder.", minimum=0)


@dataclass
class TsvMConfig(TruncatedSvdConfig):
    """TSV-Merge (arXiv 2412.00081).

    Args:
        scaling (`float`): The coefficient λ of the merged task vector.
    """

    merge_type: ClassVar[str] = "tsv_m"
    papers: ClassVar[tuple[str, ...]] = ("2412.00081",)

    scaling: float = setting(1.0, "Scaling coefficient of the merged task vector.")
