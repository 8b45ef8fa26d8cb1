"""A model put together from layers of other models ("frankenmerge"), as a source for a merge.

The layers are renumbered; what comes before them is taken from the model of the first slice, what comes after from that of
the last one. The config says the new number of layers, in `layer_types` and the like too.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..checkpoints.conversion import Converter
from ..checkpoints.names import ConversionGroup, NameMap
from ..checkpoints.source import ModelReference, ModelSource
from ..checkpoints.storage import TensorInfo
from ..errors import ConfigError
from ..modeling.blocks import find_block_lists


if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(frozen=True)
class LayerSlice:
    """Layers `start` to `end` (excluded) of a model."""

    source: ModelSource
    start: int
    end: int

    def __len__(self) -> int:
        return self.end - self.start


class SlicedSource(ModelSource):
    """A model made of slices. Use [`SlicedSource.of_slices`]."""

    slices: list[LayerSlice]
    stack: str

    @classmethod
    def of_slices(cls, name: str, slices: Sequence[LayerSlice]) -> SlicedSource:
        """Args:
            name (`str`): What messages call the model.
            slices (`Sequence[LayerSlice]`): In order, at least one.

        Raises:
            ConfigError: A range is empty or outside its model, the models differ in architecture, or have several stacks of
                layers, for which "the layers" is not defined.
        """
        if not slices:
            raise ConfigError(f"'{name}': a model needs at least one slice.")
        first = slices[0].source
        stack = _only_stack(first)
        for piece in slices:
            _check(name, piece, first)
        picked = [(piece.source, index) for piece in slices for index in range(piece.start, piece.end)]
        source = cls(
            name=name,
            reference=ModelReference(None),
            config=config_for_layers(first.config, [(owner.config, index) for owner, index in picked]),
            model_class=first.model_class,
            storage=first.storage,
            folder=first.folder,
            generation_config=first.generation_config,
        )
        source.slices = list(slices)
        source.stack = stack
        _check_layers(source)
        return source

    @cached_property
    def converter(self) -> Converter:
        """Saves in the layout of the first slice's files."""
        converter = Converter(self.shell)
        converter.map_names(self.slices[0].source.storage.infos, str(self))
        return converter

    def __str__(self) -> str:
        pieces = ", ".join(f"{piece.source.name}[{piece.start}:{piece.end}]" for piece in self.slices)
        return f"'{self.name}' ({pieces})"

    def recipe_entry(self) -> dict[str, Any]:
        return {
            "slices": [
                {"model": piece.source.recipe_entry(), "layers": [piece.start, piece.end]} for piece in self.slices
            ]
        }

    def fingerprint(self) -> list[Any]:
        return [[piece.start, piece.end, *piece.source.fingerprint()] for piece in self.slices]

    @property
    def quantization(self) -> str | None:
        return next((piece.source.quantization for piece in self.slices if piece.source.quantization), None)

    @cached_property
    def names(self) -> NameMap:
        groups = [ConversionGroup({name: info}, [name]) for name, info in self.parameters.items()]
        return NameMap(groups, [], [name for name in self.anatomy.parameters if name not in self.parameters], [])

    @property
    def layout(self) -> list[ConversionGroup]:
        return []  # no file has this model's layers under these numbers

    @cached_property
    def parameters(self) -> dict[str, TensorInfo]:
        return {
            name: owner.parameters[stored]
            for name, (owner, stored) in self._origins.items()
            if stored in owner.parameters
        }

    @cached_property
    def duplicates(self) -> dict[str, str]:
        return {}

    @cached_property
    def _origins(self) -> dict[str, tuple[ModelSource, str]]:
        """For each parameter the model and the name that it is read from."""
        picked = [(piece.source, index) for piece in self.slices for index in range(piece.start, piece.end)]
        prefix, origins = f"{self.stack}.", {}
        for name, info in self.anatomy.parameters.items():
            if name.startswith(prefix):
                number, rest = name[len(prefix) :].split(".", 1)
                owner, index = picked[int(number)]
                origins[name] = (owner, f"{prefix}{index}.{rest}")
            else:
                owner = self.slices[-1 if info.depth == 1.0 else 0].source
                origins[name] = (owner, name)
        return origins

    def read(self, name: str) -> Tensor:
        owner, stored = self._origins[name]
        return owner.read(stored)


def _only_stack(source: ModelSource) -> str:
    stacks = list(find_block_lists(source.shell))
    if len(stacks) != 1:
        raise ConfigError(
            f"{source} has {len(stacks)} stacks of layers ({', '.join(stacks) or 'none'}): slices of layers need exactly one."
        )
    return stacks[0]


def _check_layers(source: SlicedSource) -> None:
    """Refuses layers that do not fit their new place, such as a dense layer where the config wants a mixture of experts."""
    prefix = f"{source.stack}."
    for name in source.anatomy.parameters:
        if name.startswith(prefix) and name not in source.parameters and name not in source.anatomy.ties:
            owner, stored = source._origins[name]
            raise ConfigError(
                f"{source}: '{name}' would come from '{stored}' of {owner}, which has no such parameter."
            )


def _check(name: str, piece: LayerSlice, first: ModelSource) -> None:
    if piece.source.model_class is not first.model_class:
        raise ConfigError(
            f"'{name}': slices of {piece.source} ({piece.source.model_class.__name__}) and {first} "
            f"({first.model_class.__name__}) cannot be stacked."
        )
    count = piece.source.config.num_hidden_layers
    if not 0 <= piece.start < piece.end <= count:
        raise ConfigError(
            f"'{name}': the layers [{piece.start}, {piece.end}] are not a range of {piece.source}, which has {count} layers."
        )


def config_for_layers(config: PretrainedConfig, layers: Sequence[tuple[PretrainedConfig, int]]) -> PretrainedConfig:
    """A config for a model with other layers: their number, and every list that has one entry per layer.

    Args:
        config ([`~transformers.PretrainedConfig`]): Gives everything else.
        layers (`Sequence[tuple]`): For each new layer, the config it comes from and its number there.
    """
    result = copy.deepcopy(config)
    count = config.num_hidden_layers
    for key, value in config.to_dict().items():
        if isinstance(value, list) and len(value) == count and ("layer" in key or key.endswith("_types")):
            setattr(result, key, [getattr(owner, key)[index] for owner, index in layers])
    result.num_hidden_layers = len(layers)
    return result
