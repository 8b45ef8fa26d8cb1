"""AdaMerging against a literal loop whose gradients come from autograd through a functional call, and its laws."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.func import functional_call

from hf_merge import AdaMergingConfig, AdaMergingPlusPlusConfig, Merger, TaskArithmeticConfig, TiesConfig
from hf_merge.errors import ConfigError, UnsupportedModelError
from hf_merge.methods.adamerging.method import AdaMergingPlusPlus
from hf_merge.methods.prodistill.coefficients import Coefficients

from .helpers_models import SIZE, assert_near, backbone, merger, models, probe, samples, single_batch


def entropy(logits: Tensor) -> Tensor:
    probabilities = logits.softmax(-1)
    return -(probabilities * probabilities.log()).sum(-1).mean()


def literal(data, coefficients: dict[str, Tensor], clamped: bool, epochs: int, rate: float) -> dict[str, Tensor]:
    """θ(λ) after the authors' loop: λ (2,) by parameter, possibly one tensor for all."""
    base, experts = models()
    start = backbone(base)
    vectors = {name: [backbone(one)[name] - start[name] for one in experts.values()] for name in start}
    unique = list({id(value): value for value in coefficients.values()}.values())
    optimizer = torch.optim.Adam(unique, lr=rate)

    def weights() -> dict[str, Tensor]:
        return {name: start[name] + sum(c * v for c, v in zip(coefficients[name], vectors[name])) for name in start}

    for _ in range(epochs):
        optimizer.zero_grad()
        loss = 0.0
        for task, expert in experts.items():
            loss = loss + entropy(functional_call(expert.double(), weights(), kwargs=single_batch(data[task])).logits)
        loss.backward()
        optimizer.step()
        for value in unique if clamped else ():
            value.data.clamp_(0, 1)
    return {name: value.detach() for name, value in weights().items()}


def start_of(granularity: str, value: float = 0.3) -> dict[str, Tensor]:
    one = torch.full((2,), value, dtype=torch.float64, requires_grad=True)
    names = backbone(models()[0])
    if granularity == "task":
        return dict.fromkeys(names, one)
    return {name: torch.full((2,), value, dtype=torch.float64, requires_grad=True) for name in names}


@pytest.mark.parametrize("granularity", ["tensor", "task"])
@pytest.mark.parametrize("clamped", [True, False])
def test_equals_literal_loop(granularity: str, clamped: bool) -> None:
    data, coefficients = samples(), start_of(granularity)
    settings = {"granularity": granularity, "clamp": clamped, "epochs": 8, "learning_rate": 0.05}
    made = merger(AdaMergingConfig(**settings))
    merged = made.merge(data)
    assert_near(merged, literal(data, coefficients, clamped, 8, 0.05), 1e-4)
    name = "bert.encoder.layer.0.output.dense.weight"
    found = [made.report.parameters[name][f"coefficient.{expert}"] for expert in "ab"]
    assert found == pytest.approx(coefficients[name].tolist(), abs=1e-3)
    assert clamped is False or all(-1e-6 <= value <= 1 + 1e-6 for value in found)


@pytest.mark.parametrize("granularity", ["tensor", "task"])
def test_gradient_equals_autograd(granularity: str) -> None:
    data, coefficients = samples(), start_of(granularity)
    base, experts = models()
    start = backbone(base)
    weights = {
        name: start[name]
        + sum(c * (backbone(one)[name] - start[name]) for c, one in zip(coefficients[name], experts.values()))
        for name in start
    }
    for task, expert in experts.items():
        entropy(functional_call(expert.double(), weights, kwargs=single_batch(data[task])).logits).backward(
            retain_graph=True
        )

    def look(group) -> None:
        trained = Coefficients(group.model, group.parameters, granularity)
        for task in range(2):
            inputs = group.models.inputs(task, 0)
            entropy(group.models.student(task)(**inputs.arguments).logits).backward()
        trained.collect_gradients()
        for one in trained._trained:
            expected = coefficients[one.name].grad
            torch.testing.assert_close(one.delta.grad.double(), expected, rtol=1e-3, atol=1e-6)

    probe(AdaMergingConfig(granularity=granularity), data, look)


def test_students_share_the_merged_weights() -> None:
    def look(group) -> None:
        for name, weight in group.weights().items():
            assert all(group.models.student(task).get_parameter(name) is weight for task in range(2))
        heads = [group.models.student(task).classifier.weight for task in range(2)]
        assert [head.shape[0] for head in heads] == [2, 4]
        assert not any(head.requires_grad for head in heads)

    probe(AdaMergingConfig(), samples(), look)


