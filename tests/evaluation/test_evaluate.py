"""Evaluation: values equal a plain loop over single samples, heads are found by name, models of users stay as they were."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import BertConfig, BertForTokenClassification, LlamaForCausalLM, PreTrainedModel

from hf_merge import AutoMergedModel, ConfigError, LinearConfig, Merger, WudiConfig
from hf_merge.evaluation import EvaluationResult, EvaluationTask, Metric, evaluate_merge, read_tasks

from ..methods.helpers_models import SIZE, models
from ..zoo import ZOO, perturbed
from .helpers import Place, build_adapters, rows, tasks


def plain_accuracy(model: PreTrainedModel, samples: list[dict]) -> float:
    """One sample at a time."""
    with torch.no_grad():
        logits = [model(input_ids=torch.tensor([row["input_ids"]])).logits for row in samples]
    return float(np.mean([int(one.argmax()) == row["label"] for one, row in zip(logits, samples, strict=True)]))


def test_values_equal_a_plain_loop(place: Place):
    merger = place.merger(WudiConfig())
    result = evaluate_merge(merger, tasks())
    _, experts = models()
    for name, score in result.tasks.items():
        data = rows(12)[name]
        assert score.value == pytest.approx(plain_accuracy(merger.model_for(name), data))
        assert score.expert == pytest.approx(plain_accuracy(experts[name], data))
        assert score.count == 12
    assert result.mean == pytest.approx(np.mean([score.value for score in result.tasks.values()]))


def test_folder_recipe_and_merger_agree(place: Place, tmp_path: Path):
    merger = place.merger()
    expected = evaluate_merge(merger, tasks()).to_dict()
    assert evaluate_merge(place.merged, tasks()).to_dict() == expected
    recipe = tmp_path / "recipe"
    config = merger.plan.resolved_recipe()
    config.save_pretrained(recipe)
    assert evaluate_merge(recipe, tasks()).to_dict() == expected
    by_task = {name: AutoMergedModel.from_pretrained(place.merged, task=name) for name in ("a", "b")}
    assert evaluate_merge(by_task, tasks(), experts=place.experts).to_dict() == expected


def test_models_of_the_user_stay_as_they_were():
    base, experts = models()
    experts["a"].train()
    before = {key: value.clone() for key, value in experts["a"].state_dict().items()}
    evaluate_merge(Merger.from_pretrained(experts, LinearConfig()), tasks())
    assert experts["a"].training
    assert all(module.training for module in experts["a"].modules())
    assert all(torch.equal(value, before[key]) for key, value in experts["a"].state_dict().items())
    assert not base.training


def test_numbers_may_be_given_for_the_experts(place: Place):
    result = evaluate_merge(place.merged, tasks(), experts={"a": 0.5})
    assert result.tasks["a"].normalized == pytest.approx(result.tasks["a"].value / 0.5)
    assert result.tasks["b"].normalized is None
    assert result.expert_mean is None
    assert evaluate_merge(place.merged, tasks(), experts=False).normalized is None


def test_order_and_size_of_batches_do_not_matter(place: Place):
    values = set()
    for size in (1, 5, 64):
        task = EvaluationTask(rows(12)["b"], metric="macro_f1", batch_size=size)
        values.add(round(evaluate_merge(place.merged, {"b": task}, experts=False).mean, 6))
    assert len(values) == 1


def test_own_function_sees_predictions_in_the_order_of_rows(place: Place):
    seen = []

    def predict(model, inputs):
        return model(**inputs).logits.argmax(-1).tolist()

    def collect(predictions, references):
        seen.append((predictions.tolist(), references.tolist()))
        return 0.0

    data = rows(9)["a"]
    evaluate_merge(
        place.merged, {"a": EvaluationTask(data, metric=collect, predict=predict, batch_size=4)}, experts=False
    )
    model = AutoMergedModel.from_pretrained(place.merged, task="a")
    with torch.no_grad():
        expected = [int(model(input_ids=torch.tensor([row["input_ids"]])).logits.argmax()) for row in data]
    assert seen == [(expected, [row["label"] for row in data])]


def test_language_model_needs_no_labels():
    base = ZOO["llama"].build()
    experts = {"code": perturbed(base, 1), "math": perturbed(base, 2)}
    texts = [{"input_ids": torch.randint(0, 50, (length,)).tolist()} for length in (5, 9, 7)]
    merger = Merger.from_pretrained(experts, LinearConfig())
    result = evaluate_merge(
        merger, {"code": EvaluationTask(texts, metric="loss", batch_size=2), "other": EvaluationTask(texts)}
    )
    model = merger.model
    assert isinstance(model, LlamaForCausalLM)
    losses = []
    with torch.no_grad():
        for row in texts:
            ids = torch.tensor([row["input_ids"]])
            log_p = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
            losses += (-log_p.gather(-1, ids[0, 1:, None])[:, 0]).tolist()
    assert result.tasks["code"].value == pytest.approx(np.mean(losses), rel=1e-4)
    assert result.tasks["code"].count == len(losses) == result.tasks["other"].count
    assert result.tasks["other"].expert is None
    assert result.mean is None  # a loss and an accuracy have no common mean


def test_token_classification_ignores_what_has_no_label():
    data = [{"input_ids": [1, 2, 3], "labels": [-100, 1, 2]}, {"input_ids": [4, 5], "labels": [3, -100]}]
    tagger = BertForTokenClassification(BertConfig(num_labels=4, **SIZE))
    assert evaluate_merge(tagger, {"tags": EvaluationTask(data)}).tasks["tags"].count == 3
    # The labels of a causal language model are shifted: the first token is not predicted.
    assert evaluate_merge(ZOO["llama"].build(), {"tags": EvaluationTask(data)}).tasks["tags"].count == 2


def test_saved_and_loaded_again(place: Place):
    result = evaluate_merge(place.merged, tasks())
    result.save(place.merged)
    assert EvaluationResult.load(place.merged).to_dict() == result.to_dict()
    assert EvaluationResult.load(place.folder) is None
    (place.merged / "evaluation.json").write_text("[]", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"evaluation\.json.*hf-merge eval"):
        EvaluationResult.load(place.merged)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"aa": rows(3)["a"]}, "Did you mean 'a'"),
        ({"a": []}, "empty"),
        ({}, "at least one task"),
        ({"a": [{"input_ids": [1, 2]}]}, "has no label"),
        ({"a": [{"input_ids": [1, 2], "label": 7}]}, "knows 0 to 1"),
        ({"a": [{"input_ids": [1, 2, 3], "labels": [0, 1]}]}, "2 labels for 3 tokens"),
    ],
)
def test_bad_tasks(given, said: str, place: Place):
    with pytest.raises(ConfigError) as error:
        evaluate_merge(place.merged, given, experts=False)
    assert said in str(error.value)


@pytest.mark.parametrize("key", ["batch_size", "max_length", "num_samples"])
@pytest.mark.parametrize("value", [0, 2.5, True])
def test_numbers_of_a_task_are_checked(key: str, value):
    with pytest.raises(ConfigError, match=key):
        EvaluationTask([], **{key: value})


def test_wrong_subject():
    with pytest.raises(ConfigError, match="cannot be evaluated"):
        evaluate_merge(3, tasks())


@pytest.mark.parametrize("ending", ["json", "jsonl", "csv", "parquet", "folder"])
def test_datasets_of_every_kind(ending: str, tmp_path: Path):
    import datasets

    data = [{"text": "good", "label": 1}, {"text": "bad", "label": 0}]
    name = f"data.{ending}" if ending != "folder" else "data"
    dataset = datasets.Dataset.from_list(data)
    if ending == "json":
        (tmp_path / name).write_text(json.dumps(data))
    elif ending == "folder":
        dataset.save_to_disk(tmp_path / name)
    else:
        write = {"jsonl": dataset.to_json, "csv": dataset.to_csv, "parquet": dataset.to_parquet}[ending]
        write(tmp_path / name)
    (tmp_path / "tasks.yaml").write_text(f"mood: {{data: {name}, metric: f1, columns: text, batch_size: 3}}")
    task = read_tasks(tmp_path / "tasks.yaml")["mood"]
    assert task.rows("mood") == data
    assert (task.measure.name, task.batch_size, task.columns) == ("f1", 3, ["text"])


def test_a_metric_may_keep_what_it_needs_of_the_logits(place: Place):
    sizes = []

    def reduce(logits, labels):
        sizes.append(tuple(logits.shape))
        return logits.max(-1).values, labels

    metric = Metric("largest", lambda predictions, references: float(predictions.mean()), reduce)
    result = evaluate_merge(place.merged, {"b": EvaluationTask(rows(6)["b"], metric=metric)}, experts=False)
    assert sizes == [(6, 4)]
    assert result.tasks["b"].metric == "largest"


def test_merged_adapters(tmp_path: Path):
    """A folder with an adapter is measured over its base, and beside the adapters that it was merged from."""
    merged = build_adapters(tmp_path)
    task = {"code": EvaluationTask([{"input_ids": [1, 2, 3, 4, 5]}], metric="loss")}
    result = evaluate_merge(merged, task)
    for folder, value in (("merged", result.tasks["code"].value), ("code", result.tasks["code"].expert)):
        plain = PeftModel.from_pretrained(
            LlamaForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / folder
        ).eval()
        ids = torch.tensor([[1, 2, 3, 4, 5]])
        with torch.no_grad():
            assert value == pytest.approx(float(plain(input_ids=ids, labels=ids).loss), rel=1e-4)
