"""Settings of AdaMerging and AdaMerging++."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from ...errors import ConfigError
from ...settings import setting
from ..model_config import ModelTrainingConfig


@dataclass
class AdaMergingConfig(ModelTrainingConfig):
    """AdaMerging (arXiv 2310.02575): the coefficients of the task vectors that make the merged model's predictions most certain.

    Args:
        granularity (`str`): One coefficient for every `"tensor"` and task (the paper's layer-wise), or for every `"task"`.
        clamp (`bool`): Keep the coefficients between 0 and 1, as the authors' code does.
    """

    merge_type: ClassVar[str] = "adamerging"
    papers: ClassVar[tuple[str, ...]] = ("2310.02575",)

    granularity: str = setting(
        "tensor", "One coefficient per 'tensor' or per 'task'.", choices=("tensor", "task"), scope="merge"
    )
    clamp: bool = setting(True, "Keep the coefficients between 0 and 1.", scope="merge")


@dataclass
class AdaMergingPlusPlusConfig(AdaMergingConfig):
    """AdaMerging++ (arXiv 2310.02575): AdaMerging on task vectors that are trimmed and freed from sign conflicts as in TIES.

    Args:
        init (`str` or `dict`): `"ties"`, or a recipe of it that says how task vectors are trimmed and signs elected. Training starts
            from θ_0 + `init_scale` Σ τ̂_i.
        density (`float`): The fraction of each task vector that is kept.
    """

    merge_type: ClassVar[str] = "adamerging_pp"
    papers: ClassVar[tuple[str, ...]] = ("2310.02575",)

    init: Any = field(default="ties", metadata={"help": "'ties', or a recipe of TIES."})
    density: float = setting(0.2, "Fraction of each task vector that is kept.", minimum=0, maximum=1, scope="merge")

    def start_settings(self, recipe: Mapping[str, Any]) -> dict[str, Any]:
        given = sorted({"scaling", "merge", "density"}.intersection(recipe))
        if recipe.get("merge_type") != "ties" or given:
            raise ConfigError(
                f"AdaMergingPlusPlusConfig.init must be 'ties' or a recipe of it without {', '.join(given) or 'other methods'} "
                f"(init_scale and density are settings of their own), got {dict(recipe)!r}."
            )
        return {"scaling": self.init_scale, "merge": "sum", "scope": "model", "density": self.density}
