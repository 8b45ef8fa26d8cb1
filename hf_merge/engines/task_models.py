"""The models of an end-to-end merge: the merged model, its backbone under the head of every task, and the experts.

All models of the merged backbone share their parameters. An expert is in memory only while it is used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..checkpoints.source import ModelSource
from ..data.batching import Batch
from ..methods.model_base import ModelInputs, TaskModels
from ..modeling.precision import mixed_precision
from ..modeling.residency import build_runnable_shell, entries_of, move_buffers
from ..progress import hides_bars
from .plan import MergePlan


if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


ValueOf = Callable[[str], Tensor | None]
"""Gives an entry of a state dict: a parameter that is shared, or a tensor; `None` when it is stored nowhere."""


class LazyTensors(Sequence[Tensor]):
    """The experts' values of one parameter, read when they are asked for and not kept.

    Args:
        sources (`Sequence[ModelSource]`): The experts.
        names (`Sequence[str]`): The parameter's name in each.
        device (`torch.device`): Where to.
    """

    def __init__(self, sources: Sequence[ModelSource], names: Sequence[str], device: torch.device):
        self._sources = sources
        self._names = names
        self._device = device

    def __len__(self) -> int:
        return len(self._sources)

    def __getitem__(self, index: int) -> Tensor:
        return self._sources[index].read(self._names[index]).to(self._device)


def build_model(
    model_class: type[PreTrainedModel], config: PretrainedConfig, value_of: ValueOf, device: torch.device
) -> PreTrainedModel:
    """A model in float32 and evaluation mode whose parameters do not require gradients.

    Args:
        model_class (`type`): Its class.
        config ([`~transformers.PretrainedConfig`]): Its config.
        value_of (`Callable`): Gives its weights. A `Parameter` becomes part of the model as it is, so that models can share it.
        device (`torch.device`): Where to.
    """
    model = build_runnable_shell(model_class, config)
    move_buffers(model, device)
    for name in entries_of(model):
        path, _, leaf = name.rpartition(".")
        owner = model.get_submodule(path)
        value = value_of(name)
        if leaf in owner._parameters:
            if value is None:
                value = torch.zeros(owner._parameters[leaf].shape)
            owner._parameters[leaf] = value if isinstance(value, nn.Parameter) else as_parameter(value, device)
        elif value is not None:
            owner._buffers[leaf] = value.to(device)
    return model


def as_parameter(value: Tensor, device: torch.device) -> nn.Parameter:
    """A leaf in float32 with memory of its own."""
    return nn.Parameter(value.detach().to(device, torch.float32, copy=True), requires_grad=False)


def expert_values(source: ModelSource, device: torch.device) -> ValueOf:
    """The weights of an expert as it is; parameters that are tied are one and the same."""
    parameters = parameter_names(source)

    @cache
    def read(stored: str) -> Tensor:
        value = source.read(stored)
        return as_parameter(value, device) if stored in parameters else value

    def value_of(name: str) -> Tensor | None:
        stored = name if name in source.parameters else source.tied_stand_in(name)
        return None if stored is None else read(stored)

    return value_of


def parameter_names(source: ModelSource) -> set[str]:
    """The entries of a model's state dict that are parameters, not buffers; tied ones included."""
    return {name for name, _ in source.shell.named_parameters(remove_duplicate=False)}


@dataclass(frozen=True)
class MergedValues:
    """The values of the merged model, shared by the models of all tasks.

    Args:
        plan ([`MergePlan`]): Says what is merged.
        shared (`Mapping[str, Tensor]`): The merged parameters and buffers by module name, each tied group once.
    """

    plan: MergePlan
    shared: Mapping[str, Tensor]

    def of_target(self, name: str) -> Tensor | None:
        """An entry of the merged model."""
        known = name if name in self.shared else self.plan.target.tied_stand_in(name)
        return self.shared.get(known) if known is not None else None

    def under_head_of(self, source: ModelSource, device: torch.device) -> ValueOf:
        """The merged backbone with the head of an expert, where heads are not merged."""
        own = expert_values(source, device)
        keeps_head = self.plan.config.heads == "first" or source.name in self.plan.heads
        by_canonical = self.plan.target.anatomy.by_canonical

        def value_of(name: str) -> Tensor | None:
            merged = by_canonical.get(source.anatomy.canonical(name))
            if merged is None or (keeps_head and source.anatomy.parameters[name].is_task_head):
                return own(name)
            return self.of_target(merged)

        return value_of


class LoadedModels(TaskModels):
    """The models of all tasks, and their samples on the device.

    Args:
        values ([`MergedValues`]): Of the merged model.
        batches (`list[list[Batch]]`): The samples of every expert in batches.
        samples (`list[list[Batch]]`): The same one by one.
        device (`torch.device`): Where models run.
        bf16 (`bool`): Whether they run in bfloat16 (autocast).
    """

    def __init__(
        self,
        values: MergedValues,
        batches: list[list[Batch]],
        samples: list[list[Batch]],
        device: torch.device,
        bf16: bool = False,
    ):
        self._experts = values.plan.experts
        self._planned = {parameter.name: parameter for parameter in values.plan.parameters}
        self._values = values
        self._batches = batches
        self._samples = samples
        self._device = device
        self._bf16 = bf16
        self._students: dict[int, PreTrainedModel] = {}
        self.batches = [len(one) for one in batches]

    def student(self, task: int) -> PreTrainedModel:
        if task not in self._students:
            source = self._experts[task]
            value_of = self._values.under_head_of(source, self._device)
            self._students[task] = build_model(source.model_class, source.config, value_of, self._device)
        return self._students[task]

    def release(self, task: int) -> None:
        """Forgets the model of a task, whose head is its own."""
        self._students.pop(task, None)

    @contextmanager
    def expert(self, task: int) -> Iterator[PreTrainedModel]:
        source = self._experts[task]
        yield build_model(source.model_class, source.config, expert_values(source, self._device), self._device)

    def expert_parameter(self, task: int, name: str) -> str:
        return self._planned[name].experts[task]

    def inputs(self, task: int, index: int) -> ModelInputs:
        return self._on_device(task, self._batches[task][index])

    def samples(self, task: int) -> Iterator[ModelInputs]:
        for sample in tqdm(self._samples[task], desc=f"Samples of {self._experts[task].name}", disable=hides_bars()):
            yield self._on_device(task, sample)

    def _on_device(self, task: int, batch: Batch) -> ModelInputs:
        arguments = {name: value.to(self._device) for name, value in batch.inputs.items()}
        labels = arguments.pop("labels", None)
        is_decoder = self._experts[task].config.is_encoder_decoder
        mask = arguments.get("decoder_attention_mask" if is_decoder else "attention_mask")
        if mask is not None:
            mask = None if mask.dim() != 2 or bool(mask.all()) else mask.bool()
        return ModelInputs(task, arguments, batch.count, mask, labels)

    def run(self, model: nn.Module, arguments: Mapping[str, Any]) -> Any:
        with mixed_precision(self._device, self._bf16):
            return model(**arguments)
