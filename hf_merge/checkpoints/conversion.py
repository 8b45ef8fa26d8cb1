"""Names on disk and names in memory: with transformers' own private functions.

Since version 5, transformers saves some models under other names, and mixture-of-experts layers in other shapes, than
`state_dict()` has. Everything in hf_merge works in module names; this file converts at the two ends, with transformers'
own conversion tables, from headers alone where only shapes are needed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    PrefixChange,
    WeightConverter,
    WeightRenaming,
    apply_converters,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)

from ..errors import CheckpointError
from .names import ConversionGroup, NameMap, SaveGroup
from .storage import TensorInfo


class Converter:
    """Converts between the names on disk and the module names of one model.

    Args:
        shell ([`~transformers.PreTrainedModel`]): The model on the meta device.
        loaded ([`~transformers.PreTrainedModel`], *optional*): The live model that the weights come from. It is saved in the
            layout that it was loaded from; a checkpoint is saved in its own layout.
    """

    def __init__(self, shell: PreTrainedModel, loaded: PreTrainedModel | None = None):
        self.shell = shell
        self._loaded = loaded
        self.conversions = get_model_conversion_mapping(shell)
        self._renamings = [entry for entry in self.conversions if isinstance(entry, WeightRenaming)]
        self._converters = [entry for entry in self.conversions if isinstance(entry, WeightConverter)]
        self._by_pattern = {pattern: entry for entry in self._converters for pattern in entry.source_patterns}

    def map_names(self, infos: Mapping[str, TensorInfo], where: str) -> NameMap:
        """Finds for each tensor on disk its place in the model. Reads nothing.

        Args:
            infos (`Mapping[str, TensorInfo]`): The headers of the checkpoint.
            where (`str`): The checkpoint's name, for messages.
        """
        state = self.shell.state_dict()
        renamed: dict[str, list[tuple[str, str | None]]] = {}
        unexpected = []
        for key in sorted(infos, key=dot_natural_key):
            name, pattern = self._rename(key, state)
            if name in state:
                renamed.setdefault(name, []).append((key, pattern))
            else:
                unexpected.append(key)
        converted: dict[tuple, TensorInfo] = {}  # the layers of a model are alike
        groups = [self._group(name, entries, infos, where, converted) for name, entries in renamed.items()]
        present = {name for group in groups for name in group.targets}
        ignore = getattr(self.shell, "_keys_to_ignore_on_load_unexpected", None) or []
        buffers = {name for name, _ in self.shell.named_buffers()}
        ignorable = [key for key in unexpected if key in buffers or any(re.search(pattern, key) for pattern in ignore)]
        return NameMap(
            groups,
            [key for key in unexpected if key not in set(ignorable)],
            [name for name in state if name not in present],
            ignorable,
        )

    def _rename(self, key: str, state: Mapping[str, Tensor]) -> tuple[str, str | None]:
        prefix = self.shell.base_model_prefix
        name, pattern = rename_source_key(key, self._renamings, self._converters, prefix, state)
        if name not in state and key in state:
            return key, None
        return name, pattern

    def _group(
        self,
        name: str,
        entries: list[tuple[str, str | None]],
        infos: Mapping[str, TensorInfo],
        where: str,
        converted: dict[tuple, TensorInfo],
    ) -> ConversionGroup:
        """The group of a parameter. `converted` remembers what tensors of the same patterns and shapes become."""
        keys = [key for key, _ in entries]
        patterns = [pattern for _, pattern in entries]
        if patterns[0] is None:
            if len(keys) > 1:
                raise CheckpointError(
                    f"{where}: {', '.join(map(repr, keys))} are all the parameter '{name}': remove the stale one."
                )
            return ConversionGroup({name: infos[keys[0]]}, keys)
        group = ConversionGroup({name: infos[keys[0]]}, keys, patterns)
        alike = (*patterns, *(infos[key] for key in keys))
        if alike in converted:
            group.targets = {name: converted[alike]}
            return group
        on_meta = {key: torch.empty(infos[key].shape, dtype=infos[key].dtype, device="meta") for key in keys}
        try:
            values = self.to_module(group, on_meta.__getitem__)
        except (RuntimeError, ValueError, KeyError, IndexError) as error:
            raise CheckpointError(
                f"{where}: {', '.join(map(repr, keys[:4]))} do not make up '{name}': {error}"
            ) from error
        group.targets = {target: TensorInfo(tuple(value.shape), value.dtype) for target, value in values.items()}
        if list(group.targets) == [name]:
            converted[alike] = group.targets[name]
        return group

    def to_module(self, group: ConversionGroup, read: Callable[[str], Tensor]) -> dict[str, Tensor]:
        """Reads the tensors of a group and returns the parameters that they become, by module name."""
        if not group.patterns:
            return {next(iter(group.targets)): read(group.sources[0])}
        name = next(iter(group.targets))
        converter = deepcopy(self._by_pattern[group.patterns[0]])
        for key, pattern in zip(group.sources, group.patterns, strict=True):
            converter.add_tensor(name, key, pattern, read(key))
        converted = converter.convert(name, model=self.shell, config=self.shell.config)
        return {target: value[0] if isinstance(value, list) else value for target, value in converted.items()}

    def to_disk(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The inverse: parameters by module name to tensors by their names on disk, in the layout of the checkpoint whose
        names were mapped. Works on meta tensors too."""
        self.shell._weight_conversions = self._used()
        return revert_weight_conversion(self.shell, dict(tensors))

    def _used(self) -> list | None:
        if self._loaded is not None:
            return getattr(self._loaded, "_weight_conversions", None)
        return [entry for entry in self.conversions if entry.was_used()]

    def saved_with(self, names: Iterable[str]) -> list[list[str]]:
        """Groups parameters that share tensors on disk and hence can only be saved together."""
        used = self._used()
        if used is None:
            used = [entry for entry in self.conversions if not isinstance(entry, PrefixChange)]
        converters = [entry.reverse_transform() for entry in used[::-1] if isinstance(entry, WeightConverter)]
        groups: dict[str, list[str]] = {}
        for name in names:
            groups.setdefault(apply_converters(name, converters)[0], []).append(name)
        return list(groups.values())

    def save_group(self, infos: Mapping[str, TensorInfo]) -> SaveGroup:
        """The tensors on disk that parameters become together.

        Args:
            infos (`Mapping[str, TensorInfo]`): The parameters, by module name.
        """
        on_meta = {name: torch.empty(info.shape, dtype=info.dtype, device="meta") for name, info in infos.items()}
        disk = {key: TensorInfo(tuple(value.shape), value.dtype) for key, value in self.to_disk(on_meta).items()}
        return SaveGroup(list(infos), disk, False)
