"""Metrics equal scikit-learn's and the formulas, and every form of a metric is understood."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from hf_merge import ConfigError
from hf_merge.evaluation import METRICS, Metric
from hf_merge.evaluation.metrics import get_metric, reduce_outputs, token_losses


GENERATOR = np.random.default_rng(0)
BINARY = GENERATOR.integers(0, 2, 60), GENERATOR.integers(0, 2, 60)
CLASSES = GENERATOR.integers(0, 5, 60), GENERATOR.integers(1, 6, 60)
VALUES = GENERATOR.normal(size=30), GENERATOR.normal(size=30)


@pytest.mark.parametrize(
    ("name", "reference", "data"),
    [
        ("accuracy", lambda m, p, r: m.accuracy_score(r, p), CLASSES),
        ("f1", lambda m, p, r: m.f1_score(r, p), BINARY),
        ("macro_f1", lambda m, p, r: m.f1_score(r, p, average="macro"), CLASSES),
        ("matthews_correlation", lambda m, p, r: m.matthews_corrcoef(r, p), CLASSES),
        ("mse", lambda m, p, r: m.mean_squared_error(r, p), VALUES),
        ("pearson", lambda m, p, r: np.corrcoef(p, r)[0, 1], VALUES),
    ],
)
def test_equal_to_scikit_learn(name, reference, data):
    sklearn_metrics = pytest.importorskip("sklearn.metrics")
    assert METRICS[name].compute(*data) == pytest.approx(reference(sklearn_metrics, *data))


def test_perplexity_is_that_of_the_distribution():
    logits = torch.randn(3, 4, 7, dtype=torch.float64)
    labels = torch.randint(0, 7, (3, 4))
    labels[0, 2:] = -100
    losses, counted = token_losses(logits, labels)
    chosen = logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0][labels != -100]
    assert len(losses) == len(counted) == 10
    assert METRICS["loss"].compute(losses.numpy(), counted.numpy()) == pytest.approx(-float(chosen.mean()), rel=1e-5)
    assert METRICS["perplexity"].compute(losses.numpy(), counted.numpy()) == pytest.approx(
        math.exp(-float(chosen.mean())), rel=1e-5
    )


def test_outputs_become_classes_values_or_several_labels():
    logits = torch.tensor([[0.1, 2.0], [3.0, -1.0]])
    predictions, references = reduce_outputs(logits, torch.tensor([1, -100]))
    assert predictions.tolist() == [1]
    assert references.tolist() == [1]
    assert reduce_outputs(logits, torch.tensor([[0, 1], [1, 1]]))[0].tolist() == [1, 1, 1, 0]
    assert reduce_outputs(torch.tensor([[0.5], [0.7]]), torch.tensor([0.4, 0.8]))[0].tolist() == pytest.approx(
        [0.5, 0.7]
    )


def test_share_of_a_loss_is_below_one_when_it_is_greater():
    assert METRICS["accuracy"].relative(0.4, 0.8) == 0.5
    assert METRICS["loss"].relative(2.0, 1.0) == 0.5
    assert math.isnan(METRICS["accuracy"].relative(0.4, 0.0))


MODULE = """
import datasets
import evaluate


class Share(evaluate.Metric):
    def _info(self):
        features = datasets.Features({"predictions": datasets.Value("int64"), "references": datasets.Value("int64")})
        return evaluate.MetricInfo(description="", citation="", inputs_description="", features=features)

    def _compute(self, predictions, references):
        return {"share": sum(p == r for p, r in zip(predictions, references)) / len(references)}
"""


def test_local_module_of_evaluate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("evaluate.config.HF_MODULES_CACHE", str(tmp_path / "modules"))
    path = tmp_path / "share.py"
    path.write_text(MODULE, encoding="utf-8")
    metric = get_metric(str(path))
    assert metric.compute(*CLASSES) == pytest.approx(METRICS["accuracy"].compute(*CLASSES))


def test_functions_and_metrics_are_taken_as_they_are():
    def share(predictions, references):
        return float(np.mean(predictions == references))

    assert get_metric(share).name == "share"
    own = Metric("own", share, greater_is_better=False)
    assert get_metric(own) is own


@pytest.mark.parametrize(
    ("metric", "said"), [("acuracy", "Did you mean 'accuracy'?"), ("rouge", "no metric 'rouge'"), (3, "got 3")]
)
def test_unknown_metric(metric, said: str):
    with pytest.raises(ConfigError, match="metric") as error:
        get_metric(metric)
    assert said in str(error.value)


def test_f1_is_for_two_classes():
    with pytest.raises(ConfigError, match="macro_f1"):
        METRICS["f1"].compute(*CLASSES)
