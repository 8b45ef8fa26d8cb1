"""End-to-end distillation and supervised training against literal loops, and their laws."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from torch.func import functional_call

from hf_merge import (
    DirectDistillConfig,
    DirectTrainConfig,
    DistillMergeConfig,
    Merger,
    TaskArithmeticConfig,
)
from hf_merge.errors import ConfigError, UnsupportedModelError

from ..zoo import ZOO, perturbed
from .helpers_models import assert_near, assert_trained_alike, backbone, bert, merger, models, samples, single_batch


def hidden(expert, weights: dict[str, Tensor], batch: dict[str, Tensor]) -> Tensor:
    """The last hidden states of real tokens."""
    inner = {name.removeprefix("bert."): value for name, value in weights.items()}
    return functional_call(expert.bert, inner, kwargs=batch).last_hidden_state[batch["attention_mask"].bool()]


def scale_of(target: Tensor, loss: str) -> Tensor:
    return (target - target.mean(0)).square().sum(1).mean() if loss == "relative" else torch.tensor(1.0)


def distance(output: Tensor, target: Tensor, loss: str) -> Tensor:
    if loss == "cosine":
        return (1 - torch.nn.functional.cosine_similarity(output, target, dim=-1)).sum()
    return (output - target).square().sum() / scale_of(target, loss)


@pytest.mark.parametrize("granularity", ["element", "tensor"])
@pytest.mark.parametrize("loss", ["sse", "relative", "cosine"])
def test_distill_merge_equals_literal_loop(granularity: str, loss: str) -> None:
    data = samples()
    base, experts = models()
    start = backbone(base)
    vectors = {name: torch.stack([backbone(one)[name] - start[name] for one in experts.values()]) for name in start}
    alphas = {}
    for name, vector in vectors.items():
        shape = vector.shape if granularity == "element" else (2, *[1] * (vector.dim() - 1))
        alphas[name] = torch.full(shape, 0.3, dtype=torch.float64, requires_grad=True)

    def weights() -> dict[str, Tensor]:
        return {name: start[name] + (alphas[name] * vectors[name]).sum(0) for name in start}

    batches = {task: single_batch(data[task]) for task in data}
    experts = {task: one.double() for task, one in experts.items()}
    targets = {task: hidden(one, backbone(one), batches[task]).detach() for task, one in experts.items()}
    optimizer = torch.optim.Adam(list(alphas.values()), lr=0.02)
    for _ in range(4):
        optimizer.zero_grad()
        sum(
            distance(hidden(one, weights(), batches[task]), targets[task], loss) for task, one in experts.items()
        ).backward()
        optimizer.step()
    config = DistillMergeConfig(granularity=granularity, loss=loss, epochs=4, learning_rate=0.02)
    # The pooler is behind the hidden states: without a gradient Adam leaves it, and so does the library.
    assert_trained_alike(merger(config).merge(data), weights(), 1e-4)


def test_direct_distill_equals_literal_loop() -> None:
    data = samples()
    base, experts = models()
    start = backbone(base)
    weights = {
        name: (value + 0.3 * sum(backbone(one)[name] - value for one in experts.values())).requires_grad_(True)
        for name, value in start.items()
    }
    batches = {task: single_batch(data[task]) for task in data}
    experts = {task: one.double() for task, one in experts.items()}
    optimizer = torch.optim.Adam(list(weights.values()), lr=1e-3)
    for _ in range(4):
        optimizer.zero_grad()
        for task, one in experts.items():
            target = hidden(one, backbone(one), batches[task]).detach()
            distance(hidden(one, weights, batches[task]), target, "relative").backward()
        optimizer.step()
    merged = merger(DirectDistillConfig(epochs=4, learning_rate=1e-3)).merge(data)
    assert_trained_alike(merged, {name: value.detach() for name, value in weights.items()}, 2e-4)


def test_direct_train_equals_literal_loop() -> None:
    data = samples(labels=True)
    base, experts = models()
    start = backbone(base)
    weights = {
        name: (value + 0.3 * sum(backbone(one)[name] - value for one in experts.values())).requires_grad_(True)
        for name, value in start.items()
    }
    optimizer = torch.optim.Adam(list(weights.values()), lr=1e-3)
    labels = {task: torch.tensor([row["labels"] for row in rows]) for task, rows in data.items()}
    for _ in range(4):
        optimizer.zero_grad()
        for task, expert in experts.items():
            logits = functional_call(expert.double(), weights, kwargs=single_batch(data[task])).logits
            torch.nn.functional.cross_entropy(logits, labels[task]).backward()
        optimizer.step()
    merged = merger(DirectTrainConfig(epochs=4, learning_rate=1e-3)).merge(data)
    assert_trained_alike(merged, {name: value.detach() for name, value in weights.items()}, 2e-4)


@pytest.mark.parametrize("config_cls", [DistillMergeConfig, DirectDistillConfig, DirectTrainConfig])
def test_loss_falls_and_seeds_decide(config_cls) -> None:
    def merged(seed: int):
        made = merger(config_cls(epochs=4, batch_size=2, learning_rate=3e-3, seed=seed))
        return made.merge(samples(labels=True)), made.report.blocks["model"]

    (first, report), (again, _), (other, _) = merged(0), merged(0), merged(1)
    assert report["last_loss"] < report["first_loss"]
    name = "bert.encoder.layer.1.output.dense.weight"
    weights = [model.get_parameter(name) for model in (first, again, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_identical_experts_stay_what_they_are() -> None:
    base, experts = models()
    twins = {"a": experts["a"], "b": copy.deepcopy(experts["a"])}
    config = DistillMergeConfig(init="linear", epochs=2, loss="sse")
    merged = Merger.from_pretrained(twins, config, base_model=base).merge(samples())
    assert_near(merged, backbone(experts["a"]), 1e-3)


def test_direct_distill_needs_no_base() -> None:
    _, experts = models()
    merged = Merger.from_pretrained(experts, DirectDistillConfig(init="linear", epochs=1)).merge(samples())
    assert all(torch.isfinite(value).all() for value in merged.state_dict().values())


def test_heads_and_models_given_are_left_as_they_are() -> None:
    base, experts = models()
    before = {name: copy.deepcopy(one.state_dict()) for name, one in experts.items()}
    made = Merger.from_pretrained(experts, DirectTrainConfig(epochs=1, learning_rate=0.01), base_model=base)
    made.merge(samples(labels=True))
    for name, expert in experts.items():
        assert all(torch.equal(value, before[name][key]) for key, value in expert.state_dict().items())
        assert all(parameter.grad is None for parameter in expert.parameters())
        assert torch.equal(made.model_for(name).classifier.weight, expert.classifier.weight)


def test_excluded_parameters_keep_the_value_of_the_base() -> None:
    config = DirectTrainConfig(epochs=1, learning_rate=0.01, exclude=["embeddings"])
    merged = merger(config).merge(samples(labels=True))
    base = backbone(models()[0])
    for name, value in backbone(merged).items():
        assert torch.equal(value, base[name]) == ("embeddings" in name), name


def test_recipes_that_follow_are_applied() -> None:
    config = DirectTrainConfig(epochs=1, learning_rate=0.01, then=[{"merge_type": "wise_ft", "alpha": 0.0}])
    assert_near(merger(config).merge(samples(labels=True)), backbone(models()[0]), 1e-6)


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (None, "Sample 1 of 'b' has no label: this method trains on labels"),
        (4, "Sample 1 of 'b' has the label 4; its expert knows 0 to 3"),
        (-1, "Sample 1 of 'b' has the label -1; its expert knows 0 to 3"),
        ("LABEL_9", "Sample 1 of 'b' has the label 'LABEL_9', which its expert does not know. Did you mean 'LABEL_"),
    ],
)
def test_labels_are_checked_before_anything_is_read(label, message: str, monkeypatch) -> None:
    data = samples(labels=True)
    data["b"][1]["labels"] = label
    if label is None:
        del data["b"][1]["labels"]
    made = merger(DirectTrainConfig())
    monkeypatch.setattr(type(made.experts[0]), "read", lambda *_: pytest.fail("a weight was read"))
    with pytest.raises(ConfigError) as caught:
        made.merge(data)
    assert message in str(caught.value)


def test_labels_by_name() -> None:
    data = samples(labels=True)
    named = {task: [row | {"labels": f"LABEL_{row['labels']}"} for row in rows] for task, rows in data.items()}
    results = [merger(DirectTrainConfig(epochs=1)).merge(one) for one in (data, named)]
    assert_near(results[0], backbone(results[1]), 0.0)


def test_labels_of_tokens_are_padded_with_what_is_ignored() -> None:
    from hf_merge.data.calibration import TaskSamples

    config = bert(3, 0).config
    rows = [{"input_ids": torch.tensor([1, 2, 3])}, {"input_ids": torch.tensor([1])}]
    task_samples = TaskSamples([rows], {"a": [[0, 1, -100], [2]]}, [{"input_ids": 0}])
    batch = task_samples.labelled([config]).batches(2)[0][0]
    assert batch.inputs["labels"].tolist() == [[2, -100, -100], [0, 1, -100]]


def test_models_without_hidden_states_are_refused() -> None:
    base = ZOO["clip"].build()
    experts = {"a": perturbed(base, 1), "b": perturbed(base, 2)}
    rows = {
        "input_ids": torch.arange(1, 5),
        "pixel_values": torch.zeros(3, 16, 16),
        "attention_mask": torch.ones(4).long(),
    }
    made = Merger.from_pretrained(experts, DistillMergeConfig(epochs=1), base_model=base)
    with pytest.raises(UnsupportedModelError, match="CLIPModel returns no hidden states"):
        made.merge({"a": [rows], "b": [rows]})


@pytest.mark.parametrize("family", ["vit", "resnet", "gpt2", "t5", "mixtral", "llama", "clip-vision"])
def test_families(family: str) -> None:
    entry = ZOO[family]
    base = entry.build()
    experts = {"a": perturbed(base, 1), "b": perturbed(base, 2)}
    inputs = entry.inputs()
    rows = [{key: value[index] for key, value in inputs.items()} for index in range(2)]
    made = Merger.from_pretrained(experts, DistillMergeConfig(epochs=3), base_model=base)
    made.merge({"a": rows, "b": rows})
    report = made.report.blocks["model"]
    assert report["last_loss"] < report["first_loss"]


def test_starts_from_task_arithmetic() -> None:
    merged = merger(DirectTrainConfig(epochs=1, learning_rate=1e-9)).merge(samples(labels=True))
    assert_near(merged, backbone(merger(TaskArithmeticConfig(scaling=0.3)).merge()), 1e-6)
