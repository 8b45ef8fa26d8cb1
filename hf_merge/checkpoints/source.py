"""One model that takes part in a merge, whatever form it was given in: its config, its parameters by module name, its files.

Opening a source reads configs and headers only. Weights are read one parameter at a time by [`ModelSource.read`].
"""

from __future__ import annotations

import threading
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, GenerationConfig, PretrainedConfig, PreTrainedModel

from ..errors import CheckpointError, ConfigError, UnsupportedModelError
from ..hub import ADAPTER_CONFIG_NAME, fetch_folder
from ..modeling.shell import Anatomy, build_shell, model_class_of
from ..modeling.vocabulary import vocabulary_axes
from .conversion import ConversionGroup, Converter, NameMap
from .processors import processor_files, vocabulary_of
from .storage import StateDictStorage, Storage, TensorInfo, open_storage
from .stored import StoredTensor


# What constructors of models raise on values that make no sense together.
_BUILD_ERRORS = (RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError, ArithmeticError)


@dataclass
class ModelReference:
    """Where a model comes from, as a recipe says it.

    Args:
        model (`str`, *optional*): A path or Hub id; `None` for a model that was passed in memory.
        revision (`str`, *optional*): The revision asked for; after loading, the commit it resolved to.
        subfolder (`str`, *optional*): The folder inside the repository.
    """

    model: str | None
    revision: str | None = None
    subfolder: str | None = None

    def to_dict(self) -> dict[str, str]:
        return {key: value for key, value in vars(self).items() if value is not None or key == "model"}

    @classmethod
    def parse(cls, value: Any, where: str) -> ModelReference:
        """From a string or a dictionary with the keys `model`, `revision`, `subfolder`."""
        if isinstance(value, (str, Path)) and str(value):
            return cls(str(value))
        if isinstance(value, Mapping) and value.get("model", "") is None:
            raise ConfigError(
                f"{where} was a model in memory when the recipe was written: pass it again, as a path or a model."
            )
        if (
            isinstance(value, Mapping)
            and isinstance(value.get("model"), str)
            and set(value) <= set(cls.__annotations__)
        ):
            return cls(**value)
        raise ConfigError(
            f"{where} must be a path, a Hub id or a dictionary with 'model' (and 'revision', 'subfolder'), got {value!r}."
        )


