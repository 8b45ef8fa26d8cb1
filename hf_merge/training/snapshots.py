"""Models in training as plain models: unwrapped, adapters merged, copied to the CPU; and the tokenizer that goes with them."""

from __future__ import annotations

import copy
import random
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import extract_model_from_parallel
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from ..checkpoints.opening import open_source
from ..errors import UnsupportedModelError


def plain_model(model: nn.Module, name: str = "trained") -> PreTrainedModel:
    """The model inside of wrappers (DDP, `torch.compile`); of a PEFT model a copy with the adapter merged. Nothing of `model` is
    changed.

    Args:
        model (`nn.Module`): A model in training.
        name (`str`): What messages call it.

    Raises:
        UnsupportedModelError: Its parameters are spread over processes, or its adapter cannot be merged into weights.
    """
    inner = extract_model_from_parallel(model, keep_torch_compile=False)
    if any(isinstance(parameter, DTensor) or hasattr(parameter, "ds_id") for parameter in inner.parameters()):
        raise UnsupportedModelError(
            f"The parameters of '{name}' are sharded over processes (FSDP, DeepSpeed): merge its saved checkpoints instead."
        )
    if isinstance(inner, PreTrainedModel):
        return inner
    if not hasattr(inner, "merge_and_unload"):
        raise UnsupportedModelError(
            f"'{name}' is a {type(inner).__name__}, neither a PreTrainedModel nor a PeftModel."
        )
    if not hasattr(inner.base_model, "merge_and_unload"):
        raise UnsupportedModelError(
            f"The adapter of '{name}' ({type(inner.base_model).__name__}) is no change of weights and cannot be merged."
        )
    # Merging in place and undoing it would round the weights that are being trained.
    return copy.deepcopy(inner).merge_and_unload()


def weights_of(model: nn.Module, name: str = "trained") -> dict[str, Tensor]:
    """A copy of a model's weights on the CPU, by module name, tied ones once."""
    stored = open_source(name, plain_model(model, name)).storage
    return {key: stored.read(key).to("cpu", copy=True) for key in stored.infos}


def same_weights(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> bool:
    """Whether two copies hold the same bits."""
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


@contextmanager
def undisturbed() -> Iterator[None]:
    """Whatever happens inside, random numbers go on as if it had not."""
    states = random.getstate(), np.random.get_state()
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    kind = accelerator.type if accelerator is not None else "cpu"
    devices = range(torch.accelerator.device_count()) if accelerator is not None else ()
    with torch.random.fork_rng(devices=list(devices), device_type=kind if accelerator is not None else "cuda"):
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])


class SavedProcessor:
    """A tokenizer or processor in a temporary folder, where merges look for it; the folder lives as long as this object.

    Args:
        processor (*optional*): Anything with `save_pretrained`; the folder is `None` without one.
    """

    def __init__(self, processor: Any = None):
        self._folder = None
        if processor is not None and hasattr(processor, "save_pretrained"):
            self._folder = tempfile.TemporaryDirectory(prefix="hf_merge-processor-")
            processor.save_pretrained(self._folder.name)

    @property
    def folder(self) -> Path | None:
        return Path(self._folder.name) if self._folder is not None else None
