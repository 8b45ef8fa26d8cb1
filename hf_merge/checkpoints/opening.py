"""Opening models for a merge: folders, Hub ids, live models, state dicts."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import CheckpointError, ConfigError, UnsupportedModelError
from ..hub import ADAPTER_CONFIG_NAME, fetch_folder
from .records import ModelRecord, Recorder
from .source import BUILD_ERRORS, ModelReference, ModelSource
from .storage import StateDictStorage, Storage, open_storage


if TYPE_CHECKING:
    from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel

    from .conversion import Converter


class FolderSource(ModelSource):
    """A model folder. Config, class and generation config are loaded when they are asked for, which takes the import of transformers'
    models: a merge of plain weights asks a [`ModelRecord`] instead, where an earlier merge has left one.

    Args:
        name, reference, storage, folder: As in [`ModelSource`].
        trust_remote_code (`bool`): Whether code from the model's repository may run.
        recorder ([`Recorder`], *optional*): Where the record is kept.

    Raises:
        CheckpointError, UnsupportedModelError: There is no record, and the model cannot be loaded.
    """

    def __init__(
        self,
        name: str,
        reference: ModelReference,
        storage: Storage,
        folder: Path,
        trust_remote_code: bool = False,
        recorder: Recorder | None = None,
    ):
        super().__init__(name, reference, None, None, storage, folder)
        for deferred in ("config", "model_class", "generation_config"):
            del self.__dict__[deferred]  # they are cached properties here
        self.trust_remote_code = trust_remote_code
        self.recorder = recorder
        self.record: ModelRecord | None = recorder.find(folder, storage) if recorder is not None else None
        if self.record is not None:
            self.description, self.anatomy, self.names = (
                self.record.description,
                self.record.anatomy,
                self.record.names,
            )
        else:  # what is wrong with the folder is found out now
            self.config, self.model_class, self.generation_config  # noqa: B018

    @cached_property
    def config(self) -> PretrainedConfig:
        return load_config(self.folder, str(self), self.trust_remote_code)

    @cached_property
    def model_class(self) -> type[PreTrainedModel]:
        from ..modeling.shell import model_class_of

        return model_class_of(self.config, str(self), self.trust_remote_code)

    @cached_property
    def generation_config(self) -> GenerationConfig | None:
        return load_generation_config(self.folder)

    @cached_property
    def converter(self) -> Converter:
        converter = super().converter
        if self.record is not None:
            converter.map_names(self.storage.infos, str(self))  # it knows then which conversions the files need
        return converter

    def saved_file(self, filename: str, dtype: torch.dtype | None = None) -> str | None:
        if self.record is None:
            return None
        return self.record.files.get(filename if dtype is None else f"{filename} {dtype}")

    def keep_record(self) -> None:
        if self.record is None and self.recorder is not None:
            self.recorder.keep(self)


def open_source(
    name: str,
    model: Any,
    *,
    template: ModelSource | None = None,
    trust_remote_code: bool = False,
    recorder: Recorder | None = None,
    **hub_kwargs,
) -> ModelSource:
    """Opens a model given as a path, a Hub id, a reference, a live model or a state dict.

    Args:
        name (`str`): What messages call it.
        model: The model.
        template ([`ModelSource`], *optional*): Gives config and class to a bare state dict.
        trust_remote_code (`bool`): Whether code from the model's repository may run.
        recorder ([`Recorder`], *optional*): Keeps what is found out about model folders.
        hub_kwargs: The Hub's arguments.

    Raises:
        CheckpointError, UnsupportedModelError, ConfigError: With the model's name and the remedy.
    """
    if isinstance(model, Mapping) and "model" not in model:
        return _from_state_dict(name, model, template)
    if isinstance(model, torch.nn.Module):
        from transformers import PreTrainedModel

        if isinstance(model, PreTrainedModel):
            return _from_model(name, model)
        raise UnsupportedModelError(
            f"'{name}' is a {type(model).__name__}, not a PreTrainedModel. A PeftModel is merged into its base first: "
            "pass model.merge_and_unload()."
        )
    reference = ModelReference.parse(model, f"The expert '{name}'")
    return _from_folder(name, reference, trust_remote_code, recorder, hub_kwargs)


def _from_folder(
    name: str, reference: ModelReference, trust_remote_code: bool, recorder: Recorder | None, hub_kwargs: dict
) -> ModelSource:
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
    if not (folder / "config.json").is_file():
        raise _no_config(folder, where)
    found = ModelReference(reference.model, commit, reference.subfolder)
    return FolderSource(name, found, open_storage(folder), folder, trust_remote_code, recorder)


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
    from transformers import AutoConfig

    if not (folder / "config.json").is_file():
        raise _no_config(folder, where)
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)
    except (OSError, StrictDataclassError, *BUILD_ERRORS) as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        if "custom code" in str(error) and not trust_remote_code:
            raise UnsupportedModelError(
                f"{where} is defined by code in its own repository. Read it, then pass trust_remote_code=True."
            ) from error
        raise CheckpointError(f"{where}: config.json cannot be used: {' '.join(lines[:2])}") from error


def _no_config(folder: Path, where: str) -> CheckpointError:
    return CheckpointError(f"{where}: there is no config.json in '{folder}', so it is not a transformers model.")


def load_generation_config(folder: Path) -> GenerationConfig | None:
    if not (folder / "generation_config.json").is_file():
        return None
    from transformers import GenerationConfig

    try:
        return GenerationConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"'{folder / 'generation_config.json'}' cannot be used: {error}") from error
