"""A model that does not exist yet, as the target of a plan: its class and config are known, its weights are what the merge makes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ..checkpoints.source import ModelReference, ModelSource
from ..checkpoints.storage import Storage, TensorInfo
from ..errors import CheckpointError
from ..modeling.shell import build_shell


if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


class PlannedStorage(Storage):
    """What a model that does not exist yet will store.

    Args:
        infos (`dict[str, TensorInfo]`): By module name.
    """

    def __init__(self, infos: dict[str, TensorInfo]):
        self.infos = infos

    def read(self, key: str) -> torch.Tensor:
        raise CheckpointError(f"'{key}' is not merged yet and cannot be read.")


def planned_source(template: ModelSource, model_class: type[PreTrainedModel], config: PretrainedConfig) -> ModelSource:
    """A model of another class or other widths than the one that it takes name, dtype and generation config from. It is saved in
    the layout in which transformers saves its class.

    Args:
        template ([`ModelSource`]): Usually the first expert.
        model_class (`type`): The class of the result.
        config ([`~transformers.PretrainedConfig`]): Its config.
    """
    shell = build_shell(model_class, config, template.dtype)
    infos = {name: TensorInfo(tuple(value.shape), value.dtype) for name, value in shell.state_dict().items()}
    return ModelSource(
        name=template.name,
        reference=ModelReference(None),
        config=config,
        model_class=model_class,
        storage=PlannedStorage(infos),
        generation_config=template.generation_config,
        live=shell,
    )