@dataclass
class ModelSource:
    """A model opened for merging.

    Args:
        name (`str`): The expert's name, or `"base"`.
        reference ([`ModelReference`]): Where it came from.
        config ([`~transformers.PretrainedConfig`]): Its config.
        model_class (`type`): Its class.
        storage ([`Storage`]): Its tensors by their names on disk.
        folder (`Path`, *optional*): The local folder; `None` for models in memory.
        generation_config ([`~transformers.GenerationConfig`], *optional*): As saved beside the weights.
        live ([`~transformers.PreTrainedModel`], *optional*): The model itself, when it was passed in memory; the names in
            `storage` are module names then.
        notes (`list[str]`): What the plan of a merge should say about this model.
        processors (`Path`, *optional*): The folder of its tokenizer or processor, where that is not `folder`.
        keep (*optional*): What has to live as long as the source, such as a temporary folder.
    """

    name: str
    reference: ModelReference
    config: PretrainedConfig
    model_class: type[PreTrainedModel]
    storage: Storage
    folder: Path | None = None
    generation_config: GenerationConfig | None = None
    live: PreTrainedModel | None = None
    notes: list[str] = field(default_factory=list)
    processors: Path | None = None
    keep: Any = field(default=None, repr=False)
    _cache: dict[str, dict[str, Tensor]] = field(default_factory=dict, repr=False)
    _lock: Any = field(default_factory=threading.Lock, repr=False)

    def __str__(self) -> str:
        where = self.reference.model or "in memory"
        return f"'{self.name}' ({where})"

    def recipe_entry(self) -> dict[str, Any]:
        """How a recipe names this model."""
        return self.reference.to_dict()

    def fingerprint(self) -> list[Any]:
        """What identifies the weights and how they are read, for resuming a merge; unique for weights in memory, which cannot be
        recognised."""
        if self.folder is None:
            return [str(uuid.uuid4())]
        return [str(self.folder), self.config.to_json_string(), *self.storage.fingerprint()]

    @property
    def processor_folder(self) -> Path | None:
        """Where its tokenizer or processor is; `None` when it has none."""
        folder = self.processors or self.folder
        return folder if folder is not None and processor_files(folder) else None

    @cached_property
    def vocabulary(self) -> dict[str, int] | None:
        """Token -> id of its tokenizer; `None` when that is not known."""
        folder = self.processor_folder
        return vocabulary_of(folder) if folder is not None else None

    @cached_property
    def vocabulary_axes(self) -> dict[str, int]:
        """The stored parameters with one slice per token: module name -> axis of the vocabulary."""
        return {name: axis for name, axis in vocabulary_axes(self.shell).items() if name in self.parameters}

    @property
    def quantization(self) -> str | None:
        """How the weights are quantised, or `None`."""
        return quantization_of(self.config)

    @cached_property
    def shell(self) -> PreTrainedModel:
        """The model without weights.

        Raises:
            CheckpointError: No model can be built from the config.
        """
        try:
            return build_shell(self.model_class, self.config, self.dtype)
        except _BUILD_ERRORS as error:
            raise CheckpointError(
                f"{self}: no {self.model_class.__name__} can be built from its config.json ({type(error).__name__}: {error})."
            ) from error

    @cached_property
    def anatomy(self) -> Anatomy:
        return Anatomy(self.shell)

    @cached_property
    def converter(self) -> Converter:
        return Converter(self.shell, self.live)

    @cached_property
    def dtype(self) -> torch.dtype:
        """The dtype of most of the floating-point bytes."""
        sizes: dict[torch.dtype, int] = {}
        for info in self.storage.infos.values():
            if info.dtype.is_floating_point:
                sizes[info.dtype] = sizes.get(info.dtype, 0) + info.nbytes
        return max(sizes, key=sizes.get) if sizes else torch.float32

    @cached_property
    def names(self) -> NameMap:
        """How the stored names map to the model's parameters."""
        if self.live is None:
            return self.converter.map_names(self.storage.infos, str(self))
        state = self.shell.state_dict()
        groups = [ConversionGroup({key: info}, [key]) for key, info in self.storage.infos.items() if key in state]
        unexpected = [key for key in self.storage.infos if key not in state]
        return NameMap(groups, unexpected, [key for key in state if key not in self.storage.infos], [])

    @property
    def layout(self) -> list[ConversionGroup]:
        """How the parameters lie on disk; empty for a model in memory, which has no files."""
        return self.names.groups if self.live is None else []

    @cached_property
    def parameters(self) -> dict[str, TensorInfo]:
        """The stored parameters by module name, each tied group once."""
        infos = {name: info for group in self.names.groups for name, info in group.targets.items()}
        return {name: info for name, info in infos.items() if name not in self.duplicates}

    @cached_property
    def duplicates(self) -> dict[str, str]:
        """Parameters that are stored although another stored parameter is tied to them and has the same values."""
        stored = {name for group in self.names.groups for name in group.targets}
        return {
            target: source
            for target, source in self.anatomy.ties.items()
            if target in stored and source in stored and self._equal(target, source)
        }

    def _equal(self, first: str, second: str) -> bool:
        a, b = self.read(first), self.read(second)
        return a.data_ptr() == b.data_ptr() or (a.shape == b.shape and torch.equal(a, b))

    @cached_property
    def by_canonical(self) -> dict[str, str]:
        """Canonical name -> module name of the stored parameters."""
        return {self.anatomy.canonical(name): name for name in self.parameters}

    def tied_stand_in(self, name: str) -> str | None:
        """The stored parameter that a missing one is tied to, whichever of the two the file holds."""
        ties = self.anatomy.ties
        partners = [ties.get(name)] + [target for target, source in ties.items() if source in (name, ties.get(name))]
        return next((partner for partner in partners if partner in self.parameters), None)

    @cached_property
    def _group_of(self) -> dict[str, ConversionGroup]:
        return {name: group for group in self.names.groups for name in group.targets}

    def read(self, name: str) -> Tensor:
        """Parameter `name` (a module name) in its stored dtype, on the CPU. The caller must not change it in place."""
        group = self._group_of[name]
        if not group.patterns:
            return self.storage.read(group.sources[0])
        if len(group.targets) == 1:
            return self.converter.to_module(group, self.storage.read)[name]
        key = group.sources[0]
        with self._lock:
            # Parameters that share their tensors on disk are asked for one after another: convert once, hand out each once.
            if name not in self._cache.get(key, {}):
                self._cache = {key: self.converter.to_module(group, self.storage.read)}
            return self._cache[key].pop(name)

    def stored(self, name: str) -> StoredTensor | None:
        """Parameter `name` where it is, for reading it in parts; `None` where only [`~ModelSource.read`] makes it."""
        group = self._group_of.get(name)
        is_plain = type(self) is ModelSource and group is not None and not group.patterns
        return self.storage.stored(group.sources[0]) if is_plain else None


