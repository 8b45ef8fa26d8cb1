"""Finding adapters among the models of a merge, and what their configs say about the model underneath."""

from __future__ import annotations

import copy
import json
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import transformers
from peft import PeftConfig, PeftModel
from peft.auto import MODEL_TYPE_TO_PEFT_MODEL_MAPPING
from torch import Tensor
from transformers import PreTrainedModel

from ..checkpoints.source import ModelReference
from ..checkpoints.storage import SafetensorsStorage, StateDictStorage, Storage, TorchStorage
from ..errors import CheckpointError, ConfigError, UnsupportedModelError, suggest
from ..hub import ADAPTER_CONFIG_NAME, fetch_folder
from .attaching import adapter_tensors, nonlinear_part, refusal


if TYPE_CHECKING:
    from transformers import PreTrainedConfig


SAFE_WEIGHTS, TORCH_WEIGHTS = "adapter_model.safetensors", "adapter_model.bin"
_TASK_CLASSES = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "CAUSAL_LM": "AutoModelForCausalLM",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}


@dataclass
class Adapter:
    """An adapter whose config was read, and its tensors not yet.

    Args:
        name (`str`): What messages call it.
        reference ([`ModelReference`]): Where it came from.
        config ([`~peft.PeftConfig`]): Its config.
        folder (`Path`, *optional*): Where it lies; `None` for adapters in memory.
        live ([`~peft.PeftModel`], *optional*): The model that holds it.
        adapter_name (`str`, *optional*): What that model calls it.
        notes (`list[str]`): What the plan of a merge should say about it.
    """

    name: str
    reference: ModelReference
    config: PeftConfig
    folder: Path | None = None
    live: PeftModel | None = None
    adapter_name: str | None = None
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return f"'{self.name}' ({self.reference.model or 'an adapter in memory'})"

    @property
    def base_name(self) -> str | None:
        """What its config calls the base model."""
        return self.config.base_model_name_or_path or None

    @cached_property
    def storage(self) -> Storage:
        """Its tensors by their names on disk."""
        if self.live is not None:
            return StateDictStorage(adapter_tensors(self.live, self.adapter_name), str(self))
        for filename, kind in ((SAFE_WEIGHTS, SafetensorsStorage), (TORCH_WEIGHTS, TorchStorage)):
            if (self.folder / filename).is_file():
                return kind({filename: self.folder / filename})
        raise CheckpointError(f"{self}: there is no {SAFE_WEIGHTS} in '{self.folder}'.")

    @property
    def needs_base_values(self) -> bool:
        """Whether its change of the base weights depends on them: anything but factors."""
        config = self.config
        whole = getattr(config, "modules_to_save", None) or getattr(config, "bias", "none") not in (None, "none")
        rows = getattr(config, "trainable_token_indices", None)
        return bool(
            nonlinear_part(config) or whole or rows or any(".base_layer." in key for key in self.storage.infos)
        )

    def tensors(self) -> dict[str, Tensor]:
        """All tensors, read."""
        return {key: self.storage.read(key) for key in self.storage.infos}


def find_adapter(name: str, model: Any, hub_kwargs: Mapping[str, Any]) -> Adapter | None:
    """The adapter that a model of a merge is, or `None` when it is another kind of model. Of a repository everything is fetched: ask
    [`may_be_adapter`] first.

    Args:
        name (`str`): What messages call it.
        model: A path, a Hub id, a reference, a [`~peft.PeftModel`], or `{"model": PeftModel, "adapter": name}`.
        hub_kwargs (`Mapping`): The Hub's arguments.

    Raises:
        CheckpointError, ConfigError, UnsupportedModelError: It is an adapter that cannot be used.
    """
    if isinstance(model, PeftModel):
        return _from_model(name, model, None)
    if isinstance(model, Mapping) and isinstance(model.get("model"), PeftModel):
        unknown = sorted(set(model) - {"model", "adapter"})
        if unknown:
            raise ConfigError(f"The expert '{name}': a PeftModel takes the key 'adapter' only, got '{unknown[0]}'.")
        return _from_model(name, model["model"], model.get("adapter"))
    if isinstance(model, (str, Path)) or (isinstance(model, Mapping) and isinstance(model.get("model"), str)):
        return _from_folder(name, ModelReference.parse(model, f"The expert '{name}'"), hub_kwargs)
    return None


def _from_model(name: str, model: PeftModel, adapter: str | None) -> Adapter:
    names = list(model.peft_config)
    if adapter is None:
        active = list(model.active_adapters)
        if len(active) != 1:
            raise ConfigError(
                f"The expert '{name}' is a PeftModel with the adapters {', '.join(names)}: say which one is meant, "
                '{"model": model, "adapter": name}.'
            )
        adapter = active[0]
    if adapter not in model.peft_config:
        raise ConfigError(f"The PeftModel '{name}' has no adapter '{adapter}'.{suggest(adapter, names)}")
    merged = {one for module in model.modules() for one in getattr(module, "merged_adapters", None) or ()}
    if merged:
        raise UnsupportedModelError(
            f"In the PeftModel '{name}' the adapter(s) {', '.join(sorted(merged))} are merged into the base weights: call "
            "model.unmerge_adapter() first."
        )
    found = Adapter(name, ModelReference(None), model.peft_config[adapter], live=model, adapter_name=adapter)
    return _checked(found)


