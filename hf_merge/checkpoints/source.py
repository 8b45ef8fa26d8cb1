"""One model that takes part in a merge, whatever form it was given in: its config, its parameters by module name, its files.

Opening a source reads configs and headers only. Weights are read one parameter at a time by [`ModelSource.read`].
"""

from __future__ import annotations

import copy
import threading
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from ..errors import CheckpointError, ConfigError
from .description import Description
from .names import ConversionGroup, NameMap, SaveGroup
from .processors import processor_files, vocabulary_of
from .storage import Storage, TensorInfo
from .stored import StoredTensor


if TYPE_CHECKING:
    from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel

    from ..modeling.anatomy import Anatomy
    from .conversion import Converter


# What constructors of models raise on values that make no sense together.
BUILD_ERRORS = (RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError, ArithmeticError)


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

    is_adapter: ClassVar[bool] = False
    """Whether it is an adapter over another model."""

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
        return [str(self.folder), self.description.text, *self.storage.fingerprint()]

    @cached_property
    def description(self) -> Description:
        """What its config and its class say."""
        return Description.of(self.config, self.model_class)

    @property
    def is_as_stored(self) -> bool:
        """Whether its values are those of its storage, and not made of them when they are read."""
        return type(self).read is ModelSource.read

    def keep_record(self) -> None:
        """Leaves a record of what was found out about the model for merges to come, where it is one of a folder."""

    def saved_file(self, filename: str, dtype: torch.dtype | None = None) -> str | None:
        """What transformers writes as `config.json` (for weights of a dtype) or `generation_config.json`, where that is known without
        loading it."""
        return None

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
        from ..modeling.vocabulary import vocabulary_axes

        return {name: axis for name, axis in vocabulary_axes(self.shell).items() if name in self.parameters}

    @property
    def quantization(self) -> str | None:
        """How the weights are quantised, or `None`."""
        return self.description.quantization

    def config_for(self, dtype: torch.dtype) -> PretrainedConfig:
        """Its config, as it is saved beside weights of a dtype: a copy."""
        config = copy.deepcopy(self.config)
        config.dtype = dtype
        config.architectures = [self.model_class.__name__]
        return config

    @cached_property
    def shell(self) -> PreTrainedModel:
        """The model without weights.

        Raises:
            CheckpointError: No model can be built from the config.
        """
        from ..modeling.shell import build_shell

        try:
            return build_shell(self.model_class, self.config, self.dtype)
        except BUILD_ERRORS as error:
            raise CheckpointError(
                f"{self}: no {self.model_class.__name__} can be built from its config.json ({type(error).__name__}: {error})."
            ) from error

    @cached_property
    def anatomy(self) -> Anatomy:
        from ..modeling.shell import read_anatomy

        return read_anatomy(self.shell)

    @cached_property
    def converter(self) -> Converter:
        from .conversion import Converter

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

    def save_groups(self, outputs: Mapping[str, TensorInfo]) -> list[SaveGroup]:
        """How the parameters of a merged model are laid out on disk: as in the files of this one.

        Args:
            outputs (`Mapping[str, TensorInfo]`): The parameters to save, by module name. Those that the files lack get the names that
                transformers would give them.
        """
        groups = []
        left = dict(outputs)
        for group in self.layout:
            if not all(name in left for name in group.targets):
                continue
            infos = {name: left.pop(name) for name in group.targets}
            if not group.patterns:
                groups.append(SaveGroup(list(infos), {group.sources[0]: next(iter(infos.values()))}, True))
            else:
                groups.append(self.converter.save_group(infos))
        if left:
            together = self.converter.saved_with(left)
            groups += [self.converter.save_group({name: left[name] for name in names}) for names in together]
        return groups

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
        is_plain = self.is_as_stored and group is not None and not group.patterns
        return self.storage.stored(group.sources[0]) if is_plain else None
