"""What Twin-Merging adds to a shared model: on disk, folded into the weights for one task, and routed for each sample."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn

from ..errors import CheckpointError, ConfigError, UnsupportedModelError, suggest
from ..low_rank import Factors
from ..methods.after_base import TaskRouter
from ..methods.model_outputs import accepted_arguments
from ..modeling.exclusive import Part, by_layer, dense


if TYPE_CHECKING:
    from transformers import PreTrainedModel


TWIN_FOLDER = "twin"
ROUTER_NAME = "router.safetensors"
_LEFT, _RIGHT = "#left", "#right"


@dataclass
class TwinParts:
    """The exclusive knowledge of all tasks.

    Args:
        parts (`dict[str, dict[str, Part]]`): By task, by parameter of the shared model.
        router ([`TaskRouter`]): Tasks in the same order.
    """

    parts: dict[str, Mapping[str, Part]]
    router: TaskRouter

    # -- on disk --------------------------------------------------------------------------------------------------

    def save(self, folder: Path) -> None:
        """Writes `twin/<task>.safetensors` for each task, and `twin/router.safetensors`."""
        folder = folder / TWIN_FOLDER
        folder.mkdir()
        for task, parts in self.parts.items():
            (folder / f"{task}.safetensors").write_bytes(save(dict(_flat(parts)), metadata={"format": "pt"}))
        state = {name: value.detach().cpu().contiguous() for name, value in self.router.state_dict().items()}
        metadata = {"format": "pt", "tasks": json.dumps(list(self.parts))}
        (folder / ROUTER_NAME).write_bytes(save(state, metadata=metadata))

    @classmethod
    def load(cls, folder: Path, task: str | None = None) -> TwinParts | None:
        """What a merged folder holds, or `None`.

        Args:
            folder (`Path`): The merged folder.
            task (`str`, *optional*): Read the parts of this task only.

        Raises:
            CheckpointError: A file is missing or damaged.
            ConfigError: There is no such task.
        """
        path = folder / TWIN_FOLDER / ROUTER_NAME
        if not path.is_file():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                tasks = json.loads((file.metadata() or {})["tasks"])
            state = load_file(path)
            router = TaskRouter(state["mean"].shape[0], state["hidden.bias"].shape[0], len(tasks))
            router.load_state_dict(state)
            if task is not None and task not in tasks:
                raise ConfigError(
                    f"'{folder}' has no parts for the task '{task}'.{suggest(task, tasks)} Tasks: {', '.join(tasks)}."
                )
            chosen = tasks if task is None else [task]
            parts = {}
            for one in chosen:
                path = folder / TWIN_FOLDER / f"{one}.safetensors"
                parts[one] = _nested(load_file(path))
        except (SafetensorError, OSError, KeyError, RuntimeError, ValueError) as error:
            if isinstance(error, ConfigError):
                raise
            raise CheckpointError(f"'{path}' cannot be read as a part of a merged model: {error}") from error
        return cls(parts, router.requires_grad_(False).eval())

    # -- one task -------------------------------------------------------------------------------------------------

    def added(self, task: str, name: str, value: Tensor) -> Tensor:
        """A parameter of the shared model with the task's part, in its dtype."""
        part = self.parts[task].get(name)
        return value if part is None else (value.float() + dense(part).to(value.device)).to(value.dtype)

    # -- all tasks ------------------------------------------------------------------------------------------------

    def install(self, model: PreTrainedModel, names: Mapping[str, str] | None = None) -> None:
        """Makes a shared model mix the tasks' parts for each sample. Parts and router become modules of the model and move with it.

        Args:
            model ([`~transformers.PreTrainedModel`]): The shared model, under any head.
            names (`Mapping[str, str]`, *optional*): What parameters of the shared model are called in `model`; those that are missing
                have no place there.
        """
        parts = [dict(_renamed(one, names)) for one in self.parts.values()]
        ties = getattr(model, "all_tied_weights_keys", None) or {}
        for one in parts:
            for target, source in ties.items():
                if source in one and model.get_parameter(target) is model.get_parameter(source):
                    one.setdefault(target, one[source])
        routing = _Routing(model)
        for path, layer_parts in by_layer(parts).items():
            layer = model.get_submodule(path)
            layer.twin = layer_parts.to(layer.weight.device)
            layer.register_forward_hook(routing.change)
        model.twin_router = self.router.to(model.device)
        model.register_forward_pre_hook(routing.before, with_kwargs=True)
        model.register_forward_hook(routing.after, always_call=True)