def _from_folder(name: str, reference: ModelReference, hub_kwargs: Mapping[str, Any]) -> Adapter | None:
    kwargs = dict(hub_kwargs) | {
        key: value for key, value in vars(reference).items() if key != "model" and value is not None
    }
    folder, commit = fetch_folder(reference.model, **kwargs)
    if not (folder / ADAPTER_CONFIG_NAME).is_file():
        return None
    where = f"'{name}' ({reference.model})"
    config, notes = _read_config(folder, where)
    return _checked(
        Adapter(name, ModelReference(reference.model, commit, reference.subfolder), config, folder, notes=notes)
    )


def _read_config(folder: Path, where: str) -> tuple[PeftConfig, list[str]]:
    try:
        data = json.loads((folder / ADAPTER_CONFIG_NAME).read_text(encoding="utf-8"))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            config = PeftConfig.from_pretrained(str(folder))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{where}: {ADAPTER_CONFIG_NAME} cannot be used: {error}") from error
    unknown = sorted(key for key in data if not hasattr(config, key))
    notes = []
    if unknown or any("Unexpected keyword" in str(warning.message) for warning in caught):
        listing = ", ".join(f"'{key}'" for key in unknown) or "some keys"
        notes.append(
            f"{where} was written by PEFT {data.get('peft_version', 'of another version')}; its config has {listing}, which the "
            "installed PEFT does not know and ignores"
        )
    return config, notes


def _checked(adapter: Adapter) -> Adapter:
    reason = refusal(adapter.config)
    if reason:
        raise UnsupportedModelError(f"{adapter} cannot be merged: {reason}.")
    return adapter


def common_base(adapters: Sequence[Adapter]) -> str | None:
    """What the adapters' configs call their base model.

    Raises:
        ConfigError: They name different ones.
    """
    named = {adapter.name: adapter.base_name for adapter in adapters if adapter.base_name}
    folders = {_place(base) for base in named.values() if _is_local(base)}
    if len({_stem(base) for base in named.values()}) > 1 or len(folders) > 1:
        listing = ", ".join(f"'{name}' on '{base}'" for name, base in named.items())
        raise ConfigError(
            f"The adapters were trained on different base models: {listing}. Their changes do not add up; if these are names of "
            "one model, pass it as base_model=... (`base_model` in a recipe, --base on the command line)."
        )
    return next((base for base in named.values() if Path(base).is_dir()), next(iter(named.values()), None))


def base_difference(adapter: Adapter, base: str | None) -> str | None:
    """A note where an adapter's config names another base model than the one that is used."""
    if base is None or adapter.base_name is None or _place(base) == _place(adapter.base_name):
        return None
    return f"{adapter} says that it was trained on '{adapter.base_name}', it is applied to '{base}'"


def _is_local(base: str) -> bool:
    """Whether a base model's name means a folder: one that is there, or one that no Hub id could be."""
    return Path(base).expanduser().is_dir() or re.fullmatch(r"[\w.-]*\w(/[\w.-]+)?", base, re.ASCII) is None


def _place(base: str) -> str:
    return str(Path(base).expanduser().resolve()) if _is_local(base) else base.lower()


def _stem(base: str) -> str:
    return re.split(r"[/\\]", base.rstrip("/\\"))[-1].lower()


def adapted_class(adapter: Adapter, config: PreTrainedConfig, default: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """The class that the adapter was trained on: what its config names, or its task's class over the base model.

    Args:
        adapter ([`Adapter`]): The adapter.
        config ([`~transformers.PreTrainedConfig`]): The base model's config.
        default (`type`): The base model's class.
    """
    if adapter.live is not None:
        return type(adapter.live.get_base_model())
    named = (adapter.config.auto_mapping or {}).get("base_model_class")
    found = getattr(transformers, named, None) if named else None
    if isinstance(found, type) and issubclass(found, PreTrainedModel):
        return found
    task = adapter.config.task_type
    if task not in MODEL_TYPE_TO_PEFT_MODEL_MAPPING or _TASK_CLASSES.get(task) is None:
        return default
    mapping = getattr(transformers, _TASK_CLASSES[task])._model_mapping
    known = mapping.get(type(config), None)
    classes = known if isinstance(known, (list, tuple)) else [known]
    if known is None or default in classes:
        return default
    return classes[0]


def adapted_config(
    adapter: Adapter, config: PreTrainedConfig, model_class: type[PreTrainedModel], task_heads: Mapping[str, tuple]
) -> PreTrainedConfig:
    """The base model's config with the number of labels that the adapter's own head has; adapters do not save it.

    Args:
        adapter ([`Adapter`]): The adapter.
        config ([`~transformers.PreTrainedConfig`]): The base model's.
        model_class (`type`): The class that the adapter was trained on.
        task_heads (`Mapping`): The shapes of the head's parameters under `config`, by name.
    """
    if adapter.live is not None:
        return adapter.live.get_base_model().config
    stored = {key.removeprefix("base_model.model."): info.shape for key, info in adapter.storage.infos.items()}
    for name, shape in task_heads.items():
        saved = stored.get(name)
        if saved is not None and saved != shape and shape and shape[0] == config.num_labels and saved[1:] == shape[1:]:
            config = copy.deepcopy(config)
            config.num_labels = saved[0]
            return config
    return config


def unquantized(config: PreTrainedConfig) -> PreTrainedConfig:
    """A copy of a config that says nothing about quantisation: a model without weights has none."""
    config = copy.deepcopy(config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config
