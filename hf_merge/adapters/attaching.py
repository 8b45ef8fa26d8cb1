"""Attaching an adapter to a model without weights, so that PEFT itself says which module each of its tensors belongs to.

PEFT's own rules resolve target modules, rank and alpha patterns, and the names that transformers 5 gives to the layers of older
models. The model underneath is hollow: its parameters have shapes and no memory, so that a base of any size costs nothing.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from peft import PeftType, get_peft_model, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from ..errors import CheckpointError, UnsupportedModelError
from ..modeling.shell import build_shell


if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from transformers import PreTrainedConfig, PreTrainedModel


ADAPTER = "default"

# What PEFT's constructors raise on configs and tensors that do not fit a model.
_PEFT_ERRORS = (ValueError, RuntimeError, TypeError, KeyError, AttributeError, NotImplementedError)

_NO_WEIGHTS = {
    "PROMPT_TUNING",
    "MULTITASK_PROMPT_TUNING",
    "P_TUNING",
    "PREFIX_TUNING",
    "ADAPTION_PROMPT",
    "CPT",
    "CARTRIDGE",
}
_DECOMPOSES_BASE = {"ADAMSS", "FROD", "OSF", "PSOFT"}
_MERGEABLE = {
    "LORA",
    "ADALORA",
    "BEFT",
    "BOFT",
    "C3A",
    "DEFT",
    "DELORA",
    "FOURIERFT",
    "GLORA",
    "GRALORA",
    "HIRA",
    "HRA",
    "IA3",
    "LN_TUNING",
    "LOHA",
    "LOKR",
    "MISS",
    "OFT",
    "PEANUT",
    "PVERA",
    "RANDLORA",
    "ROAD",
    "SHIRA",
    "SUPERTUNING",
    "TINYLORA",
    "TRAINABLE_TOKENS",
    "UNILORA",
    "VBLORA",
    "VERA",
    "WAVEFT",
}
"""Kinds whose saved tensors say all about the change: PEFT's merge gives it, whatever the base model held when they were attached."""

_ROUTED = {"XLORA", "POLY"}
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga", "orthogonal", "mica")
_REFUSED_FIELDS = {
    "layer_replication": "it repeats layers of the base model, so its modules are not the base model's",
    "alora_invocation_tokens": "it acts on some tokens only (activated LoRA), which no weight can express",
    "arrow_config": "it routes every token among adapters (Arrow), which no weight can express",
    "megatron_config": "PEFT would import a module that the adapter names (Megatron's parallel layers)",
    "kasa_config": "it truncates the base weights when it is initialised (KaSA), so its factors are not a change of them",
    "use_qalora": "it pools the input of the layers (QA-LoRA), and PEFT cannot merge it",
    "monteclora_config": "it samples its factors (MonteCLoRA), so it is no single change of the weights",
}


@dataclass
class Attached:
    """An adapter on a hollow model.

    Args:
        model ([`~peft.PeftModel`]): PEFT's model; its adapter is called [`ADAPTER`].
        modules (`dict[str, nn.Module]`): The base model's own modules by their names, whatever PEFT wrapped them in.
        hollow (`dict[str, torch.Tensor]`): The base model's parameters before the adapter was loaded.
        unexpected (`list[str]`): Tensors of the adapter that PEFT found no place for.
        missing (`list[str]`): Tensors that the adapter's config asks for and its file lacks.
    """

    model: PeftModel
    modules: dict[str, nn.Module]
    hollow: dict[str, Tensor]
    unexpected: list[str]
    missing: list[str]


def refusal(config: PeftConfig) -> str:
    """Why an adapter is no change of weights that could be merged, or the empty string."""
    kind = PeftType(config.peft_type).value
    if kind in _NO_WEIGHTS:
        return f"it is a {kind} adapter, which adds inputs and changes no weights"
    if kind in _ROUTED:
        return f"it is of the kind {kind}, which routes among adapters at run time"
    if kind in _DECOMPOSES_BASE:
        return f"it is a {kind} adapter, whose tensors are relative to a decomposition of the base weights"
    if kind not in _MERGEABLE:
        return f"it is a {kind} adapter, which is not known to be a change of the base weights that PEFT can merge"
    for field, reason in _REFUSED_FIELDS.items():
        if getattr(config, field, None):
            return reason
    initial = getattr(config, "init_lora_weights", None)
    if isinstance(initial, str) and initial.lower().startswith(_CHANGES_BASE):
        return (
            f"init_lora_weights='{initial}' replaces the base weights by a remainder when it is loaded, so its factors are not a "
            "change of them: convert it with save_pretrained(path_initial_model_for_weight_conversion=...)"
        )
    return ""


def nonlinear_part(config: PeftConfig) -> str:
    """What makes an adapter more than a product of two factors, or the empty string."""
    kind = PeftType(config.peft_type).value
    if kind == "ADALORA":
        return ""
    if kind != "LORA":
        return kind
    if getattr(config, "use_dora", False):
        return "DoRA"
    for field in ("velora_config", "use_bdlora"):
        if getattr(config, field, None):
            return field
    return ""


