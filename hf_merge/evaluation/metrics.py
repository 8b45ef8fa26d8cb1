"""Metrics: from a model's outputs and labels to one number.

A [`Metric`] first reduces every batch of outputs to what it needs (classes, values, losses of tokens), so that no logits are kept, and
then computes its number from those of all samples. The built-in ones need nothing but numpy; any function of predictions and
references and any module of `evaluate` does as well.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..data.labels import IGNORED
from ..errors import ConfigError, suggest


Reduction = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""From the logits and labels of a batch to predictions and references, one for each label that counts."""


@dataclass(frozen=True)
class Metric:
    """How good predictions are.

    Args:
        name (`str`): What tables call it.
        compute (`Callable`): `compute(predictions, references) -> float`, both numpy arrays over all samples (all tokens that have a
            label, where every token has one).
        reduce (`Callable`, *optional*): `reduce(logits, labels) -> (predictions, references)` for one batch. By default the most
            likely class, or the value itself where labels are floating-point numbers.
        greater_is_better (`bool`): `False` for losses and perplexities.
    """

    name: str
    compute: Callable[[np.ndarray, np.ndarray], float]
    reduce: Reduction | None = None
    greater_is_better: bool = True

    def relative(self, value: float, reference: float) -> float:
        """`value` as a share of `reference`; 1 is as good, less is worse, also where smaller values are better."""
        over, under = (value, reference) if self.greater_is_better else (reference, value)
        return over / under if under else float("nan")


def reduce_outputs(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Classes (int64) for integer labels, values (float32) for others.

    Args:
        logits (`torch.Tensor`): (samples, classes), or (samples, tokens, classes) where labels are (samples, tokens).
        labels (`torch.Tensor`): -100 where there is none. Integers in the shape of the logits say of every class whether it is there.
    """
    if labels.is_floating_point():
        values = logits.float()
        return (values.reshape(-1), labels.reshape(-1)) if values.numel() == labels.numel() else (values, labels)
    counted = labels != IGNORED
    if logits.shape == labels.shape:
        return (logits > 0).long()[counted], labels[counted]
    return logits.argmax(-1)[counted], labels[counted]


def token_losses(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """-log p of every label that counts (nats, float32), and the labels."""
    counted = labels != IGNORED
    losses = torch.nn.functional.cross_entropy(logits[counted].float(), labels[counted], reduction="none")
    return losses, labels[counted]


def accuracy(predictions: np.ndarray, references: np.ndarray) -> float:
    """The share of predictions that equal their reference."""
    return float(np.mean(predictions == references))


def f1(predictions: np.ndarray, references: np.ndarray) -> float:
    """F1 of class 1, for two classes; 0 where the class is neither there nor predicted."""
    found = np.union1d(predictions, references)
    if found.size and found.max() > 1:
        raise ConfigError(f"The metric 'f1' is for two classes, but there is a class {found.max()}: use 'macro_f1'.")
    return _f1_of(1, predictions, references)


def macro_f1(predictions: np.ndarray, references: np.ndarray) -> float:
    """The mean of F1 over the classes that are there or predicted."""
    return float(np.mean([_f1_of(c, predictions, references) for c in np.union1d(predictions, references)]))


def _f1_of(c: int, predictions: np.ndarray, references: np.ndarray) -> float:
    hits = np.sum((predictions == c) & (references == c))
    total = np.sum(predictions == c) + np.sum(references == c)
    return float(2 * hits / total) if total else 0.0


def matthews_correlation(predictions: np.ndarray, references: np.ndarray) -> float:
    """Matthews' correlation for any number of classes; 0 where it is not defined."""
    count, correct = len(references), np.sum(predictions == references)
    classes = np.union1d(predictions, references)
    predicted = np.array([np.sum(predictions == c) for c in classes], dtype=float)
    true = np.array([np.sum(references == c) for c in classes], dtype=float)
    spread = np.sqrt(count**2 - predicted @ predicted) * np.sqrt(count**2 - true @ true)
    return float((correct * count - predicted @ true) / spread) if spread else 0.0


def pearson(predictions: np.ndarray, references: np.ndarray) -> float:
    """Pearson's correlation; 0 where one side is constant."""
    x, y = predictions.astype(float) - predictions.mean(), references.astype(float) - references.mean()
    norm = np.sqrt(x @ x) * np.sqrt(y @ y)
    return float(x @ y / norm) if norm else 0.0


def mean_squared_error(predictions: np.ndarray, references: np.ndarray) -> float:
    """The mean of squared differences."""
    return float(np.mean((predictions.astype(float) - references.astype(float)) ** 2))


def mean_loss(losses: np.ndarray, references: np.ndarray) -> float:
    """The mean cross entropy, in nats."""
    return float(np.mean(losses.astype(float)))


def perplexity(losses: np.ndarray, references: np.ndarray) -> float:
    """exp of the mean cross entropy."""
    return float(np.exp(np.mean(losses.astype(float))))


METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("accuracy", accuracy),
        Metric("f1", f1),
        Metric("macro_f1", macro_f1),
        Metric("matthews_correlation", matthews_correlation),
        Metric("pearson", pearson),
        Metric("mse", mean_squared_error, greater_is_better=False),
        Metric("loss", mean_loss, token_losses, greater_is_better=False),
        Metric("perplexity", perplexity, token_losses, greater_is_better=False),
    )
}


def get_metric(metric: Any) -> Metric:
    """The [`Metric`] that is meant.

    Args:
        metric: A [`Metric`]; the name of a built-in one; the path of a local module of `evaluate`; a module that `evaluate.load` has
            returned; or a function of predictions and references.

    Raises:
        ConfigError: There is no such metric.
    """
    if isinstance(metric, Metric):
        return metric
    if isinstance(metric, (str, Path)):
        return METRICS[str(metric)] if str(metric) in METRICS else _load(str(metric))
    if callable(getattr(metric, "compute", None)) and hasattr(metric, "name"):
        return Metric(metric.name, _compute_of(metric, metric.name))
    if callable(metric):
        return Metric(getattr(metric, "__name__", type(metric).__name__), metric)
    raise ConfigError(
        f"A metric is a name, a function of predictions and references, or a module of `evaluate`, got {metric!r}."
    )


def _load(name: str) -> Metric:
    """A module of `evaluate` from a local path; others would need the network, and code from there."""
    if not Path(name).exists():
        raise ConfigError(
            f"There is no metric '{name}'.{suggest(name, METRICS)} Built in: {', '.join(METRICS)}. Others: the path of a local "
            "module of `evaluate`, or what evaluate.load(...) returns."
        )
    import evaluate

    try:
        module = evaluate.load(name)
    except (OSError, ValueError, ImportError, TypeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(f"'{name}' cannot be loaded as a module of `evaluate`: {reason}") from error
    return Metric(module.name, _compute_of(module, name))


def _compute_of(module: Any, name: str) -> Callable[[np.ndarray, np.ndarray], float]:
    def compute(predictions: np.ndarray, references: np.ndarray) -> float:
        return as_number(module.compute(predictions=predictions, references=references), name)

    return compute


def as_number(value: Any, name: str) -> float:
    """What a metric returned as one number: itself, the only value of a dictionary, or the value under the metric's name."""
    if isinstance(value, Mapping):
        key = next(iter(value)) if len(value) == 1 else Path(name).stem
        if key not in value:
            raise ConfigError(
                f"The metric '{name}' returns {', '.join(map(str, value))}: pass a function that returns one number."
            )
        value = value[key]
    if not np.isscalar(value) and np.size(value) != 1:
        raise ConfigError(f"The metric '{name}' returned {value!r}, not a number.")
    return float(value)
