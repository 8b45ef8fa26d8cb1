"""Twin-Merging: the parts of tasks, the router, mixing for each sample against weights that are formed, files, and refusals."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from hf_merge import (
    AutoMergedModel,
    AutoMergedModelForSequenceClassification,
    CheckpointError,
    ConfigError,
    Merger,
    PlanError,
    RegMeanConfig,
    TaskArithmeticConfig,
    TwinConfig,
    UnsupportedModelError,
)
from hf_merge.engines.twin_parts import TwinParts, pooled_features
from hf_merge.methods.after_base import RoutingGroup, TaskRouter
from hf_merge.methods.twin import Twin
from hf_merge.modeling.exclusive import LayerParts, dense

from ..testing_utils import load_clean
from ..zoo import ZOO, perturbed
from .helpers_models import merger, models, samples, single_batch


CONFIG = TwinConfig(rank=3, epochs=5)


def clusters(rows: int = 12, width: int = 5, tasks: int = 3, **settings) -> RoutingGroup:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(rows) % tasks
    centres = 4 * torch.randn(tasks, width, generator=generator)
    features = centres[labels] + torch.randn(rows, width, generator=generator)
    return RoutingGroup(
        features=features, tasks=labels, count=tasks, settings=TwinConfig(router_width=7, batch_size=5, **settings)
    )


# -- the formulas -----------------------------------------------------------------------------------------------------


def test_parts_are_the_best_of_their_rank() -> None:
    part = torch.randn(9, 6, generator=torch.Generator().manual_seed(0))
    left, values, right = torch.linalg.svd(part.double(), full_matrices=False)
    for rank in (1, 3, 6, 50):
        expected = left[:, :rank] * values[:rank] @ right[:rank]
        factors = Twin().compress(part, TwinConfig(rank=rank))
        assert factors.rank == min(rank, 6)
        torch.testing.assert_close(factors.dense().double(), expected, rtol=0, atol=1e-5)


def test_router_equals_literal_loop() -> None:
    group, draws = clusters(epochs=6, learning_rate=0.01), clusters()
    router = Twin().router(group)
    features = draws.features.double()
    features = (features - features.mean(0)) / features.std(0, correction=0)
    model = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3)).double()
    start, order = draws.random("start"), draws.random("order")
    for layer in (model[0], model[2]):
        bound = 1 / math.sqrt(layer.in_features)
        for parameter in (layer.weight, layer.bias):
            parameter.data.copy_(torch.from_numpy(start.uniform(-bound, bound, tuple(parameter.shape))))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(6):
        rows = torch.from_numpy(order.permutation(12))
        for batch in (rows[:5], rows[5:10], rows[10:]):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(features[batch]), draws.tasks[batch]).backward()
            optimizer.step()
    torch.testing.assert_close(router(draws.features).double(), model(features).softmax(-1), rtol=0, atol=1e-4)


def test_router_tells_tasks_apart() -> None:
    group = clusters(rows=60, epochs=80)
    router = Twin().router(group)
    weights = router(group.features)
    torch.testing.assert_close(weights.sum(-1), torch.ones(60))
    assert group.report["accuracy"] == 1.0 and group.report["last_loss"] < 0.2 < group.report["first_loss"]
    assert not any(parameter.requires_grad for parameter in router.parameters())


def test_all_ranks_give_the_experts_back() -> None:
    data, (_, experts) = samples(), models()
    made = merger(TwinConfig(rank=16, epochs=1))
    made.merge(data)
    for task, expert in experts.items():
        inputs = single_batch(data[task])
        torch.testing.assert_close(made.model_for(task)(**inputs).logits, expert(**inputs).logits, rtol=0, atol=1e-5)


def test_kept_energy_is_reported() -> None:
    made = merger(CONFIG)
    made.merge(samples())
    base, experts = models()
    name = "bert.encoder.layer.0.output.dense.weight"
    shared = base.state_dict()[name] + 0.3 * sum(
        e.state_dict()[name] - base.state_dict()[name] for e in experts.values()
    )
    values = torch.linalg.svdvals((experts["b"].state_dict()[name] - shared).double()).square()
    assert made.report.parameters[name]["kept.b"] == pytest.approx(float(values[:3].sum() / values.sum()), abs=1e-4)


# -- mixing for each sample -------------------------------------------------------------------------------------------


class Fixed(nn.Module):
    """A router that answers what it was told."""

    def __init__(self, weights: Tensor):
        super().__init__()
        self.weights = weights

    def forward(self, features: Tensor) -> Tensor:
        assert features.shape[0] == self.weights.shape[0]
        return self.weights


FAMILIES = ["bert", "roberta", "distilbert", "modernbert", "vit", "swin", "resnet", "gpt2", "llama", "opt", "mixtral"]


def twin_of(family: str, folder: Path) -> tuple[Path, dict[str, Tensor]]:
    entry = ZOO[family]
    base, inputs = entry.build(), entry.inputs()
    experts = {task: perturbed(base, seed, 0.1) for seed, task in enumerate("abc", start=1)}
    made = Merger.from_pretrained(experts, TwinConfig(init="linear", rank=4, epochs=1))
    made.save_pretrained(folder, data=dict.fromkeys(experts, inputs))
    return folder, inputs


@pytest.mark.parametrize("family", FAMILIES)
def test_mixing_equals_the_weights_that_are_formed(family: str, tmp_path: Path) -> None:
    folder, inputs = twin_of(family, tmp_path / "out")
    weights = torch.tensor([[0.6, 0.3, 0.1], [0.0, 0.0, 1.0]])
    routed, shared = AutoMergedModel.from_pretrained(folder), AutoMergedModel.from_pretrained(folder)
    routed.twin_router = Fixed(weights)
    with torch.no_grad():
        found = routed(**inputs).logits
        twin = TwinParts.load(folder)
        plain = load_clean(type(shared), folder)
        for row, mix in enumerate(weights):
            state = {
                name: value + sum(w * dense(one[name]) for w, one in zip(mix, twin.parts.values(), strict=True))
                for name, value in plain.named_parameters()
                if name in twin.parts["a"]
            }
            assert len(state) > 5
            one = {key: value[row : row + 1] for key, value in inputs.items()}
            expected = functional_call(plain, state, kwargs=one).logits[0]
            real = one["attention_mask"][0].bool() if expected.dim() == 2 and "attention_mask" in one else slice(None)
            torch.testing.assert_close(found[row][real], expected[real], rtol=1e-4, atol=1e-4)


def test_the_weights_are_those_of_the_shared_backbone_s_features(tmp_path: Path) -> None:
    data = samples()
    merger(CONFIG).save_pretrained(tmp_path / "out", data=data)
    routed = AutoMergedModel.from_pretrained(tmp_path / "out", task="b", routed=True)
    rows = data["b"]
    plain = merger(TaskArithmeticConfig())
    backbone = plain.merge().bert
    seen: list[Tensor] = []
    routed.twin_router.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    with torch.no_grad():
        together = routed(**single_batch(rows)).logits
        for row in rows:
            routed(input_ids=row["input_ids"][None])
        expected = torch.stack(
            [backbone(input_ids=row["input_ids"][None]).last_hidden_state[0].mean(0) for row in rows]
        )
        torch.testing.assert_close(torch.cat(seen[1:]), expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(seen[0], expected, rtol=0, atol=1e-5)
        alone = torch.cat([routed(input_ids=row["input_ids"][None]).logits for row in rows])
        torch.testing.assert_close(together, alone, rtol=0, atol=1e-4)


def test_outside_of_a_forward_the_backbone_is_the_shared_one(tmp_path: Path) -> None:
    data = samples()
    merger(CONFIG).save_pretrained(tmp_path / "out", data=data)
    routed = AutoMergedModel.from_pretrained(tmp_path / "out")
    inputs = single_batch(data["a"])
    with torch.no_grad():
        before = routed.base_model(**inputs).last_hidden_state
        routed(**inputs)
        assert torch.equal(routed.base_model(**inputs).last_hidden_state, before)
        with pytest.raises(ValueError, match="batch_size"):
            routed(**inputs, labels=torch.zeros(1, dtype=torch.long))
        assert torch.equal(routed.base_model(**inputs).last_hidden_state, before)


def test_text_is_generated_with_the_weights_of_the_prompt(tmp_path: Path) -> None:
    folder, inputs = twin_of("llama", tmp_path / "out")
    routed, folded = AutoMergedModel.from_pretrained(folder), AutoMergedModel.from_pretrained(folder, task="b")
    routed.twin_router = Fixed(torch.tensor([[0.0, 1.0, 0.0]]))
    prompt = {key: value[:1] for key, value in inputs.items()}
    options = {"max_new_tokens": 6, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    found, expected = routed.generate(**prompt, **options), folded.generate(**prompt, **options)
    assert torch.equal(found.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(found.logits), torch.stack(expected.logits), rtol=1e-4, atol=1e-4)


def test_rows_that_no_sample_owns_are_refused() -> None:
    parts = LayerParts([torch.randn(2, 3)], [None])
    parts.left_0, parts.right_0, parts.weight_0 = torch.randn(2, 1), torch.randn(1, 3), None
    with pytest.raises(UnsupportedModelError, match="reads 3 rows for 2 samples"):
        parts.change(nn.Linear(3, 2), torch.randn(3, 3), torch.ones(2, 1))


# -- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inner", [TaskArithmeticConfig(), RegMeanConfig(batch_size=4)], ids=["tensors", "blocks"])
def test_the_folder_is_the_shared_merge(inner, tmp_path: Path) -> None:
    data = samples()
    merger(TwinConfig(init=inner.to_dict(), epochs=1)).save_pretrained(tmp_path / "out", data=data)
    expected = merger(inner).merge(data if inner.merge_type == "regmean" else None)
    loaded = load_clean(AutoModelForSequenceClassification, tmp_path / "out")
    assert all(torch.equal(value, expected.state_dict()[name]) for name, value in loaded.state_dict().items())
    assert sorted(path.name for path in (tmp_path / "out/twin").iterdir()) == [
        "a.safetensors",
        "b.safetensors",
        "router.safetensors",
    ]


def test_a_task_s_parts_are_folded_in(tmp_path: Path) -> None:
    data, made = samples(), merger(CONFIG)
    made.merge(data)
    made.save_pretrained(tmp_path / "out")
    for task in data:
        loaded = AutoMergedModelForSequenceClassification.from_pretrained(tmp_path / "out", task=task)
        expected = made.model_for(task).state_dict()
        assert loaded.state_dict().keys() == expected.keys()
        assert all(torch.equal(value, expected[name]) for name, value in loaded.state_dict().items())
        routed = AutoMergedModelForSequenceClassification.from_pretrained(tmp_path / "out", task=task, routed=True)
        inputs = single_batch(data[task])
        assert routed(**inputs).logits.shape == loaded(**inputs).logits.shape
        routed.twin_router = Fixed(torch.tensor([[float(task == one) for one in "ab"]] * 6))
        torch.testing.assert_close(routed(**inputs).logits, loaded(**inputs).logits, rtol=0, atol=1e-5)


def test_models_with_one_head_have_parts_of_it(tmp_path: Path) -> None:
    folder, inputs = twin_of("llama", tmp_path / "out")
    assert not (folder / "heads").exists()
    loaded = AutoMergedModel.from_pretrained(folder, task="c")
    twin, shared = TwinParts.load(folder), load_clean(type(loaded), folder)
    part = dense(twin.parts["c"]["lm_head.weight"])
    torch.testing.assert_close(loaded.lm_head.weight, shared.lm_head.weight + part, rtol=0, atol=1e-6)
    half = AutoMergedModel.from_pretrained(folder, dtype="bfloat16")
    assert torch.isfinite(half(**inputs).logits).all()
    routed = AutoMergedModel.from_pretrained(folder, task="c", routed=True)
    assert torch.equal(routed(**inputs).logits, AutoMergedModel.from_pretrained(folder)(**inputs).logits)


def test_unknown_tasks_and_damaged_files_are_errors(tmp_path: Path) -> None:
    folder, _ = twin_of("llama", tmp_path / "out")
    with pytest.raises(ConfigError, match=r"has no parts for the task 'd'.* Tasks: a, b, c"):
        AutoMergedModel.from_pretrained(folder, task="d")
    with pytest.raises(ConfigError, match="output_loading_info"):
        AutoMergedModel.from_pretrained(folder, output_loading_info=True)
    path = folder / "twin/b.safetensors"
    path.write_bytes(path.read_bytes()[:30])
    with pytest.raises(CheckpointError, match=r"b\.safetensors' cannot be read"):
        AutoMergedModel.from_pretrained(folder)
    path.unlink()
    with pytest.raises(CheckpointError, match=r"b\.safetensors' cannot be read"):
        AutoMergedModel.from_pretrained(folder, task="b")


def test_plain_merges_have_nothing_to_route(tmp_path: Path) -> None:
    made = merger(TaskArithmeticConfig())
    made.save_pretrained(tmp_path / "out")
    with pytest.raises(ConfigError, match="has no parts of tasks that could be routed"):
        AutoMergedModel.from_pretrained(tmp_path / "out", task="a", routed=True)
    with pytest.raises(ConfigError, match="has no parts of tasks that could be routed"):
        AutoMergedModel.from_pretrained(made.plan.resolved_recipe(), routed=True)


# -- refusals ---------------------------------------------------------------------------------------------------------


def pair(family: str) -> dict[str, PreTrainedModel]:
    base = ZOO[family].build()
    return {task: perturbed(base, seed) for seed, task in enumerate("ab", start=1)}


def test_encoder_decoders_single_experts_and_missing_samples_are_refused() -> None:
    problems = Merger.from_pretrained(pair("t5"), TwinConfig(init="linear")).problems()
    assert any("routes by the last hidden state" in problem for problem in problems)
    alone = Merger.from_pretrained({"a": pair("bert")["a"]}, TwinConfig(init="linear"))
    assert any("'twin' needs at least 2 experts" in problem for problem in alone.problems())
    with pytest.raises(PlanError, match="'twin' needs calibration samples"):
        merger(CONFIG).merge()


def test_parameters_without_parts_are_noted() -> None:
    notes = "\n".join(Merger.from_pretrained(pair("vit"), TwinConfig(init="linear")).check().notes)
    assert "such as 'vit.embeddings.cls_token', are the shared merge's for all tasks" in notes


def test_layers_whose_weights_are_read_without_a_call_have_no_parts() -> None:
    """Linear attention of Qwen3-Next convolves with the weights of a module that it never calls."""
    made = Merger.from_pretrained(pair("qwen3-next"), TwinConfig(init="linear", epochs=1))
    made.merge(dict.fromkeys("ab", ZOO["qwen3-next"].inputs()))
    name = "model.layers.0.linear_attn.conv1d.weight"
    assert name in made.plan.outputs and name not in made.plan.twin.parts["a"]
    assert any(f"such as '{name}', are the shared merge's" in note for note in made.report.notes)


def test_layers_that_mix_samples_are_refused() -> None:
    """DeBERTa-v2 projects its table of relative positions, once for all samples, with the layers that project tokens."""
    made = Merger.from_pretrained(pair("deberta-v2"), TwinConfig(init="linear", epochs=1))
    with pytest.raises(UnsupportedModelError, match="cannot mix weights for each sample"):
        made.merge(dict.fromkeys("ab", ZOO["deberta-v2"].inputs()))


def test_backbones_without_hidden_states_are_refused() -> None:
    model = ZOO["clip"].build()
    with pytest.raises(UnsupportedModelError, match="returns no last hidden state"):
        pooled_features(model, ZOO["clip"].inputs())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"init": "zipit"}, "names 'zipit', whose result has no backbone that serves"),
        ({"init": {"merge_type": "regmean", "fit_heads": True}}, "with fit_heads=True"),
        ({"then": [{"merge_type": "wise_ft"}]}, "TwinConfig.then belongs into the recipe of 'init'"),
    ],
)
def test_config_refuses(settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TwinConfig(**settings)


def test_router_files_keep_what_was_trained(tmp_path: Path) -> None:
    router = TaskRouter(4, 3, 2)
    with torch.no_grad():
        for value in router.state_dict().values():
            value.copy_(torch.rand_like(value) + 0.5)
    TwinParts({"x": {}, "y": {}}, router).save(tmp_path)
    loaded = TwinParts.load(tmp_path)
    features = torch.randn(5, 4)
    assert list(loaded.parts) == ["x", "y"]
    assert torch.equal(loaded.router(features), router(features))
