"""What the recipes of all block-wise methods have in common."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from ..config import MergeConfig
from ..errors import ConfigError
from ..registry import get_merge_method
from ..settings import setting
from .block_base import BlockMethod


@dataclass
class BlockMethodConfig(MergeConfig):
    """Base class of the configs of methods that merge one block after another.

    Args:
        init (`str` or `dict`): The method or recipe that merges everything that this method does not, and that gives the
            values it starts from: `"linear"`, `"wudi"`, `{"merge_type": "ties", "density": 0.3}`.
        batch_size (`int`): Calibration samples that run together.
        fit_poolers (`bool`): As a last step but one, fit a pooler, such as BERT's, to what the experts' give on their own inputs.
        fit_heads (`bool`): As a last step, fit the head of each task to the merged model's features: its first linear layer then
            gives what it gives in the expert. Only for heads that are kept per task.
        head_prior (`float`): How many samples of each task a head or pooler as it is weighs as much as, when it is fitted.
    """

    accepts_block_methods: ClassVar[bool] = False
    """Whether `init` may name a method that merges blocks from data, which then gives each block its start."""

    init: Any = field(
        default="linear", metadata={"help": "Method or recipe for the start and for what is outside of blocks."}
    )
    batch_size: int = setting(32, "Calibration samples that run together.", minimum=1, scope="merge")
    fit_poolers: bool = setting(False, "Fit poolers to the experts'.", scope="merge")
    fit_heads: bool = setting(False, "Fit the heads to the merged model's features.", scope="merge")
    head_prior: float = setting(16.0, "How many samples a head as it is weighs as much as.", minimum=0, scope="merge")

    def __post_init__(self):
        super().__post_init__()
        self.initial_config()

    def start_config(self) -> MergeConfig:
        """The recipe of `init`, with this recipe's choice of parameters, heads and seed."""
        if not isinstance(self.init, (str, Mapping)):
            raise ConfigError(
                f"{type(self).__name__}.init must be the name of a method or a recipe (a dictionary), got {self.init!r}."
            )
        recipe = {"merge_type": self.init} if isinstance(self.init, str) else dict(self.init)
        common = {key: getattr(self, key) for key in ("include", "exclude", "heads", "seed", "dtype")}
        origin = f"{type(self).__name__}.init"
        return MergeConfig.from_dict(common | self.start_settings(recipe) | recipe, origin=origin)

    def initial_config(self) -> MergeConfig:
        """The recipe without data at the bottom of `init`: for everything that is outside of blocks."""
        start = self.start_config()
        method = get_merge_method(start.merge_type).method_cls
        if not method.requires_data:
            return start
        if self.accepts_block_methods and issubclass(method, BlockMethod):
            return start.initial_config()
        raise ConfigError(
            f"{type(self).__name__}.init names '{start.merge_type}', which needs data itself: use a method without data"
            f"{', or one that merges block by block' if self.accepts_block_methods else ''}."
        )

    def start_settings(self, recipe: Mapping[str, Any]) -> dict[str, Any]:
        """Settings of the method of `init` that follow from this recipe."""
        return {}