def hollow_model(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    """A model on the CPU whose float32 parameters all read zero and share one number of memory each."""
    model = build_shell(model_class, config, torch.float32)
    for module in model.modules():
        for kind in (module._parameters, module._buffers):
            for name, tensor in kind.items():
                if tensor is not None and tensor.device.type == "meta":
                    kind[name] = _hollow(tensor)
    model.tie_weights()
    return model


def _hollow(tensor: Tensor) -> Tensor:
    dtype = torch.float32 if tensor.dtype.is_floating_point else tensor.dtype
    values = torch.zeros((), dtype=dtype).expand(tensor.shape)
    return nn.Parameter(values, requires_grad=False) if isinstance(tensor, nn.Parameter) else values


def attach(
    model_class: type[PreTrainedModel],
    model_config: PreTrainedConfig,
    config: PeftConfig,
    tensors: Mapping[str, Tensor],
    where: str,
) -> Attached:
    """Lets PEFT put an adapter on a hollow model.

    Args:
        model_class, model_config: Of the base model.
        config ([`~peft.PeftConfig`]): The adapter's config, which is not changed.
        tensors (`Mapping[str, torch.Tensor]`): The adapter's tensors by their names on disk.
        where (`str`): The adapter's name, for messages.

    Raises:
        UnsupportedModelError: The adapter is no change of weights.
        CheckpointError: It does not fit the model.
    """
    reason = refusal(config)
    if reason:
        raise UnsupportedModelError(f"{where} cannot be merged: {reason}.")
    config = copy.deepcopy(config)
    config.inference_mode = True
    # Adapters that derive their own buffers (the shared projections of VeRA) need memory to make them in.
    without_memory = config.peft_type == PeftType.LORA
    hollow = hollow_model(model_class, model_config)
    _check_resized(hollow, tensors, where)
    modules = dict(hollow.named_modules())
    before = dict(hollow.named_parameters(remove_duplicate=False))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = get_peft_model(
                hollow, config, ADAPTER, autocast_adapter_dtype=False, low_cpu_mem_usage=without_memory
            )
            result = set_peft_model_state_dict(
                model, dict(tensors), adapter_name=ADAPTER, low_cpu_mem_usage=without_memory
            )
    except _PEFT_ERRORS as error:
        lines = " ".join(str(error).split())
        raise CheckpointError(
            f"{where} does not fit a {model_class.__name__} with the config of the base model. Give the model that it was trained on as "
            f"base_model=... (`base_model` in a recipe, --base on the command line). PEFT says: {lines[:300]}"
        ) from error
    missing = _missing(model, result.missing_keys)
    return Attached(model, modules, before, list(result.unexpected_keys), missing)


def _check_resized(hollow: PreTrainedModel, tensors: Mapping[str, Tensor], where: str) -> None:
    """Embeddings that were resized for training are saved whole; the base model must have the same vocabulary."""
    try:
        embedding = hollow.get_input_embeddings()
    except (NotImplementedError, AttributeError):
        return
    name = next((name for name, module in hollow.named_modules() if module is embedding), None)
    for key, tensor in tensors.items():
        stem = key.removeprefix("base_model.model.").replace(".base_layer", "")
        if name is not None and stem == f"{name}.weight" and tensor.shape != embedding.weight.shape:
            raise CheckpointError(
                f"{where} was trained with embeddings of shape {tuple(tensor.shape)}, the base model has "
                f"{tuple(embedding.weight.shape)}: give a base model that was resized to the same vocabulary."
            )


def _missing(model: PeftModel, keys: Sequence[str]) -> list[str]:
    """Of the names that were not loaded, those of the adapter that no other name of the same tensor was loaded for."""
    owned = _adapter_parameters(model)
    absent = set(keys)
    every = model.named_parameters(remove_duplicate=False)
    loaded = {id(value) for name, value in every if name not in absent}
    return [key for key in keys if key in owned and id(owned[key]) not in loaded]


def _adapter_parameters(model: PeftModel) -> dict[str, Tensor]:
    """Everything that belongs to the adapter rather than to the base model, shared parts under all their names."""
    owned: dict[str, Tensor] = {}
    for path, module in model.named_modules():
        if not isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            continue
        for layer in module.adapter_layer_names:
            part = getattr(module, layer, None)
            if isinstance(part, nn.Module):
                owned |= {
                    f"{path}.{layer}.{name}": value for name, value in part.named_parameters(remove_duplicate=False)
                }
    return owned


def adapter_tensors(model: PeftModel, name: str) -> dict[str, Tensor]:
    """One adapter of a live model, by the names that it would have on disk."""
    from peft import get_peft_model_state_dict

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        state = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    return {key: tensor.detach().to("cpu") for key, tensor in state.items()}
