"""Settings of RegMean and RegMean++."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ...settings import setting
from ..block_config import BlockMethodConfig


@dataclass
class RegMeanConfig(BlockMethodConfig):
    """RegMean (arXiv 2212.09849): each linear layer is the least-squares fit to the outputs of all experts.

    Args:
        alpha (`float`): The factor on the off-diagonal entries of the Gram matrices: 1 is least squares as it is, smaller values
            pull towards a mean that is weighted by feature. One value, or a gradient over depth.
        ridge (`float`): Added to the diagonal of the summed Gram matrices, relative to its mean. It pulls towards the value that
            `init` gives, which decides where few tokens say little: a good start deserves a larger one.
        normalize (`bool`): Divide each task's Gram matrix by its number of tokens, so that tasks with longer samples do not weigh
            more.
    """

    merge_type: ClassVar[str] = "regmean"
    papers: ClassVar[tuple[str, ...]] = ("2212.09849",)

    alpha: float = setting(1.0, "Factor on the off-diagonal entries of the Gram matrices.", minimum=0, maximum=1)
    ridge: float = setting(1e-2, "Ridge, relative to the mean of the diagonal.", minimum=0)
    normalize: bool = setting(True, "Divide each task's Gram matrix by its number of tokens.")
    fit_poolers: bool = setting(True, "Fit poolers to the experts'.", scope="merge")


@dataclass
class RegMeanPlusPlusConfig(RegMeanConfig):
    """RegMean++ (arXiv 2508.03121): RegMean on the inputs that the already merged blocks produce.

    Args:
        targets (`str`): What a merged layer is fitted to. `"own"`: what each expert's layer gives on the expert's own inputs, layer
            after layer; this corrects the errors of the layers before. `"merged"`: what each expert's layer gives on the merged
            model's inputs (the paper).
    """

    merge_type: ClassVar[str] = "regmean_pp"
    papers: ClassVar[tuple[str, ...]] = ("2508.03121",)

    targets: str = setting(
        "own",
        "Fit to the experts' outputs on their 'own' inputs, or on the 'merged' ones.",
        choices=("own", "merged"),
        scope="merge",
    )
