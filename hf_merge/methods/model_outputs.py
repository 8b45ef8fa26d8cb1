"""What methods read from a model's output: logits, and the last hidden states."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UnsupportedModelError
from .model_base import ModelInputs, TaskModels


def run_logits(models: TaskModels, model: nn.Module, inputs: ModelInputs) -> Tensor:
    """The logits of a batch, float32, (samples, classes) or (samples, tokens, classes).

    Raises:
        UnsupportedModelError: The model has no logits over classes: it has no head, answers questions by position, or regresses.
    """
    logits = getattr(models.run(model, inputs.arguments), "logits", None)
    name = type(model).__name__
    if not isinstance(logits, Tensor):
        raise UnsupportedModelError(
            f"{name} gives no logits over classes: methods that look at predictions need experts with such a head. "
            "Use a method that looks at activations, such as 'regmean' or 'prodistill'."
        )
    problem = getattr(model.config, "problem_type", None)
    if logits.shape[-1] == 1 or problem in ("regression", "multi_label_classification"):
        raise UnsupportedModelError(
            f"{name} of '{model.config.name_or_path}' predicts {logits.shape[-1]} number(s) that are no distribution over classes "
            f"(problem_type {problem!r}): use a method that looks at activations, such as 'regmean' or 'prodistill'."
        )
    return logits.float()


def run_hidden(models: TaskModels, model: nn.Module, inputs: ModelInputs) -> Tensor:
    """The last hidden states of a batch, float32, (samples, tokens, channels), without running the head where that is possible.
    Of convolutional models every position is a token.

    Raises:
        UnsupportedModelError: The model returns no hidden states.
    """
    backbone = model.base_model
    hidden = getattr(models.run(backbone, accepted_arguments(backbone, inputs.arguments)), "last_hidden_state", None)
    if hidden is None:
        output = models.run(model, inputs.arguments | {"output_hidden_states": True})
        states = getattr(output, "decoder_hidden_states", None) or getattr(output, "hidden_states", None)
        hidden = states[-1] if states else None
    if not isinstance(hidden, Tensor):
        raise UnsupportedModelError(
            f"{type(model).__name__} returns no hidden states that could be compared: use a method that works block by block, "
            "such as 'prodistill'."
        )
    return (hidden.flatten(2).mT if hidden.dim() == 4 else hidden).float()


def accepted_arguments(module: nn.Module, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the arguments that the forward of a module takes."""
    known, takes_more = _signature(type(module))
    return {name: value for name, value in arguments.items() if takes_more or name in known}


@cache
def _signature(module_class: type[nn.Module]) -> tuple[frozenset[str], bool]:
    parameters = inspect.signature(module_class.forward).parameters
    return frozenset(parameters), any(one.kind is one.VAR_KEYWORD for one in parameters.values())


def mean_entropy(logits: Tensor) -> Tensor:
    """The mean of −Σ_c p_c log p_c over the rows of `logits` (rows, classes)."""
    logarithms = torch.log_softmax(logits, dim=-1)
    return -(logarithms.exp() * logarithms).sum(-1).mean()
