"""Fisher merging against a plain loop over samples and classes, and its laws."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from hf_merge import FisherConfig, Merger
from hf_merge.errors import ConfigError, UnsupportedModelError
from hf_merge.methods.fisher.method import diagonal_fisher, draw, root_mean_square

from ..zoo import ZOO, perturbed
from .helpers_models import assert_near, backbone, merger, models, probe, samples


def plain_fisher(model, rows) -> dict[str, torch.Tensor]:
    """Σ_x Σ_y p(y | x) (∂ log p(y | x) / ∂θ)² / |D|, sample by sample, class by class, in float64."""
    model = copy.deepcopy(model).double()
    weights = {name: value for name, value in model.named_parameters() if not name.startswith("classifier")}
    total = {name: torch.zeros_like(value) for name, value in weights.items()}
    for row in rows:
        for label in range(model.config.num_labels):
            logarithms = model(input_ids=row["input_ids"][None]).logits.log_softmax(-1)[0]
            gradients = torch.autograd.grad(logarithms[label], list(weights.values()), allow_unused=True)
            for name, gradient in zip(weights, gradients, strict=True):
                if gradient is not None:
                    total[name] += logarithms[label].exp().detach() * gradient**2 / len(rows)
    return total


@pytest.mark.parametrize("normalize", [True, False])
def test_equals_plain_loop(normalize: bool) -> None:
    data = samples()
    _, experts = models()
    fishers = {name: plain_fisher(expert, data[name]) for name, expert in experts.items()}
    expected = {}
    for name in fishers["a"]:
        weights = []
        for task, fisher in fishers.items():
            entries = torch.cat([value.flatten() for value in fisher.values()])
            scale = entries.square().mean().sqrt() if normalize else 1.0
            weights.append(fisher[name] / scale + 1e-6)
            assert task in data
        values = [backbone(expert)[name] for expert in experts.values()]
        expected[name] = sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights)
    assert_near(merger(FisherConfig(normalize=normalize)).merge(data), expected, 2e-5)


def test_is_the_mean_of_single_samples() -> None:
    """Which the square of a batch gradient is not."""
    data, found = samples(2), []
    for rows in (data["a"], data["a"][:1], data["a"][1:]):
        probe(FisherConfig(), data | {"a": rows}, lambda group: found.append(diagonal_fisher(group, 0)))
    both, first, second = found
    for name, value in both.items():
        torch.testing.assert_close(value, (first[name] + second[name]) / 2, rtol=1e-4, atol=1e-9)


def test_order_and_batches_do_not_matter() -> None:
    data = samples()
    first = merger(FisherConfig()).merge(data)
    backwards = {task: rows[::-1] for task, rows in data.items()}
    assert_near(merger(FisherConfig(batch_size=2)).merge(backwards), backbone(first), 1e-5)


def test_weight_zero_leaves_an_expert_out() -> None:
    _, experts = models()
    merged = merger(FisherConfig(weights={"a": 1.0, "b": 0.0})).merge(samples())
    assert_near(merged, backbone(experts["a"]), 1e-6)


def test_drawn_labels_approach_the_sum() -> None:
    data, found = samples(2), {}
    for draws in (None, 100):
        probe(FisherConfig(draws=draws), data, lambda group, d=draws: found.update({d: diagonal_fisher(group, 1)}))
    exact, drawn = found[None], found[100]
    name = "bert.encoder.layer.1.output.dense.weight"
    assert root_mean_square([drawn[name] - exact[name]]) < 0.3 * root_mean_square([exact[name]])


def test_same_seed_same_bits() -> None:
    def merged(seed: int) -> torch.Tensor:
        return merger(FisherConfig(draws=1, seed=seed)).merge(samples()).bert.pooler.dense.weight

    assert torch.equal(merged(0), merged(0))
    assert not torch.equal(merged(0), merged(1))


def test_draw_follows_the_probabilities() -> None:
    probabilities = torch.tensor([[0.0, 1.0, 0.0], [0.5, 0.0, 0.5]]).repeat(4000, 1)
    labels = draw(probabilities, np.random.default_rng(0)).view(-1, 2)
    assert (labels[:, 0] == 1).all()
    assert not (labels[:, 1] == 1).any()
    assert abs(float((labels[:, 1] == 0).float().mean()) - 0.5) < 0.05


def test_tied_embeddings_have_one_fisher() -> None:
    """The gradient of a tied weight has both parts: through the embeddings and through the output."""
    entry = ZOO["llama"]
    config = entry.config()
    config.tie_word_embeddings = True
    with torch.random.fork_rng():
        torch.manual_seed(0)
        base = type(entry.build())(config).eval()
    experts = {"a": perturbed(base, 1), "b": perturbed(base, 2)}
    data = {task: [{"input_ids": torch.tensor([5, 6, 7])}] for task in experts}

    def look(group) -> None:
        with group.models.expert(0) as expert:
            assert expert.lm_head.weight is expert.model.embed_tokens.weight
        assert group.model.lm_head.weight is group.model.model.embed_tokens.weight
        fisher = diagonal_fisher(group, 0)["model.embed_tokens.weight"]
        assert (fisher[20] > 0).any()  # a token that no input has

    probe(FisherConfig(), data, look, Merger.from_pretrained(experts, FisherConfig(), base_model=base))


def test_models_without_predictions_are_refused() -> None:
    entry = ZOO["bert-qa"]
    base = entry.build()
    made = Merger.from_pretrained({"a": perturbed(base, 1), "b": perturbed(base, 2)}, FisherConfig(), base_model=base)
    data = {task: [{"input_ids": torch.tensor([5, 6, 7])}] for task in "ab"}
    with pytest.raises(UnsupportedModelError, match="BertForQuestionAnswering gives no logits over classes.*regmean"):
        made.merge(data)


def test_settings_are_checked() -> None:
    with pytest.raises(ConfigError, match="epsilon"):
        FisherConfig(epsilon=0.0)
    with pytest.raises(ConfigError, match="draws"):
        FisherConfig(draws=0)
    with pytest.raises(ConfigError, match="needs data itself"):
        FisherConfig(init="regmean")
