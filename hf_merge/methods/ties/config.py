"""Settings of TIES-Merging."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ...config import MergeConfig
from ...settings import setting


@dataclass
class TiesConfig(MergeConfig):
    """TIES-Merging: trim, elect sign, merge (arXiv 2306.01708).

    Args:
        density (`float`): The fraction of the entries of each task vector that are kept, those of largest magnitude.
        scaling (`float`): The scaling coefficient λ of the merged task vector.
        weights (`float`): The weight w_i of each expert, in the election and in the mean.
        merge (`str`): How the experts that agree with the elected sign are merged: `"mean"` (weighted by |w_i|) or `"sum"`.
        rescale (`str`): `"norm"`: each trimmed task vector is scaled to the L1 norm that it had in the parameter before, which
            mergekit can do. `"none"`: it stays as it is, as in the paper.
        scope (`str`): Where the density applies: to each parameter (`"tensor"`), or to all merged parameters of the model
            together, as in the paper (`"model"`; reads the weights three times).
        majority_sign (`str`): Elect by the sum of the values (`"total"`) or of the signs (`"frequency"`).
    """

    merge_type: ClassVar[str] = "ties"
    papers: ClassVar[tuple[str, ...]] = ("2306.01708",)

    density: float = setting(
        0.2, "Fraction of each task vector that is kept.", minimum=0.0, maximum=1.0, scope="expert"
    )
    scaling: float = setting(1.0, "Scaling coefficient of the merged task vector.")
    weights: float = setting(1.0, "Weight of each expert.", scope="expert")
    merge: str = setting("mean", "How experts that agree are merged: 'mean' or 'sum'.", choices=("mean", "sum"))
    rescale: str = setting(
        "none", "Scale what is kept to the L1 'norm' of the whole, or 'none'.", choices=("none", "norm")
    )
    scope: str = setting(
        "tensor",
        "The density applies to each parameter ('tensor') or to all together ('model').",
        choices=("tensor", "model"),
        scope="merge",
    )
    majority_sign: str = setting("total", "Elect signs by 'total' or 'frequency'.", choices=("total", "frequency"))
