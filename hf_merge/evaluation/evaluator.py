"""[`evaluate_merge`]: runs a merged model, and its experts, on labelled samples."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ..checkpoints.opening import open_source
from ..data.batching import Sample, make_batches
from ..data.labels import IGNORED, read_label
from ..data.samples import TaskModel
from ..errors import ConfigError, MergeError
from ..progress import hides_bars
from .metrics import as_number, reduce_outputs
from .results import EvaluationResult, TaskScore
from .subjects import Subject, evaluating, fitting, load, subject_of
from .tasks import EvaluationTask


logger = logging.getLogger(__name__)

_ROW = "row"
"""The key under which a sample carries its number through sorting and batching."""


def evaluate_merge(
    subject: Any,
    tasks: Mapping[str, Any],
    *,
    experts: bool | Mapping[str, Any] = True,
    device: str | torch.device | None = None,
    trust_remote_code: bool = False,
) -> EvaluationResult:
    """Measures a merged model on its tasks, each under its own head, and compares it with the experts.

    Args:
        subject ([`Merger`], `str`, [`~transformers.PreTrainedModel`] or `dict`): What is measured: a merger, which merges if it has not
            yet; a merged folder or Hub id; one model; or models by task.
        tasks (`dict`): An [`EvaluationTask`] for each task, or labelled rows. Where heads are kept per task, the names are those of
            the experts.
        experts (`bool` or `dict`): Whether each task's own expert is measured too: `True` for those of the merger or of the folder's
            recipe; `False` for none; or a dictionary by task of models or of numbers that were measured before.
        device (`str` or `torch.device`, *optional*): Where models run. The accelerator when there is one.
        trust_remote_code (`bool`): Whether code from the models' repositories may run.

    Returns:
        [`EvaluationResult`]

    Raises:
        ConfigError: A task has no head, or its rows do not fit to the model.

    Example:

        >>> result = evaluate_merge(merger, {"spam": spam_rows, "movies": EvaluationTask(movie_rows, metric="macro_f1")})
        >>> print(result)
        >>> result.mean, result.normalized
    """
    if not isinstance(tasks, Mapping) or not tasks:
        raise ConfigError("tasks must be a dictionary {task: EvaluationTask or labelled rows} with at least one task.")
    tasks = {name: EvaluationTask.of(task) for name, task in tasks.items()}
    known = subject_of(subject, trust_remote_code)
    known.check(list(tasks))
    device = torch.device(device) if device is not None else _default_device()
    result = EvaluationResult()
    for name, task in tasks.items():
        result.tasks[name] = _score(name, task, known.model(name), known.fits(name), device)
    references = _expert_values(known, experts, tasks, device, trust_remote_code)
    for name, value in references.items():
        score = result.tasks[name]
        score.expert, score.normalized = value, tasks[name].measure.relative(score.value, value)
    return result


def evaluate_experts(
    subject: Subject, tasks: Mapping[str, EvaluationTask], device: torch.device | None = None
) -> dict[str, float]:
    """The value of each task's own expert, for the tasks that are called like one.

    Args:
        subject ([`Subject`]): Knows the experts.
        tasks (`dict[str, EvaluationTask]`): What they are measured on.
        device (`torch.device`, *optional*): Where they run.
    """
    device = _default_device() if device is None else device
    sources = subject.experts()
    return {
        name: _score(name, task, load(sources[name]), fitting(sources[name]), device).value
        for name, task in tasks.items()
        if name in sources
    }


def _expert_values(
    subject: Subject, experts: Any, tasks: Mapping[str, EvaluationTask], device: torch.device, trust_remote_code: bool
) -> dict[str, float]:
    if experts is False:
        return {}
    if experts is True:
        try:
            return evaluate_experts(subject, tasks, device)
        except MergeError as error:
            logger.warning("The experts are not compared with: %s", error)
            return {}
    if not isinstance(experts, Mapping):
        raise ConfigError(f"experts must be True, False or a dictionary by task, got {type(experts).__name__}.")
    values = {}
    for name, expert in experts.items():
        if name not in tasks:
            raise ConfigError(f"experts names '{name}', which is none of the tasks: {', '.join(tasks)}.")
        if isinstance(expert, Real):
            values[name] = float(expert)
            continue
        source = open_source(name, expert, trust_remote_code=trust_remote_code)
        values[name] = _score(name, tasks[name], load(source), fitting(source), device).value
    return values


def _default_device() -> torch.device:
    return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")


@torch.no_grad()
def _score(
    name: str, task: EvaluationTask, model: PreTrainedModel, fits: TaskModel, device: torch.device
) -> TaskScore:
    """Runs one model on one task."""
    samples, labels = task.samples(task.rows(name), fits)
    labelled = task.predict is None
    if labelled:
        samples = [
            _with_labels(sample, label, name, i, model) for i, (sample, label) in enumerate(zip(samples, labels))
        ]
    samples = [{**sample, _ROW: torch.tensor(index)} for index, sample in enumerate(samples)]
    with evaluating(model, device):
        predictions, references = (
            _by_logits(model, task, samples, name) if labelled else _by_function(model, task, samples, labels, name)
        )
    if not len(references):
        raise ConfigError(f"No sample of the task '{name}' has a label that counts.")
    value = as_number(task.measure.compute(predictions, references), task.measure.name)
    return TaskScore(value, task.measure.name, len(references), task.measure.greater_is_better)


def _with_labels(sample: Sample, label: Any, name: str, index: int, model: PreTrainedModel) -> Sample:
    """A sample with its labels as a tensor; the text itself where a causal language model has no others."""
    if label is None and _is_causal(model) and "input_ids" in sample:
        return {**sample, "labels": sample["input_ids"]}
    labels = read_label(label, name, index, model.config)
    if model.config.problem_type == "multi_label_classification":
        return {**sample, "labels": labels.long()}
    if model.config.is_encoder_decoder and labels.dim() == 1:
        sample = {key: value for key, value in sample.items() if not key.startswith("decoder_")}
    elif labels.dim() == 1 and "input_ids" in sample and len(labels) != len(sample["input_ids"]):
        raise ConfigError(
            f"Sample {index} of '{name}' has {len(labels)} labels for {len(sample['input_ids'])} tokens: give 'input_ids' and "
            "'labels' of the same length."
        )
    return {**sample, "labels": labels}


def _is_causal(model: PreTrainedModel) -> bool:
    return type(model).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() and not model.config.is_encoder_decoder


def _by_logits(
    model: PreTrainedModel, task: EvaluationTask, samples: list[Sample], name: str
) -> tuple[np.ndarray, np.ndarray]:
    """Predictions and references of all labels, in the order of the batches."""
    reduce = task.measure.reduce or reduce_outputs
    predictions, references = [], []
    for inputs in _batches(model, samples, task.batch_size, name):
        del inputs[_ROW]
        labels = inputs.pop("labels")
        if model.config.is_encoder_decoder and labels.dim() == 2 and labels.dtype == torch.long:
            inputs["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(labels)
        logits = getattr(model(**inputs), "logits", None)
        if logits is None:
            raise ConfigError(
                f"A {type(model).__name__} has no logits to measure on '{name}': say how it answers with EvaluationTask(..., predict=...)."
            )
        if _is_causal(model):
            logits, labels = logits[:, :-1], labels[:, 1:]
        _check_shapes(logits, labels, model, name)
        for kept, values in zip((predictions, references), reduce(logits, labels), strict=True):
            kept.append(values.cpu().numpy())
    return np.concatenate(predictions), np.concatenate(references)


def _check_shapes(logits: Tensor, labels: Tensor, model: PreTrainedModel, name: str) -> None:
    fits = logits.shape[: labels.dim()] == labels.shape or logits.numel() == labels.numel()
    if not fits:
        raise ConfigError(
            f"The labels of '{name}' have the shape {tuple(labels.shape)}, the logits of the {type(model).__name__} "
            f"{tuple(logits.shape)}: they do not belong together."
        )


def _by_function(
    model: PreTrainedModel, task: EvaluationTask, samples: list[Sample], labels: list[Any], name: str
) -> tuple[Any, Any]:
    """Predictions of the task's own function, and the labels as they were given, in the order of the rows."""
    found: dict[int, Any] = {}
    for inputs in _batches(model, samples, task.batch_size, name):
        rows = inputs.pop(_ROW).tolist()
        predictions = list(task.predict(model, inputs))
        if len(predictions) != len(rows):
            raise ConfigError(
                f"The function 'predict' of the task '{name}' gave {len(predictions)} predictions for {len(rows)} samples."
            )
        found.update(zip(rows, predictions, strict=True))
    return np.asarray([found[row] for row in sorted(found)]), np.asarray(labels)


def _batches(model: PreTrainedModel, samples: list[Sample], batch_size: int, name: str) -> Any:
    """Batches on the model's device, floating-point inputs in its dtype."""
    padding = {"labels": IGNORED} | dict.fromkeys(("input_ids", "decoder_input_ids"), _pad_token(model.config))
    for batch in tqdm(make_batches(samples, batch_size, padding), desc=f"Evaluating {name}", disable=hides_bars()):
        inputs = {key: value.to(model.device) for key, value in batch.inputs.items()}
        yield {
            key: value.to(model.dtype) if value.is_floating_point() and key != "labels" else value
            for key, value in inputs.items()
        }


def _pad_token(config: PretrainedConfig) -> int:
    pad = getattr(config.get_text_config(), "pad_token_id", None)
    return pad if isinstance(pad, int) and pad >= 0 else 0
