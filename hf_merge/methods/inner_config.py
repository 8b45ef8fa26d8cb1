"""What the recipes have in common whose methods carry out another recipe and add to its result."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from ..config import MergeConfig
from ..errors import ConfigError
from ..registry import get_merge_method
from .base import TensorMethod
from .block_base import BlockMethod
from .model_base import ModelMethod


_OF_INNER = ("include", "exclude", "heads", "seed", "dtype", "tokenizer", "tokens", "pad_to_multiple_of")


@dataclass
class InnerRecipeConfig(MergeConfig):
    """Base class of the configs of methods that carry out another recipe and add to its result.

    The recipe is the value of the field that `inner_field` names: a method's name or a dictionary. Rules and further steps belong to
    it; the choice of parameters, heads, tokens, dtype and seed is this recipe's where it says nothing of its own.
    """

    inner_field: ClassVar[str] = "init"

    def __post_init__(self):
        super().__post_init__()
        name = type(self).__name__
        for key in ("rules", "then"):
            if getattr(self, key):
                raise ConfigError(f"{name}.{key} belongs into the recipe of '{self.inner_field}'.")
        if self.output != "model":
            raise ConfigError(
                f"{name}.output cannot be 'adapter': the result is more than a change of the base model."
            )
        config = self.inner_config()
        if config.output != "model":
            raise ConfigError(
                f"{name}.{self.inner_field}: the result of an inner recipe is a model, leave 'output' out."
            )
        reason = self.refuse_inner(config)
        if reason is not None:
            raise ConfigError(f"{name}.{self.inner_field} names '{config.merge_type}', {reason}.")

    def inner_recipe(self) -> str | Mapping[str, Any]:
        """The inner recipe as it was given."""
        return getattr(self, self.inner_field)

    def inner_settings(self, merge_type: str | None) -> dict[str, Any]:
        """Settings of the inner method that follow from this recipe."""
        return {}

    def refuse_inner(self, config: MergeConfig) -> str | None:
        """Why a method cannot be the inner one, as the end of a sentence; `None` when it can."""
        return None

    def inner_config(self) -> MergeConfig:
        """The inner recipe, with this recipe's choice of parameters, heads, tokens, dtype and seed."""
        recipe, origin = self.inner_recipe(), f"{type(self).__name__}.{self.inner_field}"
        if not isinstance(recipe, (str, Mapping)):
            raise ConfigError(f"{origin} must be the name of a method or a recipe (a dictionary), got {recipe!r}.")
        recipe = {"merge_type": recipe} if isinstance(recipe, str) else dict(recipe)
        common = {key: getattr(self, key) for key in _OF_INNER}
        return MergeConfig.from_dict(common | self.inner_settings(recipe.get("merge_type")) | recipe, origin=origin)

    def inner_recipes(self) -> list[MergeConfig]:
        return [self.inner_config()]


def merges_by(config: MergeConfig, contract: type) -> bool:
    """Whether the method of a recipe follows a contract."""
    return issubclass(get_merge_method(config.merge_type).method_cls, contract)


def refuse_changed_heads(config: MergeConfig) -> str | None:
    """Why the result of a recipe does not serve the experts' own heads, as the end of a sentence; `None` when it does."""
    if getattr(config, "fit_heads", False):
        return "with fit_heads=True: heads would be fitted to features that change afterwards, leave it out"
    if not any(merges_by(config, contract) for contract in (TensorMethod, BlockMethod, ModelMethod)):
        return "whose result has no backbone that serves every expert's own head"
    return None
