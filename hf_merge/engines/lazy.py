"""A merged model as a state dict whose tensors are merged when they are asked for: what transformers loads a model from without
files in between. Tensors are asked for from several threads, and each one once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..checkpoints.source import ModelSource
from ..checkpoints.storage import TensorInfo
from ..errors import MergeError
from ..modeling.assembly import assemble, backbone_names
from .plan import MergePlan
from .sealing import head_tensors, result_config, result_dtype
from .streaming import StreamingEngine


if TYPE_CHECKING:
    from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel


@dataclass
class LazyTensor:
    """A tensor that is made when it is indexed, as a slice of a safetensors file is read.

    Args:
        info ([`TensorInfo`]): Shape and dtype.
        make (`Callable`): Returns the tensor.
        errors (`list[MergeError]`): What went wrong while making tensors; transformers would only tell that something did.
    """

    info: TensorInfo
    make: Callable[[], Tensor]
    errors: list[MergeError] = field(default_factory=list)

    @property
    def shape(self) -> torch.Size:
        return torch.Size(self.info.shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.info.dtype

    def __getitem__(self, index: Any) -> Tensor:
        try:
            return self.make()[index]
        except MergeError as error:
            self.errors.append(error)
            raise


@dataclass
class LazyModel:
    """Everything that a model is put together from.

    Args:
        model_class (`type`): Its class.
        config ([`~transformers.PretrainedConfig`]): Its config.
        state_dict (`dict`): Tensors, lazy or not, by module name.
        dtype (`torch.dtype`): What `dtype="auto"` means.
        generation_config ([`~transformers.GenerationConfig`], *optional*): Its generation config.
    """

    model_class: type[PreTrainedModel]
    config: PretrainedConfig
    state_dict: Mapping[str, LazyTensor | Tensor]
    dtype: torch.dtype
    generation_config: GenerationConfig | None = None

    def load(self, **kwargs) -> PreTrainedModel:
        """The model, on its devices.

        Args:
            kwargs: Arguments of `from_pretrained` (`device_map`, `dtype`, `offload_folder`, ...).

        Raises:
            MergeError: A parameter could not be merged.
        """
        dtype = kwargs.pop("dtype", kwargs.pop("torch_dtype", "auto"))
        if dtype in ("auto", None):
            dtype = self.dtype
        errors = [
            errors for tensor in self.state_dict.values() if (errors := getattr(tensor, "errors", None)) is not None
        ]
        try:
            return assemble(self.model_class, self.config, self.state_dict, dtype, self.generation_config, **kwargs)
        except (RuntimeError, MergeError):
            known = next((error for found in errors for error in found), None)
            if known is None:
                raise
            raise known from None


def lazy_source(source: ModelSource) -> dict[str, LazyTensor]:
    """The parameters of a model that exists, by module name."""
    return {name: LazyTensor(info, lambda name=name: source.read(name)) for name, info in source.parameters.items()}


def under_head(merged: ModelSource, state: Mapping[str, LazyTensor], head: ModelSource) -> dict[str, LazyTensor]:
    """The backbone of a merged model under the names that it has in the class of another head."""
    names = backbone_names(merged.anatomy, head.anatomy, state)
    return {name: state[stored] for name, stored in names.items()}


def lazy_merge(plan: MergePlan, engine: StreamingEngine, task: str | None = None) -> LazyModel:
    """The result of a merge without data.

    Args:
        plan ([`MergePlan`]): A checked plan of a [`TensorMethod`].
        engine ([`StreamingEngine`]): The engine that was chosen for it.
        task (`str`, *optional*): The expert whose head is wanted; the first one's when not given.
    """
    engine.survey()
    errors: list[MergeError] = []
    state = {
        name: LazyTensor(info, lambda name=name: engine.merge_parameter(name, rounded=True), errors)
        for name, info in plan.outputs.items()
    }
    dtype, generation_config = result_dtype(plan), plan.target.generation_config
    head = plan.heads.get(task)
    if head is None:
        return LazyModel(plan.target.model_class, result_config(plan), state, dtype, generation_config)
    source = next(source for source in plan.experts if source.name == task)
    tensors, source = head_tensors(source, head), head.model or source
    backbone = under_head(plan.target, state, source)
    return LazyModel(source.model_class, source.config, {**backbone, **tensors}, dtype, generation_config)