def open_source(
    name: str,
    model: Any,
    *,
    template: ModelSource | None = None,
    trust_remote_code: bool = False,
    **hub_kwargs,
) -> ModelSource:
    """Opens a model given as a path, a Hub id, a reference, a live model or a state dict.

    Args:
        name (`str`): What messages call it.
        model: The model.
        template ([`ModelSource`], *optional*): Gives config and class to a bare state dict.
        trust_remote_code (`bool`): Whether code from the model's repository may run.
        hub_kwargs: The Hub's arguments.

    Raises:
        CheckpointError, UnsupportedModelError, ConfigError: With the model's name and the remedy.
    """
    if isinstance(model, PreTrainedModel):
        return _from_model(name, model)
    if isinstance(model, Mapping) and "model" not in model:
        return _from_state_dict(name, model, template)
    if isinstance(model, torch.nn.Module):
        raise UnsupportedModelError(
            f"'{name}' is a {type(model).__name__}, not a PreTrainedModel. A PeftModel is merged into its base first: "
            "pass model.merge_and_unload()."
        )
    return _from_folder(name, ModelReference.parse(model, f"The expert '{name}'"), trust_remote_code, hub_kwargs)


def _from_folder(name: str, reference: ModelReference, trust_remote_code: bool, hub_kwargs: dict) -> ModelSource:
    kwargs = hub_kwargs | {
        key: value for key, value in vars(reference).items() if key != "model" and value is not None
    }
    folder, commit = fetch_folder(reference.model, **kwargs)
    where = f"'{name}' ({reference.model})"
    if not folder.is_dir():
        raise CheckpointError(f"{where}: the folder '{folder}' does not exist.")
    if (folder / ADAPTER_CONFIG_NAME).is_file():
        raise UnsupportedModelError(
            f"{where} is a PEFT adapter, not a model: pass it as an expert, or what AutoPeftModel's merge_and_unload() makes of it."
        )
    config = load_config(folder, where, trust_remote_code)
    return ModelSource(
        name=name,
        reference=ModelReference(reference.model, commit, reference.subfolder),
        config=config,
        model_class=model_class_of(config, where, trust_remote_code),
        storage=open_storage(folder),
        folder=folder,
        generation_config=load_generation_config(folder),
    )


def _from_model(name: str, model: PreTrainedModel) -> ModelSource:
    if getattr(model, "_hf_peft_config_loaded", False):
        raise UnsupportedModelError(f"'{name}' has PEFT adapters attached: merge them into the weights first.")
    ties = dict(getattr(model, "all_tied_weights_keys", None) or {})
    state = model.state_dict()
    pointers = {key: value.data_ptr() for key, value in state.items() if value.device.type != "meta"}
    tied = {
        target for target, source in ties.items() if source in pointers and pointers.get(target) == pointers[source]
    }
    storage = StateDictStorage({key: value for key, value in state.items() if key not in tied}, f"'{name}'")
    return ModelSource(
        name=name,
        reference=ModelReference(None),
        config=model.config,
        model_class=type(model),
        storage=storage,
        generation_config=getattr(model, "generation_config", None),
        live=model,
    )


def _from_state_dict(name: str, state: Mapping[str, Tensor], template: ModelSource | None) -> ModelSource:
    if not state:
        raise ConfigError(f"'{name}' is an empty dictionary: give a state dict, a path or a model.")
    if template is None:
        raise ConfigError(
            f"'{name}' is a state dict, which says nothing about its architecture: give at least one model as a path or a "
            "PreTrainedModel."
        )
    storage = StateDictStorage(state, f"'{name}'")
    return ModelSource(name, ModelReference(None), template.config, template.model_class, storage)


def load_config(folder: Path, where: str, trust_remote_code: bool = False) -> PretrainedConfig:
    """The config of a local folder, or a [`CheckpointError`] that says what is wrong with it."""
    from huggingface_hub.errors import StrictDataclassError

    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{where}: there is no config.json in '{folder}', so it is not a transformers model.")
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)
    except (OSError, StrictDataclassError, *_BUILD_ERRORS) as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        if "custom code" in str(error) and not trust_remote_code:
            raise UnsupportedModelError(
                f"{where} is defined by code in its own repository. Read it, then pass trust_remote_code=True."
            ) from error
        raise CheckpointError(f"{where}: config.json cannot be used: {' '.join(lines[:2])}") from error


def quantization_of(config: PretrainedConfig) -> str | None:
    """The name of the quantisation that a config says its weights have, or `None`."""
    quantization = getattr(config, "quantization_config", None)
    if quantization is None:
        return None
    if isinstance(quantization, Mapping):
        return str(quantization.get("quant_method", "unknown method"))
    return str(getattr(quantization, "quant_method", "unknown method"))


def load_generation_config(folder: Path) -> GenerationConfig | None:
    if not (folder / "generation_config.json").is_file():
        return None
    try:
        return GenerationConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"'{folder / 'generation_config.json'}' cannot be used: {error}") from error
