"""The plan of a merge of experts that share no base model: one backbone, and every expert's head with the map to its features
folded in. Experts may differ in width where the method can deal with that, never in depth.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from ..checkpoints.processors import moved_tokens
from ..checkpoints.source import ModelSource
from ..checkpoints.storage import TensorInfo
from ..config import MergeConfig
from ..methods.base import ParameterKind
from ..modeling.blocks import find_block_lists
from ..registry import get_merge_method
from .heads import HeadPlan
from .plan import MergePlan, PlannedParameter
from .planned_source import planned_source
from .vocabulary import align_vocabularies


if TYPE_CHECKING:
    from transformers import PretrainedConfig


# The same weights would mean something else, or rows of a table would, where one of these differs.
_SAME = (
    "vocab_size",
    "max_position_embeddings",
    "n_positions",
    "type_vocab_size",
    "image_size",
    "patch_size",
    "num_channels",
    "hidden_act",
    "activation_function",
    "rope_parameters",
    "layer_norm_eps",
    "layer_norm_epsilon",
    "rms_norm_eps",
)
_WIDTHS = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim", "n_inner")
_MIXTURES = (ParameterKind.EXPERT_LINEAR, ParameterKind.TRANSPOSED_EXPERT_LINEAR)


def build_backbone_plan(config: MergeConfig, experts: Sequence[ModelSource], base: ModelSource | None) -> MergePlan:
    """Plans a merge by a [`BackboneMethod`] from the headers of its models.

    Args:
        config ([`MergeConfig`]): The recipe.
        experts (`Sequence[ModelSource]`): At least two.
        base ([`ModelSource`], *optional*): Not used; the plan says so.
    """
    aligned = align_vocabularies(config, experts, None)
    experts = aligned.experts
    plan = MergePlan(config, experts, None, notes=aligned.notes, problems=aligned.problems)
    method = get_merge_method(config.merge_type).method_cls
    plan.problems += method.refusals(config.merge_type, len(experts), base is not None)
    if base is not None:
        plan.notes.append("the base model is not used: the experts are merged without one")
    for source in plan.experts:
        plan.problems += _refusals(source)
    plan.problems += _differences(plan.experts, method.changes_width)
    if config.heads not in ("auto", "per_task"):
        plan.problems.append(
            f"heads='{config.heads}' is not possible: every head is kept, with the map to its features folded in."
        )
    blocks, depth = getattr(config, "blocks", None), len(_blocks_of(plan.experts[0]))
    if blocks is not None and blocks > depth:
        plan.problems.append(f"blocks={blocks} is more than the {depth} blocks of {plan.experts[0]}.")
    if plan.problems:
        return plan
    width = getattr(config, "merged_width", None) or plan.experts[0].config.hidden_size
    try:
        merged = [_merged_source(source, plan.experts[0].config, width) for source in plan.experts]
    except ValueError as error:
        plan.problems.append(f"merged_width={width}: {error}")
        return plan
    plan.merged = merged[0]
    _plan_parameters(plan, merged)
    return plan


def _refusals(source: ModelSource) -> list[str]:
    """Why a model cannot take part, as far as its header tells."""
    config = source.config
    found = []
    if source.quantization is not None:
        found.append(
            f"{source} is quantised ({source.quantization}): merge the original weights and quantise the result."
        )
    if getattr(config, "is_encoder_decoder", False):
        found.append(
            f"{source} is an encoder-decoder, whose two stacks have no common residual stream: it cannot be folded."
        )
    elif not isinstance(getattr(config, "hidden_size", None), int):
        found.append(
            f"{source}: its config has no single 'hidden_size', the width of a residual stream: it cannot be folded."
        )
    if any(info.kind in _MIXTURES for info in source.anatomy.parameters.values()):
        found.append(f"{source} is a mixture of experts, whose routing is not linear: it cannot be folded.")
    if source.names.unexpected:
        found.append(
            f"{source} stores tensors that {source.model_class.__name__} does not have, such as '{source.names.unexpected[0]}'."
        )
    return found


def _differences(experts: Sequence[ModelSource], may_differ_in_width: bool) -> list[str]:
    first, found = experts[0], []
    for other in experts[1:]:
        ours, theirs = first.config, other.config
        if ours.model_type != theirs.model_type:
            found.append(
                f"{other} is a '{theirs.model_type}' model and {first} a '{ours.model_type}' model: only models of one "
                "architecture can be merged."
            )
            continue
        depths = [getattr(config, "num_hidden_layers", None) for config in (ours, theirs)]
        if depths[0] != depths[1]:
            found.append(
                f"{first} has {depths[0]} layers and {other} has {depths[1]}: experts may differ in width, not in depth."
            )
        keys = _SAME if may_differ_in_width else _SAME + _WIDTHS
        for key in keys:
            values = [getattr(config, key, None) for config in (ours, theirs)]
            if values[0] != values[1]:
                found.append(
                    f"'{key}' is {values[0]!r} in {first} and {values[1]!r} in {other}: it has to be the same."
                )
        found += _token_differences(first, other)
        names = [_backbone_names(source) for source in (first, other)]
        alone = sorted(names[0] ^ names[1])
        if alone and depths[0] == depths[1]:
            owner = first if alone[0] in names[0] else other
            found.append(f"Only {owner} has the backbone's parameter '{alone[0]}': the backbones have to be the same.")
    return found


def _token_differences(first: ModelSource, other: ModelSource) -> list[str]:
    tables = [first.vocabulary, other.vocabulary]
    if None in tables:
        return []
    difference = moved_tokens(*tables)
    if not difference:
        return []
    return [f"The tokenizers of {first} and {other} differ: {difference}. tokenizer='union' keeps all tokens."]


def _backbone_names(source: ModelSource) -> set[str]:
    anatomy = source.anatomy
    return {anatomy.canonical(name) for name in anatomy.parameters if is_backbone(source, name)}


def is_backbone(source: ModelSource, name: str) -> bool:
    """Whether a parameter belongs to what is merged, not to the head."""
    prefix = source.anatomy.backbone_prefix
    return name.startswith(prefix) if prefix else True


def _merged_source(source: ModelSource, template: PretrainedConfig, width: int) -> ModelSource:
    """The result under the head of one expert: its class, and the merged backbone's widths. Output embeddings are not tied to
    the merged input embeddings: they belong to the head, which has another map folded into it for every task."""
    config = copy.deepcopy(source.config)
    for key in _WIDTHS:
        if getattr(template, key, None) is not None:
            setattr(config, key, getattr(template, key))
    set_width(config, width)
    if getattr(config, "tie_word_embeddings", None) is not None:
        config.tie_word_embeddings = False
    return planned_source(source, source.model_class, config)


def set_width(config: PretrainedConfig, width: int) -> None:
    """Changes a config's hidden size, in place. The size of a head stays as it is where that goes; the other widths follow in
    proportion.

    Raises:
        ValueError: The number of heads does not divide the width.
    """
    old = config.hidden_size
    if width == old:
        return
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or old // heads
    if width % size == 0 and getattr(config, "num_key_value_heads", heads) in (None, heads):
        config.num_attention_heads = width // size
        if getattr(config, "num_key_value_heads", None) is not None:
            config.num_key_value_heads = width // size
    elif width % heads:
        raise ValueError(f"it must be a multiple of {size}, the size of a head, or of {heads}, their number.")
    for key in ("intermediate_size", "n_inner"):
        inner = getattr(config, key, None)
        if inner is not None:
            setattr(config, key, round(inner * width / old))
    config.hidden_size = width


def _plan_parameters(plan: MergePlan, merged: Sequence[ModelSource]) -> None:
    target = plan.target
    apart = _kept_apart(target, getattr(plan.config, "blocks", None))
    for name, info in target.anatomy.parameters.items():
        stored = target.parameters.get(name)
        if stored is None or (info.kind is ParameterKind.BUFFER and name not in plan.experts[0].parameters):
            continue
        planned = PlannedParameter(name, info.kind, info.depth, "merge", [], None, _output(plan, stored), plan.config)
        canonical = target.anatomy.canonical(name)
        if name in apart:
            planned.action, planned.copy_from = "copy", target.name
            planned.reason = f"comes after the merged blocks, '{target.name}' keeps its own"
        elif is_backbone(target, name):
            planned.experts = [source.anatomy.by_canonical[canonical] for source in plan.experts]
        else:
            planned.action, planned.copy_from = "copy", target.name
            planned.reason = f"head of '{target.name}', with the map to its features folded in"
        plan.parameters.append(planned)
    for source, model in zip(plan.experts, merged, strict=True):
        own = {name for name in model.parameters if not is_backbone(model, name)}
        own |= _kept_apart(model, getattr(plan.config, "blocks", None))
        outputs = {name: _output(plan, stored) for name, stored in model.parameters.items() if name in own}
        if outputs:
            plan.heads[source.name] = HeadPlan(source.name, list(outputs), outputs, model)


def _kept_apart(source: ModelSource, blocks: int | None) -> set[str]:
    """The parameters of the backbone behind the first `blocks` blocks."""
    if blocks is None:
        return set()
    later = tuple(f"{name}." for name in list(_blocks_of(source))[blocks:])
    lists = tuple(f"{name}." for name in find_block_lists(source.shell))
    return {
        name
        for name, info in source.anatomy.parameters.items()
        if is_backbone(source, name)
        and info.kind is not ParameterKind.BUFFER
        and (name.startswith(later) or (info.depth == 1.0 and not name.startswith(lists)))
    }


def _blocks_of(source: ModelSource) -> list[str]:
    lists = find_block_lists(source.shell)
    return [f"{name}.{index}" for name, blocks in lists.items() for index in range(len(blocks))]


def _output(plan: MergePlan, stored: TensorInfo) -> TensorInfo:
    dtype = getattr(torch, plan.config.dtype) if plan.config.dtype else plan.experts[0].dtype
    return TensorInfo(stored.shape, dtype if stored.dtype.is_floating_point else stored.dtype)
