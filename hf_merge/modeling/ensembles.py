"""An ensemble as one model: the first member, which runs the others on what it is given and answers for all of them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput


if TYPE_CHECKING:
    from transformers import PreTrainedModel


Combine = Callable[[Sequence[Tensor]], Tensor]
"""The logits of an ensemble, from those of its members."""

_OF_ONE_MEMBER = ("past_key_values", "encoder_outputs", "inputs_embeds", "decoder_inputs_embeds")
_LOSSES = (
    "ForAudioClassification",
    "ForCausalLM",
    "ForConditionalGeneration",
    "ForImageClassification",
    "ForMaskedLM",
    "ForQuestionAnswering",
    "ForSequenceClassification",
    "ForTokenClassification",
    "ForVideoClassification",
)
"""The loss functions of transformers that are cross-entropies, or squared errors, of logits."""


class EnsembleMembers(nn.Module):
    """What an ensemble has beside its first member.

    Args:
        members (`Sequence[PreTrainedModel]`): The other members.
        combine (`Callable`): Makes the logits.
    """

    def __init__(self, members: Sequence[PreTrainedModel], combine: Combine):
        super().__init__()
        self.members = nn.ModuleList(members)
        self.combine = combine


def make_ensemble(model: PreTrainedModel, members: Sequence[PreTrainedModel], combine: Combine) -> PreTrainedModel:
    """Makes a model answer for an ensemble. The other members become its module `ensemble`, and move with it.

    The result's output holds combined logits, and a loss where labels are given and the class has a known loss; hidden states and
    attentions, which are one member's, are left out. Text is generated without a cache of keys and values.

    Args:
        model ([`~transformers.PreTrainedModel`]): The first member; it is changed.
        members (`Sequence[PreTrainedModel]`): The others.
        combine (`Callable`): Makes the logits of all members, the first one's first, into one.

    Returns:
        [`~transformers.PreTrainedModel`]: `model`.
    """
    for one in (model, *members):
        one.config.get_text_config().use_cache = False
        if one.can_generate():
            one.generation_config.use_cache = False
    model.ensemble = EnsembleMembers(members, combine).train(model.training)
    model.register_forward_pre_hook(_refuse_states, with_kwargs=True)
    model.register_forward_hook(_combined, with_kwargs=True)
    return model


def _arguments(model: PreTrainedModel, args: tuple, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    arguments = dict(inspect.signature(model.forward).bind(*args, **kwargs).arguments)
    return arguments | arguments.pop("kwargs", {})


def _refuse_states(model: PreTrainedModel, args: tuple, kwargs: dict[str, Any]) -> None:
    """What was computed by one member, or embedded by its table, means nothing to the others."""
    arguments = _arguments(model, args, kwargs)
    for name in _OF_ONE_MEMBER:
        if arguments.get(name) is not None:
            raise ValueError(
                f"An ensemble takes no '{name}': each of its members has its own. Pass what all of them read, such as input_ids."
            )
    if arguments.get("use_cache"):
        raise ValueError("An ensemble keeps no cache of keys and values: pass use_cache=False.")


def _combined(model: PreTrainedModel, args: tuple, kwargs: dict[str, Any], output: Any) -> ModelOutput:
    names = [name for name in output if name.endswith("logits")] if isinstance(output, ModelOutput) else []
    if not names:
        raise ValueError(
            f"A {type(model).__name__} that is an ensemble must return its logits by name: leave return_dict=False out."
        )
    ensemble = model.ensemble
    outputs = [output, *(member(*args, **kwargs) for member in ensemble.members)]
    logits = {name: ensemble.combine([one[name].to(output[name].device) for one in outputs]) for name in names}
    loss = output.get("loss")
    if loss is not None:
        loss = _loss(model, _arguments(model, args, kwargs), output, logits)
    return type(output)(loss=loss, **logits) if loss is not None else type(output)(**logits)


def _loss(
    model: PreTrainedModel, arguments: Mapping[str, Any], output: ModelOutput, logits: dict[str, Tensor]
) -> Tensor:
    """The loss of combined logits, by the function of the model's class, which has to agree with the model's own loss.

    Raises:
        ValueError: It does not, or there is none.
    """

    def loss_of(values: Mapping[str, Tensor]) -> Tensor:
        given = {"labels", "start_positions", "end_positions", "num_items_in_batch"} & arguments.keys()
        width = values["logits"].shape[-1] if "logits" in values else None
        known = {"pooled_logits": values.get("logits"), "config": model.config, "vocab_size": width}
        return model.loss_function(**values, **known, **{name: arguments[name] for name in given})

    if getattr(model, "loss_type", None) in _LOSSES:
        own = loss_of({name: output[name] for name in logits})
        if torch.allclose(own, output.loss, rtol=1e-3, atol=1e-5):
            return loss_of(logits)
    raise ValueError(f"The loss of a {type(model).__name__} cannot be computed from combined logits: pass no labels.")
