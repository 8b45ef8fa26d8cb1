"""Settings of mixtures of experts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from ...config import MergeConfig
from ...errors import ConfigError
from ...settings import setting
from ..base import TensorMethod
from ..inner_config import InnerRecipeConfig, merges_by


BASE = "base"
OTHERS = "others"


@dataclass
class MoeConfig(InnerRecipeConfig):
    """A mixture of experts: each expert's MLPs become one expert of every layer, everything else is merged, and a router chooses the
    experts of each token (Branch-Train-MiX, arXiv 2403.07816).

    `include` and `exclude` concern the parameters that are merged; rules belong to the recipe of `shared`.

    Args:
        shared (`str` or `dict`): How attention, embeddings and norms are merged: a method or recipe without data (`"linear"`: the
            mean of the experts), or `"base"`: they are the base model's.
        experts_per_token (`int`): How many experts a token is sent to.
        gate_mode (`str`): What the routers are. `"random"`: Gaussian noise, to be trained. `"hidden"`: for every expert the direction
            of the mean hidden state of its calibration samples, normalised.
        router_init_std (`float`): The standard deviation of `gate_mode="random"`.
        negative_prompts (`str` or `dict`, *optional*): With `gate_mode="hidden"`, texts whose mean hidden state is subtracted:
            `{expert: [text, ...]}`, or `"others"`: the samples of all other experts.
        batch_size (`int`): Calibration samples that run together.
    """

    merge_type: ClassVar[str] = "moe"
    inner_field: ClassVar[str] = "shared"
    papers: ClassVar[tuple[str, ...]] = ("2403.07816",)

    shared: Any = field(
        default="linear",
        metadata={"help": "Method or recipe for everything but the MLPs, or 'base': the base model's."},
    )
    experts_per_token: int = setting(2, "Experts that a token is sent to.", minimum=1, scope="merge")
    gate_mode: str = setting(
        "random", "The routers: 'random' or 'hidden' (from samples).", choices=("random", "hidden"), scope="merge"
    )
    router_init_std: float = setting(0.02, "Standard deviation of random routers.", minimum=0, scope="merge")
    negative_prompts: Any = field(
        default=None, metadata={"help": "Texts by expert that its router turns away from, or 'others'."}
    )
    batch_size: int = setting(32, "Calibration samples that run together.", minimum=1, scope="merge")

    def __post_init__(self):
        super().__post_init__()
        self._check_negatives()

    def _check_negatives(self) -> None:
        value = self.negative_prompts
        if value is None or value == OTHERS:
            pass
        elif not isinstance(value, Mapping) or not all(_is_texts(texts) for texts in value.values()):
            raise ConfigError(
                f"MoeConfig.negative_prompts must be 'others' or a dictionary {{expert: [text, ...]}}, got {value!r}."
            )
        if value is not None and self.gate_mode != "hidden":
            raise ConfigError(
                "MoeConfig.negative_prompts is for gate_mode='hidden': set it, or leave the prompts out."
            )

    def inner_recipe(self) -> str | Mapping[str, Any]:
        # "base" is planned as a plain mean whose values are then replaced.
        return "linear" if self.shared == BASE else self.shared

    def refuse_inner(self, config: MergeConfig) -> str | None:
        return None if merges_by(config, TensorMethod) else "which does not merge parameter by parameter, without data"

    def inner_recipes(self) -> list[MergeConfig]:
        return [] if self.shared == BASE else super().inner_recipes()


def _is_texts(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and bool(value) and all(isinstance(text, str) for text in value)
