"""Opening the models of a merge: naming experts, finding the base, and models that are themselves the result of a recipe."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..checkpoints.source import ModelSource, open_source
from ..config import MergeConfig
from ..errors import ConfigError, MergeError, PlanError
from .nested import MergedSource
from .plan import build_plan
from .slices import LayerSlice, SlicedSource


logger = logging.getLogger(__name__)

BASE_NAME = "base"
RECIPE_KEY = "merge"
SLICES_KEY = "slices"


@dataclass
class Opening:
    """How models are opened.

    Args:
        trust_remote_code (`bool`): Whether code from their repositories may run.
        hub_kwargs (`dict`): The Hub's arguments, for all models.
    """

    trust_remote_code: bool = False
    hub_kwargs: dict[str, Any] = field(default_factory=dict)

    def model(self, name: str, model: Any, template: ModelSource | None = None) -> ModelSource:
        """Opens one model: everything that [`open_source`] takes; `{"merge": recipe}`, a merge that is carried out parameter by
        parameter when the outer merge asks for it; or `{"slices": [{"model": model, "layers": [start, end]}, ...]}`."""
        if isinstance(model, Mapping) and set(model) == {RECIPE_KEY}:
            return self._nested(name, model)
        if isinstance(model, Mapping) and set(model) == {SLICES_KEY}:
            return self._sliced(name, model[SLICES_KEY])
        return open_source(name, model, template=template, trust_remote_code=self.trust_remote_code, **self.hub_kwargs)

    def _nested(self, name: str, model: Mapping[str, Any]) -> ModelSource:
        recipe = model[RECIPE_KEY]
        if not isinstance(recipe, (MergeConfig, Mapping)):
            raise ConfigError(
                f"'{name}': '{RECIPE_KEY}' must be a recipe (a dictionary or a MergeConfig), got {recipe!r}."
            )
        if not isinstance(recipe, MergeConfig):
            recipe = MergeConfig.from_dict(recipe, origin=f"The recipe of '{name}'")
        experts, base = self.models(recipe.experts or {}, recipe.base_model, infer=False)
        return MergedSource.of_plan(name, build_plan(recipe, experts, base).check())

    def _sliced(self, name: str, slices: Any) -> ModelSource:
        pieces, opened = [], {}
        for index, piece in enumerate(slices if isinstance(slices, (list, tuple)) else [slices]):
            where = f"'{name}': slices[{index}]"
            if not isinstance(piece, Mapping) or set(piece) != {"model", "layers"}:
                raise ConfigError(f"{where} must be a dictionary with the keys 'model' and 'layers', got {piece!r}.")
            bounds = piece["layers"]
            if not isinstance(bounds, (list, tuple)) or [type(bound) for bound in bounds] != [int, int]:
                raise ConfigError(
                    f"{where}: 'layers' must be two integers, the first layer and the one after the last."
                )
            key = repr(piece["model"])
            if key not in opened:
                opened[key] = self.model(f"{name}[{index}]", piece["model"])
            pieces.append(LayerSlice(opened[key], *bounds))
        return SlicedSource.of_slices(name, pieces)

    def models(self, experts: Any, base_model: Any, infer: bool) -> tuple[list[ModelSource], ModelSource | None]:
        """Opens experts and base. With `infer` a base that is not given is looked up in the experts' model cards."""
        sources = self._experts(name_experts(experts))
        if base_model is None and infer:
            base_model = infer_base(sources)
        base = self.model(BASE_NAME, base_model, sources[0]) if base_model is not None else None
        return sources, base

    def _experts(self, named: Mapping[str, Any]) -> list[ModelSource]:
        """Opens all experts and reports everything that is wrong with any of them. State dicts take the config of the first
        model that has one."""
        opened: dict[str, ModelSource] = {}
        errors: list[MergeError] = []
        bare = [
            name
            for name, model in named.items()
            if isinstance(model, Mapping) and not set(model) & {"model", RECIPE_KEY, SLICES_KEY}
        ]
        for name in [*(name for name in named if name not in bare), *bare]:
            template = next(iter(opened.values()), None)
            try:
                opened[name] = self.model(name, named[name], template)
            except MergeError as error:
                errors.append(error)
        if len(errors) == 1:
            raise errors[0]
        if errors:
            raise PlanError(str(error) for error in errors)
        return [opened[name] for name in named]


def name_experts(experts: Mapping[str, Any] | Sequence[Any]) -> dict[str, Any]:
    """Names the experts of a list after their last path component, and checks given names.

    Raises:
        ConfigError: There are none, or a name cannot be a folder's name.
    """
    if isinstance(experts, (str, Path)) or not isinstance(experts, (Mapping, Sequence)):
        raise ConfigError(f"experts must be a list or a dictionary of models, got {type(experts).__name__}.")
    if not experts:
        raise ConfigError("No experts were given: pass a list or a dictionary {task: model} with at least one.")
    if not isinstance(experts, Mapping):
        named: dict[str, Any] = {}
        for index, expert in enumerate(experts):
            stem = Path(expert).name if isinstance(expert, (str, Path)) else f"expert_{index}"
            stem = re.sub(r"[^A-Za-z0-9._-]", "_", stem) or f"expert_{index}"
            while stem in named or stem == BASE_NAME:
                stem = f"{stem}_{index}"
            named[stem] = expert
        experts = named
    for name in experts:
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*", name) or name == BASE_NAME:
            raise ConfigError(
                f"Invalid expert name {name!r}: use letters, digits, '.', '_' and '-' ('{BASE_NAME}' means the base model)."
            )
    return dict(experts)


def infer_base(experts: Sequence[ModelSource]) -> str | None:
    """The base model that the model cards of all experts name, if they agree on one that is not an expert itself."""
    bases = {_base_of_card(source) for source in experts}
    base = bases.pop() if len(bases) == 1 else None
    return None if base in [source.reference.model for source in experts] else base


def _base_of_card(source: ModelSource) -> str | None:
    import yaml
    from huggingface_hub import ModelCard

    card = source.folder / "README.md" if source.folder is not None else None
    if card is None or not card.is_file():
        return None
    try:
        named = ModelCard.load(card, ignore_metadata_errors=True).data.base_model
    except (OSError, ValueError, yaml.YAMLError) as error:
        logger.warning("The model card '%s' cannot be read (%s): the base model is not looked up there.", card, error)
        return None
    if isinstance(named, list) and len(named) == 1:
        named = named[0]
    return named if isinstance(named, str) else None
