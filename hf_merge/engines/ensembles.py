"""Ensembles: the plan, in which every expert is copied, and the members as one model, from plans or from a folder."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import transformers

from ..checkpoints.processors import moved_tokens
from ..checkpoints.source import ModelSource
from ..config import MergeConfig
from ..errors import CheckpointError
from ..hub import CONFIG_NAME, MEMBERS_FOLDER
from ..methods.output_base import OutputMethod
from ..methods.passthrough import PassthroughConfig
from ..modeling.ensembles import make_ensemble
from ..registry import available_merge_methods, get_merge_method
from .heads import has_generic_labels
from .lazy import lazy_merge
from .placement import Placement
from .plan import MergePlan
from .planning import build_plan
from .streaming import StreamingEngine


if TYPE_CHECKING:
    from transformers import PreTrainedModel


_WITH_LOGITS = (
    "AutoModelForAudioClassification",
    "AutoModelForCTC",
    "AutoModelForCausalLM",
    "AutoModelForImageClassification",
    "AutoModelForImageTextToText",
    "AutoModelForMaskedLM",
    "AutoModelForMultipleChoice",
    "AutoModelForQuestionAnswering",
    "AutoModelForSemanticSegmentation",
    "AutoModelForSeq2SeqLM",
    "AutoModelForSequenceClassification",
    "AutoModelForSpeechSeq2Seq",
    "AutoModelForTokenClassification",
    "AutoModelForVideoClassification",
)
"""The Auto classes whose models answer with logits of classes, tokens or places: those of two models mean the same."""


# -- the plan ---------------------------------------------------------------------------------------------------------


def build_ensemble_plan(config: MergeConfig, experts: Sequence[ModelSource], base: ModelSource | None) -> MergePlan:
    """Plans an ensemble from the headers of its models: the folder's own weights are the first expert's, and each of the others is
    a folder of its own.

    Args:
        config ([`MergeConfig`]): The recipe, of an [`OutputMethod`].
        experts (`Sequence[ModelSource]`): At least two.
        base ([`ModelSource`], *optional*): The base model, which has no part in it.
    """
    copies = [_copied(config, source) for source in experts]
    method = get_merge_method(config.merge_type).method_cls
    problems = method.refusals(config.merge_type, len(experts), base is not None)
    problems += [problem for copy in copies for problem in copy.problems]
    problems += [problem for source in experts for problem in _answer_problems(config, source)]
    problems += [problem for other in experts[1:] for problem in _differences(experts[0], other)]
    notes = [note for copy in copies for note in copy.notes]
    first, *others = copies
    if not problems:
        notes.append(
            f"{len(experts)} models run on every input; the folder itself loads with plain transformers as '{experts[0].name}' alone: "
            "load it with AutoMergedModel"
        )
        if _is_classifier(experts[0]) and has_generic_labels(experts[0]):
            notes.append("the experts' labels have no names that would tell whether their classes are the same")
    return replace(
        first,
        config=config,
        experts=list(experts),
        base=base,
        dropped=[entry for copy in copies for entry in copy.dropped],
        notes=notes,
        problems=list(dict.fromkeys(problems)),
        members={source.name: plan for source, plan in zip(experts[1:], others, strict=True)},
    )


def _copied(config: MergeConfig, source: ModelSource) -> MergePlan:
    """The plan of one expert as it is."""
    plan = build_plan(PassthroughConfig(dtype=config.dtype), [source], None)
    for parameter in plan.parameters:
        parameter.action, parameter.copy_from = "copy", source.name
        parameter.reason = f"'{source.name}' as it is"
    return plan


def _answer_problems(config: MergeConfig, source: ModelSource) -> Iterator[str]:
    """Why the outputs of a model cannot be combined."""
    mappings = (getattr(transformers, name)._model_mapping.get(type(source.config), ()) for name in _WITH_LOGITS)
    known = {one for found in mappings for one in (found if isinstance(found, (list, tuple)) else (found,))}
    if source.model_class.__module__.startswith("transformers.") and source.model_class not in known:
        yield (
            f"{source} is a {source.model_class.__name__}, whose outputs are no logits that mean the same in all experts: "
            f"'{config.merge_type}' is for classifiers and language models."
        )
    method = get_merge_method(config.merge_type).method_cls
    has_one_output = _is_classifier(source) and source.config.num_labels == 1
    is_exclusive = not has_one_output and source.config.problem_type in (None, "single_label_classification")
    if method.needs_exclusive_classes(config) and not is_exclusive:
        yield f"average='probabilities' needs classes that exclude each other, and {source} has none: use 'logits'."


def _differences(first: ModelSource, other: ModelSource) -> Iterator[str]:
    """Why the same input does not mean the same to two models, or the same output."""
    if first.model_class is not other.model_class:
        yield (
            f"{first} is a {first.model_class.__name__} and {other} a {other.model_class.__name__}: the experts of an ensemble have one "
            "class."
        )
        return
    if _is_classifier(first) and first.description.labels != other.description.labels:
        yield (
            f"The classes of {first} and {other} differ ({_shown(first)} and {_shown(other)}): logits have no mean. An ensemble is of "
            "experts for the same classes; the upper reference of different tasks is each expert alone."
        )
    ours, theirs = (getattr(one.config.get_text_config(), "vocab_size", None) for one in (first, other))
    if ours != theirs:
        yield f"The vocabularies of {first} and {other} have {ours} and {theirs} tokens: logits have no mean."
    elif first.vocabulary is not None and other.vocabulary is not None:
        moved = moved_tokens(first.vocabulary, other.vocabulary)
        if moved:
            yield f"The tokenizers of {first} and {other} differ: {moved}. The experts of an ensemble read the same ids."


def _is_classifier(source: ModelSource) -> bool:
    return source.model_class.__name__.endswith(("Classification", "SemanticSegmentation"))


def _shown(source: ModelSource) -> str:
    names = list(source.description.labels.values())
    return f"{len(names)}: {', '.join(map(str, names[:3]))}{', ...' if len(names) > 3 else ''}"


# -- the model --------------------------------------------------------------------------------------------------------


def with_planned_members(plan: MergePlan, model: PreTrainedModel, **kwargs) -> PreTrainedModel:
    """Makes the first expert the ensemble that is planned, the others being read now.

    Args:
        plan ([`MergePlan`]): Of the ensemble.
        model ([`~transformers.PreTrainedModel`]): The first expert; it is changed.
        kwargs: Arguments of `from_pretrained` (`dtype`, `device_map`, ...) for the others.
    """
    members = [lazy_merge(one, StreamingEngine(one, Placement())).load(**kwargs) for one in plan.members.values()]
    return _ensemble(plan.config, model, members)


def member_folders(folder: Path) -> list[Path]:
    """The members that a merged folder holds beside its own weights, in the order of its recipe; none where it is no ensemble.

    Args:
        folder (`Path`): The folder.

    Raises:
        CheckpointError: They are not those that the recipe names.
        ConfigError: The recipe cannot be read.
    """
    if not _holds_ensemble(folder):
        return []
    place = folder / MEMBERS_FOLDER
    found = sorted(path.name for path in place.iterdir() if path.is_dir()) if place.is_dir() else []
    named = list(MergeConfig.from_pretrained(folder).experts or {})[1:]
    if sorted(named) != found or not found:
        raise CheckpointError(
            f"'{place}' holds {', '.join(found) or 'nothing'}, and '{folder / CONFIG_NAME}' names {', '.join(named) or 'nothing'}: the "
            "ensemble is not complete."
        )
    return [place / name for name in named]


def _holds_ensemble(folder: Path) -> bool:
    """Whether a folder's recipe is one of an [`OutputMethod`]; the recipes of methods that are not known here are not read."""
    try:
        merge_type = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))["merge_type"]
    except FileNotFoundError:
        return False
    except (OSError, ValueError, KeyError, TypeError):
        return (folder / MEMBERS_FOLDER).is_dir()  # reading it again says what is wrong
    entry = available_merge_methods().get(merge_type) if isinstance(merge_type, str) else None
    return entry is not None and issubclass(entry.method_cls, OutputMethod)


def with_saved_members(folder: Path, model: PreTrainedModel, members: Sequence[PreTrainedModel]) -> PreTrainedModel:
    """Makes the first expert the ensemble that a folder holds.

    Args:
        folder (`Path`): The folder.
        model ([`~transformers.PreTrainedModel`]): The first expert; it is changed.
        members (`Sequence[PreTrainedModel]`): The others, from [`member_folders`].
    """
    return _ensemble(MergeConfig.from_pretrained(folder), model, members)


def _ensemble(config: MergeConfig, model: PreTrainedModel, members: Sequence[PreTrainedModel]) -> PreTrainedModel:
    method: Any = get_merge_method(config.merge_type).method_cls()
    return make_ensemble(model, members, partial(method.combine, settings=config))
