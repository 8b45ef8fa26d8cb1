"""Settings of Localize-and-Stitch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ...config import MergeConfig
from ...settings import setting


@dataclass
class LocalizeAndStitchConfig(MergeConfig):
    """Localize-and-Stitch without data: stitch the few largest changes of each expert into the base model (arXiv 2408.13656).

    Args:
        density (`float`): The fraction of the entries of each task vector that are kept, those of largest magnitude.
        scope (`str`): Where the density applies: to all merged parameters of the model together, as in the paper (`"model"`;
            reads the weights three times), or to each parameter (`"tensor"`).
        scaling (`float`): The scaling coefficient λ of the merged task vector.
    """

    merge_type: ClassVar[str] = "localize_and_stitch"
    papers: ClassVar[tuple[str, ...]] = ("2408.13656",)

    density: float = setting(
        0.05, "Fraction of each task vector that is kept.", minimum=0.0, maximum=1.0, scope="expert"
    )
    scope: str = setting(
        "model",
        "The density applies to all parameters together ('model') or to each ('tensor').",
        choices=("model", "tensor"),
        scope="merge",
    )
    scaling: float = setting(1.0, "Scaling coefficient of the merged task vector.")
