"""Opening the models of a merge: naming experts, finding the base, and models that are themselves the result of a recipe."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..adapters.detection import may_be_adapter
from ..checkpoints.opening import open_source
from ..checkpoints.records import Recorder
from ..checkpoints.source import ModelSource
from ..config import MergeConfig
from ..errors import CheckpointError, ConfigError, MergeError, PlanError


if TYPE_CHECKING:
    from ..adapters.opening import Adapter


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
        base_values (`bool`): Whether the merge reads weights of the base model. Where it does not, a base model that only adapters
            are applied to is opened by its config alone.
        recorder ([`Recorder`]): Keeps what is found out about model folders.
    """

    trust_remote_code: bool = False
    hub_kwargs: dict[str, Any] = field(default_factory=dict)
    base_values: bool = True
    recorder: Recorder = field(default_factory=Recorder)

    def model(self, name: str, model: Any, template: ModelSource | None = None) -> ModelSource:
        """Opens one model: everything that [`open_source`] takes; `{"merge": recipe}`, a merge that is carried out parameter by
        parameter when the outer merge asks for it; or `{"slices": [{"model": model, "layers": [start, end]}, ...]}`."""
        if isinstance(model, Mapping) and set(model) == {RECIPE_KEY}:
            return self._nested(name, model)
        if isinstance(model, Mapping) and set(model) == {SLICES_KEY}:
            return self._sliced(name, model[SLICES_KEY])
        return open_source(
            name,
            model,
            template=template,
            trust_remote_code=self.trust_remote_code,
            recorder=self.recorder,
            **self.hub_kwargs,
        )

    def _nested(self, name: str, model: Mapping[str, Any]) -> ModelSource:
        recipe = model[RECIPE_KEY]
        if not isinstance(recipe, (MergeConfig, Mapping)):
            raise ConfigError(
                f"'{name}': '{RECIPE_KEY}' must be a recipe (a dictionary or a MergeConfig), got {recipe!r}."
            )
        if not isinstance(recipe, MergeConfig):
            recipe = MergeConfig.from_dict(recipe, origin=f"The recipe of '{name}'")
        if recipe.output != "model":
            raise ConfigError(
                f"'{name}': the result of a nested recipe is a model, so its 'output' cannot be {recipe.output!r}: leave it out."
            )
        from .nested import MergedSource
        from .planning import build_plan

        # Its parameters are merged into values, whatever the outer result is.
        opening = replace(self, base_values=True)
        experts, base = opening.models(recipe.experts or {}, recipe.base_model, infer=False)
        return MergedSource.of_plan(name, build_plan(recipe, experts, base).check())

    def _sliced(self, name: str, slices: Any) -> ModelSource:
        from .slices import LayerSlice, SlicedSource

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
        """Opens experts and base. With `infer` a base that is not given is looked up in the experts' model cards. Adapters need
        one: it is the one that their configs name, or the model that holds them."""
        named = name_experts(experts)
        adapters, errors = self._adapters(named)
        base, over = None, {}
        if adapters and not errors:
            base = self._adapter_base(adapters, base_model, only_adapters=len(adapters) == len(named))
            over = _over(adapters, base)
        others = {name: model for name, model in named.items() if name not in adapters and name not in errors}
        opened = over | self._experts(others, list(errors.values()))
        sources = [opened[name] for name in named]
        if base is None:
            if base_model is None and infer:
                base_model = infer_base(sources)
            base = self.model(BASE_NAME, base_model, sources[0]) if base_model is not None else None
        return sources, base

    def _adapters(self, named: Mapping[str, Any]) -> tuple[dict[str, Adapter], dict[str, MergeError]]:
        """The experts that are adapters, and those that would be if they could be used."""
        found: dict[str, Adapter] = {}
        errors: dict[str, MergeError] = {}
        for name, model in named.items():
            try:
                if not may_be_adapter(name, model, self.hub_kwargs):
                    continue
                from ..adapters.opening import find_adapter

                adapter = find_adapter(name, model, self.hub_kwargs)
            except MergeError as error:
                errors[name] = error
                continue
            if adapter is not None:
                found[name] = adapter
        return found, errors

    def _adapter_base(self, adapters: Mapping[str, Adapter], base_model: Any, only_adapters: bool) -> ModelSource:
        """The model that the adapters were trained on; only its config where no weight of it is read."""
        from ..adapters.opening import base_difference, common_base
        from ..adapters.source import ConfigOnlySource, dequantized, live_base

        values = self.base_values or not only_adapters or any(one.needs_base_values for one in adapters.values())
        holder = next((adapter.live for adapter in adapters.values() if adapter.live is not None), None)
        if base_model is None and holder is not None:
            _refuse_trained_biases(adapters)
            common_base(list(adapters.values()))
            base = live_base(holder, BASE_NAME)
            if base.quantization is not None and not values:
                return ConfigOnlySource.of_live(base.live, BASE_NAME)
        else:
            base = self._named_base(adapters, base_model, values)
        if base.quantization is not None:
            base = dequantized(base, self.trust_remote_code)
        for adapter in adapters.values():
            note = base_difference(adapter, base.reference.model)
            adapter.notes += [note] if note else []
        return base

    def _named_base(self, adapters: Mapping[str, Adapter], base_model: Any, values: bool) -> ModelSource:
        """The base model that was given, or the one that the adapters' configs name."""
        from ..adapters.opening import common_base
        from ..adapters.source import ConfigOnlySource

        given = base_model is not None
        base_model = base_model if given else common_base(list(adapters.values()))
        listing = ", ".join(f"'{name}'" for name in adapters)
        if base_model is None:
            raise ConfigError(
                f"The adapter(s) {listing} do not name their base model: pass base_model=... (`base_model` in a recipe, --base on the command line)."
            )
        named = isinstance(base_model, (str, Path)) or (
            isinstance(base_model, Mapping) and set(base_model) <= _REFERENCE
        )
        try:
            if named and not values:
                return ConfigOnlySource.of(BASE_NAME, base_model, self.trust_remote_code, self.hub_kwargs)
            return self.model(BASE_NAME, base_model)
        except MergeError as error:
            if given:
                raise
            raise CheckpointError(
                f"The base model '{base_model}' that the adapter(s) {listing} name cannot be opened ({error}) Pass "
                "base_model=... (`base_model` in a recipe, --base on the command line)."
            ) from error

    def _experts(self, named: Mapping[str, Any], errors: list[MergeError]) -> dict[str, ModelSource]:
        """Opens all experts that are models and reports everything that is wrong with any of them, and the errors known before.
        State dicts take the config of the first model that has one."""
        opened: dict[str, ModelSource] = {}
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
        return opened


