"""Heads fitted to the merged model's features, against ridge regression in float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BertForTokenClassification,
    PreTrainedModel,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from hf_merge import (
    AutoMergedModelForSequenceClassification,
    DirectDistillConfig,
    LinearConfig,
    Merger,
    PlanError,
    ProDistillArguments,
    ProDistillConfig,
    RegMeanConfig,
)
from hf_merge.data.calibration import CalibrationData
from hf_merge.engines.head_fitting import LayerMoments

from ..methods.helpers_models import SIZE, bert, merger, models, samples, single_batch
from ..zoo import ZOO, perturbed


PRIOR = 3.0
CONFIGS = [
    RegMeanConfig(fit_heads=True, head_prior=PRIOR, batch_size=4),
    ProDistillConfig(epochs=2, fit_heads=True, head_prior=PRIOR, batch_size=4),
    DirectDistillConfig(epochs=2, fit_heads=True, head_prior=PRIOR, batch_size=4),
]


def features(model: PreTrainedModel, layer: str, inputs: dict[str, Tensor]) -> Tensor:
    """What a layer reads, float64."""
    seen: list[Tensor] = []
    hook = model.get_submodule(layer).register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        model(**inputs)
    hook.remove()
    return seen[0].double()


def ridge(rows: Tensor, wanted: Tensor, head: nn.Linear, prior: float) -> tuple[Tensor, Tensor]:
    """The weight and bias that give `wanted` from `rows`, both (samples, ...), pulled towards the head's own."""
    weight, bias = head.weight.detach().double(), head.bias.detach().double()
    errors = wanted - rows @ weight.mT - bias
    centred = rows - rows.mean(0)
    system = centred.mT @ centred + prior * centred.square().mean() * torch.eye(rows.shape[1], dtype=rows.dtype)
    change = (errors - errors.mean(0)).mT @ centred @ torch.linalg.inv(system)
    return weight + change, bias + errors.mean(0) - change @ rows.mean(0)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.merge_type)
def test_a_fitted_head_is_ridge_regression(config):
    data, (_, experts) = samples(), models()
    merging = merger(config)
    merging.merge(data)
    for task, expert in experts.items():
        inputs = single_batch(data[task])
        found = merging.model_for(task)
        with torch.no_grad():
            wanted = expert(**inputs).logits.double()
        weight, bias = ridge(features(found, "classifier", inputs), wanted, expert.classifier, PRIOR)
        torch.testing.assert_close(found.classifier.weight.double(), weight, rtol=0, atol=1e-4)
        torch.testing.assert_close(found.classifier.bias.double(), bias, rtol=0, atol=1e-4)
        assert merging.report.heads[task] == {"fitted": ["classifier"], "samples": 6}


def test_the_backbone_is_that_of_a_merge_without():
    data = samples()
    plain, fitted = (merger(RegMeanConfig(fit_heads=fit)).merge(data).state_dict() for fit in (False, True))
    for name, tensor in plain.items():
        assert torch.equal(tensor, fitted[name]) == (not name.startswith("classifier")), name


def test_a_strong_prior_keeps_the_slope_and_none_fits_the_samples():
    data, (_, experts) = samples(), models()
    strong, weak = (merger(RegMeanConfig(fit_heads=True, head_prior=prior)) for prior in (1e9, 0.0))
    strong.merge(data), weak.merge(data)
    for task, expert in experts.items():
        weight = strong.model_for(task).classifier.weight
        torch.testing.assert_close(weight, expert.classifier.weight, rtol=0, atol=1e-5)
        inputs = single_batch(data[task])
        torch.testing.assert_close(weak.model_for(task)(**inputs).logits, expert(**inputs).logits, rtol=0, atol=1e-3)


def test_heads_stay_as_they_are_where_the_features_are_the_experts():
    base, _ = models()
    experts = {"a": bert(2, 1), "b": bert(4, 2)}
    for expert in experts.values():
        expert.bert.load_state_dict(base.bert.state_dict())
    merging = Merger.from_pretrained(experts, RegMeanConfig(fit_heads=True))
    merging.merge(samples())
    for task, expert in experts.items():
        found = merging.model_for(task).classifier
        torch.testing.assert_close(found.weight, expert.classifier.weight, rtol=0, atol=1e-5)
        torch.testing.assert_close(found.bias, expert.classifier.bias, rtol=0, atol=1e-5)


def test_saved_heads_are_the_fitted_ones(tmp_path: Path):
    data, merging = samples(), merger(CONFIGS[0])
    merging.merge(data)
    merger(CONFIGS[0]).save_pretrained(tmp_path / "out", data=data)
    for task in data:
        loaded = AutoMergedModelForSequenceClassification.from_pretrained(tmp_path / "out", task=task)
        torch.testing.assert_close(loaded.state_dict(), merging.model_for(task).state_dict(), rtol=0, atol=0)
    assert torch.equal(merging.model.classifier.weight, merging.model_for("a").classifier.weight)


