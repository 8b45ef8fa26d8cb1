"""Merging the adapters of a live [`~peft.PeftModel`] into a new adapter of the same model."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence

from peft import PeftModel, set_peft_model_state_dict
from torch import Tensor

from .checkpoints.names import SaveGroup
from .config import MergeConfig
from .engines.adapter_output import AdapterSink
from .engines.choice import choose_engine
from .engines.report import MergeReport
from .errors import ConfigError, PlanError, suggest
from .merger import Merger
from .registry import get_merge_method


def add_merged_adapter(
    model: PeftModel, adapters: Sequence[str], config: MergeConfig, name: str = "merged"
) -> MergeReport:
    """Merges adapters of a model into a new one, which is added to the model and not activated.

    Everything is checked, and the merged factors are computed, before the model is changed.

    Args:
        model ([`~peft.PeftModel`]): The model that holds the adapters.
        adapters (`Sequence[str]`): Their names.
        config ([`MergeConfig`]): The recipe: any data-free method. `adapter_rank` bounds the rank of the result.
        name (`str`): What the new adapter is called.

    Returns:
        [`MergeReport`]: What happened, parameter by parameter.

    Raises:
        ConfigError: A name is unknown or taken, or the recipe does not fit.
        PlanError: The adapters cannot be merged; lists every reason.
    """
    _check(model, adapters, config, name)
    config = copy.deepcopy(config)
    config.output = "adapter"
    merger = Merger.from_pretrained({one: {"model": model, "adapter": one} for one in adapters}, config)
    plan = merger.check()
    if plan.heads:
        raise PlanError(
            [
                "The adapters have heads of their own, and one adapter holds one head: save the merge with Merger.save_pretrained."
            ]
        )
    if plan.adapter.config.bias != "none":
        raise PlanError(
            [
                "PEFT keeps trained biases in the base weights, which a new adapter must not change: save the merge instead."
            ]
        )
    tensors: dict[str, Tensor] = {}
    sink = AdapterSink(plan, tensors.__setitem__)
    groups = [SaveGroup([one], {one: info}, True) for one, info in plan.outputs.items()]
    report = choose_engine(plan, merger.placement).run(groups, sink)
    sink.finish(report)
    _add(model, plan.adapter.config, tensors, name)
    return report


def _check(model: PeftModel, adapters: Sequence[str], config: MergeConfig, name: str) -> None:
    if not isinstance(model, PeftModel):
        raise ConfigError(
            f"add_merged_adapter needs a PeftModel, got {type(model).__name__}: call get_peft_model first."
        )
    if isinstance(adapters, str) or not adapters:
        raise ConfigError(f"adapters must be a list with at least one name, got {adapters!r}.")
    if not isinstance(config, MergeConfig):
        raise ConfigError(f"config must be a MergeConfig such as WudiConfig(), got {type(config).__name__}.")
    known = list(model.peft_config)
    for one in adapters:
        if one not in known:
            raise ConfigError(f"The model has no adapter '{one}'.{suggest(one, known)} It has: {', '.join(known)}.")
    if len(set(adapters)) != len(adapters):
        raise ConfigError(
            f"adapters names one adapter twice: {', '.join(adapters)}. Use the method's weights instead."
        )
    if name in known:
        raise ConfigError(
            f"The model has an adapter '{name}' already: choose another name, or delete_adapter('{name}') first."
        )
    if not name or "." in name:
        raise ConfigError(f"Invalid adapter name {name!r}: PEFT's names are not empty and have no '.'.")
    if get_merge_method(config.merge_type).method_cls.needs_data(config):
        raise ConfigError(
            f"The method '{config.merge_type}' needs calibration samples: use Merger with output='adapter' and pass them there."
        )


def _add(model: PeftModel, config, tensors: dict[str, Tensor], name: str) -> None:
    before = set(model.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.add_adapter(name, config)
        added = False
        try:
            _fill(model, tensors, name, before)
            added = True
        finally:
            if not added:
                model.delete_adapter(name)


def _fill(model: PeftModel, tensors: dict[str, Tensor], name: str, before: set[str]) -> None:
    """Loads a new adapter's tensors: all of them, into all of its parameters."""
    result = set_peft_model_state_dict(model, tensors, adapter_name=name)
    if result.unexpected_keys:
        raise PlanError([f"PEFT has no place for '{result.unexpected_keys[0]}' of the merged adapter in this model."])
    missing = [key for key in result.missing_keys if key not in before and name in key.split(".")]
    if missing:
        raise PlanError(
            [f"PEFT wants '{missing[0]}' in this model, which the merged adapter lacks: save the merge instead."]
        )
