"""Which parameters of a model have one row per token, and which numbers in a config are ids of tokens. No names are looked at
for the parameters: they are the ones whose shape follows the size of the vocabulary."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

import torch


if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


_TOKEN_IDS = re.compile(r"(_token_ids?|_token_index|_token_indices|suppress_tokens)$")
_PHRASES = ("bad_words_ids", "force_words_ids", "forced_decoder_ids", "sequence_bias")
"""Sequences of ids: one that has lost a token is left out as a whole."""


def vocabulary_size(config: PretrainedConfig) -> int | None:
    """The number of rows of a model's embeddings; `None` for a model without one vocabulary."""
    text_config = _text_config(config)
    size = getattr(text_config, "vocab_size", None) if text_config is not None else None
    return size if isinstance(size, int) and size > 0 else None


def _text_config(config: PretrainedConfig) -> PretrainedConfig | None:
    try:
        return config.get_text_config()
    except ValueError:  # several text models in one
        return None


def with_vocabulary_size(config: PretrainedConfig, size: int) -> PretrainedConfig:
    """A copy of a config for embeddings of another size."""
    old, resized = vocabulary_size(config), copy.deepcopy(config)
    for part in (resized, _text_config(resized)):
        if getattr(part, "vocab_size", None) == old:
            part.vocab_size = size
    return resized


def vocabulary_axes(shell: PreTrainedModel) -> dict[str, int]:
    """The parameters with one slice per token: module name -> the axis of the vocabulary. Found by building the model with a larger
    vocabulary, on the meta device.

    Args:
        shell ([`~transformers.PreTrainedModel`]): The model, usually on the meta device.
    """
    from .shell import build_shell

    size, step = vocabulary_size(shell.config), 64
    if size is None:
        return {}
    larger = build_shell(type(shell), with_vocabulary_size(shell.config, size + step), shell.dtype).state_dict()
    axes = {}
    for name, tensor in shell.state_dict().items():
        grown = [axis for axis in range(tensor.ndim) if larger[name].shape[axis] != tensor.shape[axis]]
        if len(grown) == 1 and larger[name].shape[grown[0]] - tensor.shape[grown[0]] == step:
            axes[name] = grown[0]
    return axes


def offsets_by_padding(shell: PreTrainedModel) -> bool:
    """Whether the model counts positions from the id of its padding token, as RoBERTa does: that id cannot change."""
    return any(
        isinstance(module, torch.nn.Embedding) and module.padding_idx is not None and "position" in path
        for path, module in shell.named_modules()
    )


def map_token_ids(config: Any, change: Callable[[int], int | None], fallback: Any) -> list[str]:
    """Changes every id of a token in a config, its sub-configs included, in place.

    Args:
        config ([`~transformers.PretrainedConfig`] or [`~transformers.GenerationConfig`]): The config.
        change (`Callable`): From an id to the new id, `None` for a token that is gone.
        fallback (*optional*): A config that gives the fields whose tokens are all gone.

    Returns:
        `list[str]`: These fields.
    """
    lost = []
    for part, other in zip_longest(_parts(config), _parts(fallback)):
        for key, value in list(vars(part).items()) if part is not None else ():
            if value is None or not (key in _PHRASES or _TOKEN_IDS.search(key)):
                continue
            changed = _changed_phrases(key, value, change) if key in _PHRASES else _changed(value, change)
            if changed is None or (not changed and isinstance(changed, (list, dict)) and value):
                changed = getattr(other, key, None)
                lost.append(key)
            setattr(part, key, changed)
    return lost


def _parts(config: Any) -> Iterator[Any]:
    from transformers import PretrainedConfig

    yield config
    for name in getattr(config, "sub_configs", None) or ():
        part = getattr(config, name, None)
        if isinstance(part, PretrainedConfig):
            yield from _parts(part)


def _changed_phrases(key: str, value: Any, change: Callable[[int], int | None]) -> Any:
    """The fields of a generation config that hold sequences of ids, in the forms that transformers takes."""
    if key == "forced_decoder_ids":  # [[position, id], ...]
        pairs = [(place, old if old is None else change(old), old) for place, old in value]
        return [[place, new] for place, new, old in pairs if new is not None or old is None]
    if key == "sequence_bias":  # {(id, ...): bias} or [[[id, ...], bias], ...]
        pairs = value.items() if isinstance(value, dict) else value
        kept = [(new, bias) for ids, bias in pairs if (new := _phrase(ids, change)) is not None]
        return {tuple(ids): bias for ids, bias in kept} if isinstance(value, dict) else [[*pair] for pair in kept]
    return [new for one in value if (new := _phrase(one, change))]


def _phrase(value: Any, change: Callable[[int], int | None]) -> list[Any] | None:
    """A sequence of ids without the ones that are gone: `None`; or alternatives, without those that have become `None`."""
    if all(isinstance(one, (list, tuple)) for one in value):
        return [new for one in value if (new := _phrase(one, change)) is not None]
    changed = [change(one) for one in value]
    return None if None in changed else changed


def _changed(value: Any, change: Callable[[int], int | None]) -> Any:
    if isinstance(value, (list, tuple)):
        return [new for new in (_changed(one, change) for one in value) if new is not None]
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        return value
    return change(value)