def _over(adapters: Mapping[str, Adapter], base: ModelSource) -> dict[str, ModelSource]:
    """Adapters as models."""
    from ..adapters.source import AdapterSource

    return {name: AdapterSource.over(adapter, base) for name, adapter in adapters.items()}


def _refuse_trained_biases(adapters: Mapping[str, Adapter]) -> None:
    """A live model holds trained biases in the place of its base model's."""
    for name, adapter in adapters.items():
        if adapter.live is not None and getattr(adapter.config, "bias", "none") not in (None, "none"):
            raise ConfigError(
                f"The adapter '{name}' trains biases, which a PeftModel keeps in the place of the base model's: pass "
                "base_model=... (`base_model` in a recipe, --base on the command line)."
            )


_REFERENCE = {"model", "revision", "subfolder"}


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
    bases = {base_of_card(source.folder) if source.folder is not None else None for source in experts}
    base = bases.pop() if len(bases) == 1 else None
    return None if base in [source.reference.model for source in experts] else base


def base_of_card(folder: Path) -> str | None:
    """The base model that the model card in a folder names, where it names exactly one.

    Raises:
        CheckpointError: The card cannot be read. What a card says that is no card is not looked at, with a warning.
    """
    import yaml
    from huggingface_hub import ModelCard

    card = folder / "README.md"
    try:
        named = ModelCard.load(card, ignore_metadata_errors=True).data.base_model if card.is_file() else None
    except OSError as error:
        raise CheckpointError(f"The model card '{card}' cannot be read: {error}.") from error
    except (ValueError, TypeError, yaml.YAMLError) as error:
        logger.warning("The model card '%s' cannot be read (%s): the base model is not looked up there.", card, error)
        return None
    if isinstance(named, list) and len(named) == 1:
        named = named[0]
    return named if isinstance(named, str) else None
