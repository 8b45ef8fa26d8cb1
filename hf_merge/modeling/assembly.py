"""Putting a model together from tensors: transformers' own loading does placement, dtypes, ties and buffers."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import CheckpointError
from .anatomy import Anatomy


if TYPE_CHECKING:
    from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel


def assemble(
    model_class: type[PreTrainedModel],
    config: PretrainedConfig,
    state_dict: Mapping[str, Tensor],
    dtype: torch.dtype,
    generation_config: GenerationConfig | None = None,
    **kwargs,
) -> PreTrainedModel:
    """A model with the given weights, in evaluation mode.

    Args:
        model_class (`type`): Its class.
        config ([`~transformers.PretrainedConfig`]): Its config, which is not changed.
        state_dict (`Mapping[str, torch.Tensor]`): All its parameters, by module name or by name on disk.
        dtype (`torch.dtype`): The dtype to load in.
        generation_config ([`~transformers.GenerationConfig`], *optional*): Replaces the one derived from the config.
        kwargs: Arguments of `from_pretrained` (`device_map`, `attn_implementation`, ...).

    Raises:
        CheckpointError: A parameter of the class is not in `state_dict`.
    """
    config = copy.deepcopy(config)
    kwargs = {"dtype": dtype} | kwargs
    model, info = model_class.from_pretrained(
        None, config=config, state_dict=dict(state_dict), output_loading_info=True, **kwargs
    )
    absent = sorted(info["missing_keys"]) + sorted(str(key) for key in info["mismatched_keys"])
    if absent:
        raise CheckpointError(f"The {model_class.__name__} cannot be put together: {', '.join(absent[:4])} missing.")
    if generation_config is not None and model.can_generate():
        model.generation_config = copy.deepcopy(generation_config)
    return model


def transfer_backbone(source: Anatomy, target: Anatomy, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The backbone of one class under the names of another class over the same backbone, in memory of its own.

    Args:
        source ([`Anatomy`]): Of the model that `state_dict` belongs to.
        target ([`Anatomy`]): Of the class to be put together, usually the same with another head.
        state_dict (`Mapping[str, torch.Tensor]`): Parameters by module name; heads are left out.
    """
    names = backbone_names(source, target, state_dict)
    return {name: state_dict[stored].clone() for name, stored in names.items()}


def backbone_names(source: Anatomy, target: Anatomy, names: Iterable[str]) -> dict[str, str]:
    """For each parameter of the backbone in one class, its name in another class.

    Args:
        source ([`Anatomy`]): Of the class that has `names`.
        target ([`Anatomy`]): Of the other class, whose names are the keys.
        names (`Iterable[str]`): Parameters by module name; heads are left out.
    """
    return {
        target.by_canonical[source.canonical(name)]: name
        for name in names
        if source.canonical(name) in target.by_canonical and not source.parameters[name].is_task_head
    }
