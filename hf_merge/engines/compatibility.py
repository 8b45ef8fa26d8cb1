"""Whether models can be merged at all: architecture, configs, token ids. From configs and tokenizer files only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ..checkpoints.processors import added_tokens, moved_tokens
from ..checkpoints.source import ModelSource


# Equal shapes do not make models compatible when one of these differs: the same weights would mean something else.
_COMPUTATION = (
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "n_head",
    "num_heads",
    "n_heads",
    "encoder_attention_heads",
    "decoder_attention_heads",
    "hidden_act",
    "activation_function",
    "hidden_activation",
    "position_embedding_type",
    "num_experts_per_tok",
)
# Differences that a user should know of; the first expert's value is used.
_BEHAVIOUR = (
    "rope_theta",
    "rope_parameters",
    "rope_scaling",
    "layer_norm_eps",
    "layer_norm_epsilon",
    "rms_norm_eps",
    "sliding_window",
    "max_position_embeddings",
    "tie_word_embeddings",
    "layer_types",
)


@dataclass
class Incompatibilities:
    """What stands against a merge (`problems`), what should be known (`notes`), and whether comparing further is pointless."""

    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    different_architectures: bool = False


def find_incompatibilities(experts: Sequence[ModelSource], base: ModelSource | None) -> Incompatibilities:
    """Compares every model with the first expert.

    Args:
        experts (`Sequence[ModelSource]`): The experts.
        base ([`ModelSource`], *optional*): The base model.
    """
    found = Incompatibilities()
    first = experts[0]
    for source in [*experts, *([base] if base is not None else [])]:
        if source.quantization is not None:
            found.problems.append(
                f"{source} is quantised ({source.quantization}), and its rounding would swallow the task vectors: merge the "
                "original weights and quantise the result."
            )
    for other in [*experts[1:], *([base] if base is not None else [])]:
        if other.description.model_type != first.description.model_type:
            found.different_architectures = True
            found.problems.append(
                f"{other} is a '{other.description.model_type}' model and {first} a '{first.description.model_type}' model: "
                "only models of one architecture can be merged."
            )
            continue
        _compare_configs(first, other, found)
    if not found.different_architectures:
        _compare_tokenizers([*experts, *([base] if base is not None else [])], found)
    return found


def _compare_configs(first: ModelSource, other: ModelSource, found: Incompatibilities) -> None:
    ours, theirs = _flat(first.description.values), _flat(other.description.values)
    for key in sorted(set(ours) & set(theirs)):
        if ours[key] == theirs[key]:
            continue
        leaf = key.rpartition(".")[2]
        difference = f"'{key}' is {ours[key]!r} in {first} and {theirs[key]!r} in {other}"
        if leaf in _COMPUTATION:
            found.problems.append(f"The models compute differently: {difference}.")
        elif leaf in _BEHAVIOUR:
            found.notes.append(f"{difference}; the result has the first")


def _flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Sub-configs (text_config, vision_config) as dotted keys."""
    flat = {}
    for key, value in config.items():
        if isinstance(value, dict) and key.endswith("_config"):
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat


def _compare_tokenizers(sources: Sequence[ModelSource], found: Incompatibilities) -> None:
    known = [(source, source.vocabulary) for source in sources if source.vocabulary is not None]
    for other, table in known[1:]:
        first, reference = known[0]
        difference = moved_tokens(reference, table)
        if not difference and (added := added_tokens(reference, table)):
            found.notes.append(f"the tokenizers of {first} and {other} differ: {added}")
        if difference:
            found.problems.append(
                f"The tokenizers of {first} and {other} differ: {difference}. Row k of the embeddings would mean different "
                "tokens: choose the result's tokenizer, tokenizer='union' (all tokens), 'base' or an expert's name."
            )
