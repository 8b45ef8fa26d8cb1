"""The adapter that a merge results in: its config, the names of its tensors, and what is written under each name.

PEFT attaches the planned adapter to a hollow model and is asked for its state dict: names and shapes on disk are its own.
"""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora.layer import Embedding, LoraLayer, ParamWrapper
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..checkpoints.storage import TensorInfo
from ..errors import NonFiniteError, PlanError
from ..low_rank import Factors, resized
from .attaching import ADAPTER, hollow_model
from .reading import lora_tensors


_TARGETS = (nn.Linear, Conv1D, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass
class AdapterPlan:
    """What the merged adapter holds, by parameters of the base model.

    Args:
        ranks (`dict[str, int]`): The parameters whose change is written as factors, with their rank.
        vectors (`list[str]`): Biases whose change is written as the bias of the second factor.
        values (`list[str]`): Parameters that are written whole.
        modules (`list[str]`): The modules that are saved whole.
        twins (`dict[str, list[str]]`): Parameters that share their values with one of these, and get the same change: PEFT acts on
            modules, and a tied weight is used by several.
    """

    ranks: dict[str, int] = field(default_factory=dict)
    vectors: list[str] = field(default_factory=list)
    values: list[str] = field(default_factory=list)
    modules: list[str] = field(default_factory=list)
    twins: dict[str, list[str]] = field(default_factory=dict)

    @property
    def all_ranks(self) -> dict[str, int]:
        """The ranks, those of twins included."""
        return self.ranks | {twin: self.ranks[name] for name in self.ranks for twin in self.twins.get(name, ())}

    @property
    def all_values(self) -> list[str]:
        """What is written whole, twins included."""
        return [*self.values, *(twin for name in self.values for twin in self.twins.get(name, ()))]


@dataclass(frozen=True)
class _Slot:
    """What is written under one name: the part `"A"`, `"B"`, `"bias"` or `"value"` of a parameter."""

    part: str
    name: str
    layer: LoraLayer | None = None


class AdapterLayout:
    """Names, shapes and dtypes of the merged adapter's tensors.

    **Attributes**:
        - **config** ([`~peft.LoraConfig`]) -- The adapter's config.
        - **infos** (`dict[str, TensorInfo]`) -- The tensors by their names on disk.

    Args:
        model_class, model_config: Of the model that the adapter is for.
        planned ([`AdapterPlan`]): What it holds.
        dtype (`torch.dtype`): What it is stored in.
        settings: More fields of the adapter's config: `task_type`, `base_model_name_or_path`, `revision`.
    """

    def __init__(self, model_class: type, model_config: Any, planned: AdapterPlan, dtype: torch.dtype, **settings):
        hollow = hollow_model(model_class, model_config)
        self.planned = planned
        self.config = _lora_config(hollow, planned, settings)
        modules = dict(hollow.named_modules())
        names = {id(value): name for name, value in hollow.named_parameters(remove_duplicate=False)}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = get_peft_model(hollow, self.config, ADAPTER, autocast_adapter_dtype=False, low_cpu_mem_usage=True)
            state = get_peft_model_state_dict(
                model, state_dict=model.state_dict(keep_vars=True), adapter_name=ADAPTER, save_embedding_layers=False
            )
        slots = _slots(model, {id(module): path for path, module in modules.items()}, names)
        self._slots = {key: slots[id(value)] for key, value in state.items()}
        self.infos = {key: TensorInfo(tuple(value.shape), dtype) for key, value in state.items()}
        # PEFT puts the name of the model that it was given there: that of an expert, whose config the hollow model has.
        self.config.base_model_name_or_path = settings.get("base_model_name_or_path")
        self.config.inference_mode = True
        self._check()

    def __str__(self) -> str:
        ranks = sorted(set(self.planned.ranks.values()))
        shown = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
        whole = len(self.planned.values)
        return f"rank {shown} on {len(self.planned.ranks)} weights" + (f", {whole} tensors whole" if whole else "")

    def _check(self) -> None:
        """PEFT must have understood the plan: every planned parameter has its place, under the planned rank."""
        found = Counter((slot.name, slot.part) for slot in self._slots.values())
        wanted = {(name, part) for name in self.planned.all_ranks for part in "AB"}
        wanted |= {(name, "value") for name in self.planned.all_values}
        missing = sorted(name for name, part in wanted if not found[name, part])
        for slot in self._slots.values():
            rank = self.planned.all_ranks.get(slot.name)
            if slot.layer is not None and rank is not None:
                exact = slot.layer.r[ADAPTER] == rank and slot.layer.scaling[ADAPTER] == 1.0
                missing += [] if exact else [slot.name]
        if missing:
            raise PlanError(
                [f"PEFT cannot hold the change of '{missing[0]}' in an adapter of this model: use output='model'."]
            )

    def keys(self, name: str) -> list[str]:
        """The names on disk of what belongs to a parameter."""
        names = {name, *self.planned.twins.get(name, ())}
        return [key for key, slot in self._slots.items() if slot.name in names]

    @property
    def unplanned(self) -> list[tuple[str, str]]:
        """What PEFT's file format holds beside the plan, `(name on disk, parameter)`: the base model's values of other biases
        and of other parameters of modules that are saved whole."""
        planned = {*self.planned.all_ranks, *self.planned.vectors, *self.planned.all_values}
        return [(key, slot.name) for key, slot in self._slots.items() if slot.name not in planned]

    def is_extra(self, key: str) -> bool:
        """Whether a name on disk holds the bias of a second factor, which is zero where nothing is planned for it."""
        return self._slots[key].part == "bias"

    def tensors(self, name: str, change: Factors | Tensor) -> dict[str, Tensor]:
        """What is written for one parameter.

        Args:
            name (`str`): The parameter.
            change (`Factors` or `torch.Tensor`): Factors as the parameter is stored, of at most the planned rank; the change of a
                bias; or the value of a parameter that is written whole.

        Raises:
            NonFiniteError: A value is NaN or infinity, or becomes so in the adapter's dtype.
        """
        found = {}
        for key in self.keys(name):
            slot, info = self._slots[key], self.infos[key]
            if slot.part in "AB":
                first, second = lora_tensors(slot.layer, resized(change, self.planned.ranks[name]))
                value = first if slot.part == "A" else second
            else:
                value = change
            found[key] = value.to(info.dtype).reshape(info.shape).contiguous()
            if not torch.isfinite(found[key]).all():
                dtype = str(info.dtype).removeprefix("torch.")
                raise NonFiniteError(
                    f"The merged '{name}' has NaN or infinity as {dtype}: its values do not fit, or an input holds them. Where "
                    "they do not fit, set dtype='float32'."
                )
        return found


def can_hold(module: nn.Module) -> bool:
    """Whether LoRA acts on modules of this type."""
    return isinstance(module, _TARGETS) and getattr(module, "groups", 1) == 1


def _lora_config(model: nn.Module, planned: AdapterPlan, settings: Mapping[str, Any]) -> LoraConfig:
    owners = {name: model.get_submodule(name.rpartition(".")[0]) for name in planned.all_ranks}
    modules = {
        name.rpartition(".")[0]: rank
        for name, rank in planned.all_ranks.items()
        if isinstance(owners[name], _TARGETS) and name.endswith(".weight")
    }
    parameters = {name: rank for name, rank in planned.all_ranks.items() if name.rpartition(".")[0] not in modules}
    ranks = modules | parameters
    if not ranks:
        raise PlanError(["No change is left that an adapter could hold as factors: use output='model'."])
    common = Counter(ranks.values()).most_common(1)[0][0]
    patterns = {f"^{re.escape(name)}": rank for name, rank in ranks.items() if rank != common}
    whole = [name for name in planned.all_values if not _inside(name, planned.modules)]
    biases = "none"
    if whole:
        biases = "lora_only" if all(name.removesuffix(".bias") in modules for name in whole) else "all"
    return LoraConfig(
        r=common,
        lora_alpha=common,
        rank_pattern=dict(patterns),
        alpha_pattern=dict(patterns),
        target_modules=_targets(model, list(modules)) if modules else [],
        target_parameters=sorted(parameters) or None,
        modules_to_save=sorted(planned.modules) or None,
        bias=biases,
        lora_bias=bool(planned.vectors),
        fan_in_fan_out=bool(modules) and all(isinstance(owners[f"{name}.weight"], Conv1D) for name in modules),
        **settings,
    )


def _inside(name: str, modules: Sequence[str]) -> bool:
    return any(name.startswith(f"{module}.") for module in modules)


def _targets(model: nn.Module, modules: Sequence[str]) -> list[str]:
    """The modules' last names where they mean exactly these modules, as people write them; their full names otherwise."""
    leaves = sorted({name.rpartition(".")[2] for name in modules})
    config = LoraConfig(target_modules=leaves)
    chosen = {name for name, module in model.named_modules() if name and check_target_module_exists(config, name)}
    return leaves if chosen == set(modules) else sorted(modules)


def _slots(model: nn.Module, paths: Mapping[int, str], names: Mapping[int, str]) -> dict[int, _Slot]:
    """What each tensor of an attached adapter stands for, by its identity."""
    slots = {identity: _Slot("value", name) for identity, name in names.items()}
    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper):
            path = paths[id(module.original_module)]
            for leaf, value in module.modules_to_save[ADAPTER].state_dict(keep_vars=True).items():
                slots[id(value)] = _Slot("value", f"{path}.{leaf}")
        elif isinstance(module, LoraLayer):
            path = paths[id(module.get_base_layer())]
            leaf = module.parameter_name if isinstance(module, ParamWrapper) else "weight"
            if isinstance(module, Embedding):
                pair = module.lora_embedding_A[ADAPTER], module.lora_embedding_B[ADAPTER]
            else:
                pair = module.lora_A[ADAPTER].weight, module.lora_B[ADAPTER].weight
                if module.lora_B[ADAPTER].bias is not None:
                    slots[id(module.lora_B[ADAPTER].bias)] = _Slot("bias", f"{path}.bias", module)
            slots[id(pair[0])] = _Slot("A", f"{path}.{leaf}", module)
            slots[id(pair[1])] = _Slot("B", f"{path}.{leaf}", module)
    return slots
