"""Settings of Fisher merging."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ...settings import setting
from ..block_config import BlockMethodConfig


@dataclass
class FisherConfig(BlockMethodConfig):
    """Fisher-weighted averaging (arXiv 2111.09832): each parameter is averaged with the weight that its expert's predictions give it.

    Args:
        weights (`float`): The weight w_i of each expert.
        draws (`int`, *optional*): How many labels are drawn from an expert's prediction for each sample. When not given: the exact
            sum over all classes, or one draw where there is a prediction for every token.
        normalize (`bool`): Divide each expert's Fisher by its root mean square over the model, so that no expert outweighs another
            by the scale of its gradients.
        epsilon (`float`): Added to the Fisher.
    """

    merge_type: ClassVar[str] = "fisher"
    papers: ClassVar[tuple[str, ...]] = ("2111.09832",)

    weights: float = setting(1.0, "Weight of each expert.", scope="expert", minimum=0)
    draws: int | None = setting(
        None, "Labels drawn per sample; the exact sum over classes when not given.", type=int, minimum=1, scope="merge"
    )
    normalize: bool = setting(False, "Divide each expert's Fisher by its root mean square.", scope="merge")
    epsilon: float = setting(1e-6, "Added to the Fisher.", above=0)