def test_caches_do_not_change_the_heads():
    data = samples()
    plain, on_disk = merger(CONFIGS[0]), merger(CONFIGS[0])
    plain.merge(data)
    on_disk.merge(data, args=ProDistillArguments(activation_cache="disk"))
    for task in data:
        assert torch.equal(plain.model_for(task).classifier.weight, on_disk.model_for(task).classifier.weight)


def test_only_the_layer_that_reads_the_features_is_changed():
    """RoBERTa's head has two: the second one reads what the first one makes, which is the expert's already."""
    config = RobertaConfig(**{**SIZE, "max_position_embeddings": 20})
    experts = {}
    for seed, (task, classes) in enumerate({"a": 2, "b": 3}.items(), start=1):
        config.num_labels = classes
        base = RobertaForSequenceClassification(config).eval()
        if experts:
            base.roberta.load_state_dict(experts["a"].roberta.state_dict())
        experts[task] = perturbed(base, seed, 0.1)
    merging = Merger.from_pretrained(experts, RegMeanConfig(fit_heads=True))
    merging.merge(samples())
    for task, expert in experts.items():
        found = merging.model_for(task).classifier
        assert not torch.allclose(found.dense.weight, expert.classifier.dense.weight, atol=1e-4)
        torch.testing.assert_close(found.out_proj.weight, expert.classifier.out_proj.weight, rtol=0, atol=1e-5)


def test_padding_is_left_out():
    """A head on every token: samples of one batch, padded, give what single samples give."""
    base = BertForTokenClassification(ZOO["bert"].config()).eval()
    experts = {task: perturbed(base, seed, 0.1) for seed, task in enumerate("ab", start=1)}
    heads = []
    for batch_size in (1, 6):
        config = RegMeanConfig(fit_heads=True, heads="per_task", batch_size=batch_size)
        merging = Merger.from_pretrained(experts, config)
        merging.merge(samples())
        heads.append(merging.model_for("b").classifier.weight)
    torch.testing.assert_close(heads[0], heads[1], rtol=0, atol=1e-5)


def test_moments_of_constant_rows_change_the_bias_only():
    layer = nn.Linear(3, 2)
    moments = LayerMoments.zeros(layer, torch.float64)
    moments.add(torch.ones(4, 3), torch.tensor([[1.0, 2.0]]).expand(4, 2))
    change, shift = moments.solve(1.0, has_bias=True)
    assert not change.any()
    torch.testing.assert_close(shift, torch.tensor([1.0, 2.0], dtype=torch.float64))


def test_models_without_heads_of_their_own_are_refused():
    base = ZOO["llama"].build()
    experts = {task: perturbed(base, seed) for seed, task in enumerate("ab", start=1)}
    merging = Merger.from_pretrained(experts, RegMeanConfig(fit_heads=True))
    with pytest.raises(PlanError, match="fit_heads=True fits heads that are kept per task"):
        merging.merge(CalibrationData(samples()))
    assert not hasattr(LinearConfig(), "fit_heads")


# -- poolers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [RegMeanConfig, ProDistillConfig, DirectDistillConfig])
def test_a_fitted_pooler_is_ridge_regression_over_all_tasks(method):
    data, (_, experts) = samples(), models()
    common = {"batch_size": 4} if method is RegMeanConfig else {"batch_size": 4, "epochs": 2}
    plain = merger(method(fit_poolers=False, **common)).merge(data)
    merging = merger(method(fit_poolers=True, fit_heads=True, head_prior=PRIOR, **common))
    fitted = merging.merge(data)
    rows, wanted = [], []
    for task, expert in experts.items():
        inputs = single_batch(data[task])
        rows.append(features(plain, "bert.pooler.dense", inputs))
        pooler = expert.bert.pooler.dense
        wanted.append(features(expert, "bert.pooler.dense", inputs) @ pooler.weight.double().mT + pooler.bias.double())
    weight, bias = ridge(torch.cat(rows), torch.cat(wanted).detach(), plain.bert.pooler.dense, PRIOR * len(experts))
    torch.testing.assert_close(fitted.bert.pooler.dense.weight.double(), weight, rtol=0, atol=1e-4)
    torch.testing.assert_close(fitted.bert.pooler.dense.bias.double(), bias, rtol=0, atol=1e-4)
    for task, expert in experts.items():
        inputs = single_batch(data[task])
        found = merging.model_for(task)
        assert torch.equal(found.bert.pooler.dense.weight, fitted.bert.pooler.dense.weight)
        with torch.no_grad():
            logits = expert(**inputs).logits.double()
        weight, _ = ridge(features(found, "classifier", inputs), logits, expert.classifier, PRIOR)
        torch.testing.assert_close(found.classifier.weight.double(), weight, rtol=0, atol=1e-4)


def test_poolers_that_a_recipe_leaves_out_are_not_fitted():
    data = samples()
    out = merger(RegMeanConfig(exclude=["pooler"])).merge(data)
    plain = merger(RegMeanConfig(fit_poolers=False, exclude=["pooler"])).merge(data)
    assert torch.equal(out.bert.pooler.dense.weight, plain.bert.pooler.dense.weight)