class _Routing:
    """The weights of the samples that a model runs on."""

    def __init__(self, model: PreTrainedModel):
        self._signature = inspect.signature(model.forward)
        self._weights: Tensor | None = None
        self._last: Tensor | None = None

    @torch.no_grad()
    def before(self, model: PreTrainedModel, args: tuple, kwargs: dict[str, Any]) -> None:
        """Runs the shared backbone to find the weights. While text is generated they stay those of the prompt."""
        arguments = dict(self._signature.bind(*args, **kwargs).arguments)
        arguments |= arguments.pop("kwargs", {})
        cache = arguments.get("past_key_values")
        if cache is not None and cache.get_seq_length() > 0 and self._last is not None:
            self._weights = self._last
            return
        self._last = self._weights = model.twin_router(pooled_features(model, arguments))

    def after(self, model: PreTrainedModel, args: tuple, output: Any) -> None:
        self._weights = None

    def change(self, layer: nn.Module, args: tuple, output: Tensor) -> Tensor:
        if self._weights is None:
            return output
        return output + layer.twin.change(layer, args[0], self._weights).to(output.dtype)


_OF_THE_HEAD = ("labels", "past_key_values", "use_cache", "return_dict", "output_hidden_states", "output_attentions")


def pooled_features(model: PreTrainedModel, arguments: Mapping[str, Any]) -> Tensor:
    """The mean last hidden state of a model's backbone over real tokens, float32, (samples, channels).

    Args:
        model ([`~transformers.PreTrainedModel`]): The model.
        arguments (`Mapping`): Of its forward.

    Raises:
        UnsupportedModelError: The backbone returns no last hidden state.
    """
    backbone = model.base_model
    chosen = {name: value for name, value in arguments.items() if name not in _OF_THE_HEAD and value is not None}
    hidden = getattr(backbone(**accepted_arguments(backbone, chosen)), "last_hidden_state", None)
    if not isinstance(hidden, Tensor):
        raise UnsupportedModelError(
            f"{type(model).__name__} returns no last hidden state: a router has nothing to look at."
        )
    hidden = hidden.flatten(2).mT if hidden.dim() == 4 else hidden
    mask = arguments.get("attention_mask")
    if mask is None or mask.shape != hidden.shape[:2]:
        return hidden.float().mean(1)
    weights = mask.to(hidden.device, torch.float32)
    return torch.einsum("sth,st->sh", hidden.float(), weights) / weights.sum(1, keepdim=True).clamp_min(1)


def _renamed(parts: Mapping[str, Part], names: Mapping[str, str] | None) -> Iterator[tuple[str, Part]]:
    for name, part in parts.items():
        found = name if names is None else names.get(name)
        if found is not None:
            yield found, part


def _flat(parts: Mapping[str, Part]) -> Iterator[tuple[str, Tensor]]:
    for name, part in parts.items():
        if isinstance(part, Factors):
            yield name + _LEFT, part.left.contiguous()
            yield name + _RIGHT, part.right.contiguous()
        else:
            yield name, part.contiguous()


def _nested(tensors: Mapping[str, Tensor]) -> dict[str, Part]:
    parts: dict[str, Part] = {name: value for name, value in tensors.items() if not name.endswith((_LEFT, _RIGHT))}
    for name in (key.removesuffix(_LEFT) for key in tensors if key.endswith(_LEFT)):
        parts[name] = Factors(tensors[name + _LEFT], tensors[name + _RIGHT])
    return parts