def test_starts_from_task_arithmetic() -> None:
    merged = merger(AdaMergingConfig(epochs=1, learning_rate=1e-9)).merge(samples())
    assert_near(merged, backbone(merger(TaskArithmeticConfig(scaling=0.3)).merge()), 1e-6)


def test_entropy_falls_and_seeds_decide() -> None:
    def merged(seed: int):
        made = merger(AdaMergingConfig(epochs=5, batch_size=2, learning_rate=0.02, seed=seed), scale=0.2)
        return made.merge(samples()), made.report.blocks["model"]

    (first, report), (again, _), (other, _) = merged(0), merged(0), merged(1)
    assert report["last_loss"] < report["first_loss"]
    weights = [model.bert.pooler.dense.weight for model in (first, again, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_plus_plus_starts_from_the_sum_of_ties() -> None:
    merged = merger(AdaMergingPlusPlusConfig(epochs=1, learning_rate=1e-9)).merge(samples())
    ties = merger(TiesConfig(density=0.2, scaling=0.3, merge="sum", scope="model")).merge()
    assert_near(merged, backbone(ties), 1e-6)


def test_plus_plus_directions() -> None:
    """Trimmed over the model, then only entries with the elected sign."""
    base, experts = models()
    start = backbone(base, torch.float32)
    flat = torch.stack(
        [
            torch.cat([(backbone(one, torch.float32)[name] - start[name]).flatten() for name in start])
            for one in experts.values()
        ]
    )
    kept = int(0.2 * flat.shape[1])
    trimmed = torch.where(flat.abs() >= flat.abs().topk(kept, 1).values[:, -1:], flat, 0)
    sign = trimmed.sum(0).sign()
    expected = torch.where(trimmed.sign() == sign, trimmed, 0)

    def look(group) -> None:
        directions = AdaMergingPlusPlus().directions(group)
        found = torch.stack(
            [torch.cat([directions[name].task_vector(index).flatten() for name in start]) for index in range(2)]
        )
        torch.testing.assert_close(found, expected)

    probe(AdaMergingPlusPlusConfig(), samples(), look)


def test_plus_plus_accepts_ties_only() -> None:
    assert AdaMergingPlusPlusConfig(init={"merge_type": "ties", "scope": "tensor"}).initial_config().scope == "tensor"
    for init in ("task_arithmetic", {"merge_type": "ties", "scaling": 1.0}):
        with pytest.raises(ConfigError, match="must be 'ties'"):
            AdaMergingPlusPlusConfig(init=init)


@pytest.mark.parametrize("problem", ["regression", "multi_label_classification"])
def test_what_is_no_distribution_is_refused(problem: str) -> None:
    base, experts = models()
    for expert in experts.values():
        expert.config.problem_type = problem
    made = Merger.from_pretrained(experts, AdaMergingConfig(), base_model=base)
    with pytest.raises(UnsupportedModelError, match=f"no distribution over classes.*{problem}"):
        made.merge(samples())


def test_a_backbone_without_head_is_refused() -> None:
    base, experts = models()
    made = Merger.from_pretrained(
        {name: one.bert for name, one in experts.items()}, AdaMergingConfig(), base_model=base.bert
    )
    with pytest.raises(UnsupportedModelError, match="BertModel gives no logits over classes"):
        made.merge(samples())


def test_padding_does_not_count_for_tokens() -> None:
    """Predictions for every token: their mean over real ones, however samples are padded."""
    from transformers import BertConfig, BertForTokenClassification

    base, experts = models()
    tagger = BertForTokenClassification(BertConfig(num_labels=3, **SIZE)).eval()
    experts = {}
    for name, one in models()[1].items():
        experts[name] = BertForTokenClassification(BertConfig(num_labels=3, **SIZE)).eval()
        experts[name].bert.load_state_dict(one.bert.state_dict(), strict=False)
    tagger.bert.load_state_dict(base.bert.state_dict(), strict=False)
    data = {task: [{"input_ids": row["input_ids"]} for row in rows] for task, rows in samples().items()}

    def look(group) -> None:
        from hf_merge.methods.model_outputs import run_logits

        inputs = group.models.inputs(0, 0)
        rows = inputs.masked(run_logits(group.models, group.models.student(0), inputs))
        assert rows.shape == (sum(len(row["input_ids"]) for row in data["a"]), 3)

    config = AdaMergingConfig(heads="per_task")
    probe(config, data, look, Merger.from_pretrained(experts, config, base_model=tagger))
