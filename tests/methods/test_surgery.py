"""Representation Surgery against a literal loop, its laws, where corrections are installed, and what is refused."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from transformers import BertForTokenClassification, PreTrainedModel, ViTForMaskedImageModeling

from hf_merge import (
    AdaMergingConfig,
    AutoMergedModelForSequenceClassification,
    CheckpointError,
    ConfigError,
    EvaluationTask,
    Merger,
    PlanError,
    RegMeanConfig,
    SurgeryConfig,
    TaskArithmeticConfig,
    UnsupportedModelError,
    evaluate_merge,
)
from hf_merge.methods.after_base import FeatureGroup
from hf_merge.methods.surgery import Surgery

from ..zoo import ZOO, perturbed
from .helpers_models import bert, merger, models, samples, single_batch


CONFIG = SurgeryConfig(init="task_arithmetic", rank=3, epochs=30, batch_size=4, learning_rate=1e-2)


def group(settings: SurgeryConfig, rows: int = 10, width: int = 6) -> FeatureGroup:
    generator = torch.Generator().manual_seed(0)
    merged, expert = (torch.randn(rows, width, generator=generator) for _ in range(2))
    return FeatureGroup(task="spam", merged=merged, expert=expert, settings=settings, seed=settings.seed)


def test_equals_literal_loop() -> None:
    """Two linear layers without bias under Adam and torch's L1 loss, as in the authors' code, in float64."""
    found = group(CONFIG)
    factors = Surgery().correct(found)
    draws = group(CONFIG)
    bound = 1 / math.sqrt(6)
    down, up = nn.Linear(6, 3, bias=False).double(), nn.Linear(3, 6, bias=False).double()
    with torch.no_grad():
        down.weight.copy_(torch.from_numpy(draws.random("start").uniform(-bound, bound, (3, 6)).astype(np.float32)))
        up.weight.zero_()
    optimizer, order = torch.optim.Adam([*down.parameters(), *up.parameters()], lr=1e-2), draws.random("order")
    merged, expert = draws.merged.double(), draws.expert.double()
    for _ in range(30):
        rows = order.permutation(10)
        for batch in (rows[:4], rows[4:8], rows[8:]):
            features = merged[batch]
            loss = nn.functional.l1_loss(features - up(torch.relu(down(features))), expert[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    torch.testing.assert_close(factors.left.double(), up.weight.detach(), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(factors.right.double(), down.weight.detach(), rtol=1e-3, atol=1e-4)
    assert found.report["distance_after"] < 0.8 * found.report["distance_before"]


def test_the_same_seed_gives_the_same_bits_and_another_one_does_not() -> None:
    first, again = (Surgery().correct(group(CONFIG)) for _ in range(2))
    other = Surgery().correct(group(SurgeryConfig(rank=3, epochs=30, seed=1)))
    assert torch.equal(first.left, again.left) and torch.equal(first.right, again.right)
    assert not torch.isclose(first.right, other.right).all()


@pytest.mark.parametrize(
    "inner",
    [TaskArithmeticConfig(), RegMeanConfig(batch_size=4), AdaMergingConfig(epochs=2)],
    ids=["tensors", "blocks", "model"],
)
def test_weights_and_heads_are_those_of_the_merge(inner) -> None:
    data = samples()
    plain, operated = merger(inner), merger(SurgeryConfig(init=inner.to_dict(), epochs=3))
    expected, found = plain.merge(data if inner.merge_type != "task_arithmetic" else None), operated.merge(data)
    assert found.state_dict().keys() == expected.state_dict().keys()
    assert all(torch.equal(value, expected.state_dict()[name]) for name, value in found.state_dict().items())
    for task in data:
        state = operated.model_for(task).state_dict()
        theirs = plain.model_for(task).state_dict()
        assert state.keys() - theirs.keys() == {"classifier.surgery.up", "classifier.surgery.down"}
        assert all(torch.equal(state[name], value) for name, value in theirs.items())


def test_the_head_reads_corrected_features() -> None:
    data, made, plain = samples(), merger(CONFIG), merger(TaskArithmeticConfig())
    made.merge(data)
    for task in data:
        model, before = made.model_for(task), plain.model_for(task)
        inputs = single_batch(data[task])
        with torch.no_grad():
            features = before.bert(**inputs).pooler_output
            up, down = model.classifier.surgery.up, model.classifier.surgery.down
            corrected = features - torch.relu(features @ down.T) @ up.T
            expected = before.classifier(corrected)
            torch.testing.assert_close(model(**inputs).logits, expected, rtol=0, atol=1e-5)
        row = made.report.heads[task]
        assert row["corrected"] == ["classifier"] and row["rows"] == 6
        assert row["distance_after"] < row["distance_before"]


def test_features_that_are_the_experts_stay_as_they_are() -> None:
    base, _ = models()
    experts = {"a": bert(2, 1), "b": bert(4, 2)}
    for expert in experts.values():
        expert.bert.load_state_dict(base.bert.state_dict())
    made = Merger.from_pretrained(experts, SurgeryConfig(init="linear", epochs=5), base_model=base)
    data = samples()
    made.merge(data)
    for task, expert in experts.items():
        inputs = single_batch(data[task])
        torch.testing.assert_close(made.model_for(task)(**inputs).logits, expert(**inputs).logits, rtol=0, atol=1e-6)


def test_a_folder_is_loaded_under_a_task_with_its_correction(tmp_path: Path) -> None:
    data, made = samples(), merger(CONFIG)
    made.save_pretrained(tmp_path / "direct", data=data)
    memory = merger(CONFIG)
    memory.merge(data)
    memory.save_pretrained(tmp_path / "merged")
    for task in data:
        inputs = single_batch(data[task])
        expected = memory.model_for(task)(**inputs).logits
        for folder in ("direct", "merged"):
            loaded = AutoMergedModelForSequenceClassification.from_pretrained(tmp_path / folder, task=task)
            assert torch.equal(loaded(**inputs).logits, expected)
        half = AutoMergedModelForSequenceClassification.from_pretrained(
            tmp_path / "direct", task=task, dtype="bfloat16"
        )
        torch.testing.assert_close(half(**inputs).logits.float(), expected, rtol=0.1, atol=0.1)
    plain = merger(TaskArithmeticConfig())
    plain.merge()
    root = AutoMergedModelForSequenceClassification.from_pretrained(tmp_path / "direct")
    inputs = single_batch(data["a"])
    assert torch.equal(root(**inputs).logits, plain.model_for("a")(**inputs).logits)


def test_a_damaged_correction_is_an_error(tmp_path: Path) -> None:
    merger(CONFIG).save_pretrained(tmp_path / "out", data=samples())
    path = tmp_path / "out/heads/a/surgery.safetensors"
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(CheckpointError, match=r"surgery\.safetensors' cannot be read"):
        AutoMergedModelForSequenceClassification.from_pretrained(tmp_path / "out", task="a")


def test_evaluation_measures_the_corrected_model(tmp_path: Path) -> None:
    data, (_, experts) = samples(24), models()
    tasks = {
        task: EvaluationTask(
            [{**row, "labels": int(experts[task](input_ids=row["input_ids"][None]).logits.argmax())} for row in rows]
        )
        for task, rows in data.items()
    }
    config = SurgeryConfig(init={"merge_type": "task_arithmetic", "scaling": 0.0}, epochs=300, learning_rate=1e-2)
    made = merger(config)
    made.save_pretrained(tmp_path / "out", data=data)
    found = evaluate_merge(str(tmp_path / "out"), tasks, experts=False, device="cpu").mean
    memory = merger(config)
    memory.merge(data)
    assert evaluate_merge(memory, tasks, experts=False, device="cpu").mean == found
    plain = merger(TaskArithmeticConfig(scaling=0.0))
    plain.merge()
    assert found > evaluate_merge(plain, tasks, experts=False, device="cpu").mean + 0.1


# -- where ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "layer"),
    [
        ("roberta", "classifier.dense"),
        ("distilbert", "pre_classifier"),
        ("vit", "classifier"),
        ("resnet", "classifier.1"),
    ],
)
def test_the_first_layer_of_a_head_is_corrected(family: str, layer: str) -> None:
    entry = ZOO[family]
    base, inputs = entry.build(), entry.inputs()
    experts = {task: perturbed(base, seed, 0.05) for seed, task in enumerate("ab", start=1)}
    made = Merger.from_pretrained(experts, SurgeryConfig(init="linear", epochs=20, heads="per_task"))
    main = base.main_input_name
    made.merge({task: {main: inputs[main]} for task in experts})
    for task in experts:
        assert made.report.heads[task]["corrected"] == [layer]
        assert made.report.heads[task]["rows"] == 2
        assert made.model_for(task).get_submodule(layer).surgery.up.abs().sum() > 0


def token_experts() -> dict[str, PreTrainedModel]:
    base = BertForTokenClassification(ZOO["bert"].config()).eval()
    return {task: perturbed(base, seed, 0.1) for seed, task in enumerate("ab", start=1)}


def test_padding_is_left_out() -> None:
    data = samples()
    experts = token_experts()
    made = Merger.from_pretrained(experts, SurgeryConfig(init="linear", epochs=1, batch_size=6, heads="per_task"))
    made.merge(data)
    for task, rows in data.items():
        assert made.report.heads[task]["rows"] == sum(len(row["input_ids"]) for row in rows)


def test_rows_of_merged_model_and_expert_belong_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Row by row what one sample gives, alone, in both models."""
    seen: dict[str, FeatureGroup] = {}
    correct = Surgery.correct
    monkeypatch.setattr(Surgery, "correct", lambda self, group: correct(self, seen.setdefault(group.task, group)))
    data, (_, experts), plain = samples(), models(), merger(TaskArithmeticConfig())
    merger(SurgeryConfig(init="task_arithmetic", epochs=1, batch_size=4)).merge(data)
    for task, rows in data.items():
        for row in rows:
            inputs = {"input_ids": row["input_ids"][None]}
            pair = [model.bert(**inputs).pooler_output[0] for model in (plain.model_for(task), experts[task])]
            wanted, found = torch.cat(pair), torch.cat([seen[task].merged, seen[task].expert], dim=1)
            assert float((found - wanted).detach().abs().amax(1).min()) < 1e-5


# -- refusals ---------------------------------------------------------------------------------------------------------


def test_heads_without_a_linear_layer_are_refused() -> None:
    config = ZOO["vit"].config()
    config.encoder_stride = config.patch_size
    base = ViTForMaskedImageModeling(config).eval()
    experts = {task: perturbed(base, seed) for seed, task in enumerate("ab", start=1)}
    made = Merger.from_pretrained(experts, SurgeryConfig(init="linear", heads="per_task"))
    inputs = {"pixel_values": ZOO["vit"].inputs()["pixel_values"]}
    with pytest.raises(UnsupportedModelError, match="has no linear layer"):
        made.merge(dict.fromkeys("ab", inputs))


def test_models_without_heads_of_their_own_are_refused() -> None:
    base = ZOO["llama"].build()
    experts = {task: perturbed(base, seed) for seed, task in enumerate("ab", start=1)}
    with pytest.raises(PlanError, match="corrects what heads that are kept per task read, and there are none"):
        Merger.from_pretrained(experts, SurgeryConfig(init="linear")).merge(samples())


def test_samples_are_needed_for_every_task() -> None:
    with pytest.raises(PlanError, match="'surgery' needs calibration samples"):
        merger(CONFIG).merge()
    for init in ("linear", "regmean"):
        with pytest.raises(PlanError, match="no calibration samples for 'b'"):
            merger(SurgeryConfig(init=init)).merge({"a": samples()["a"]})


def test_a_merge_that_cannot_be_planned_is_refused_once() -> None:
    _, experts = models()
    problems = Merger.from_pretrained(experts, SurgeryConfig(init="ties")).problems()
    assert len(problems) == 1 and "works on task vectors" in problems[0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"init": "fs_merge"}, "names 'fs_merge', whose result has no backbone that serves"),
        ({"init": "surgery"}, "names 'surgery', whose result has no backbone that serves"),
        ({"init": {"merge_type": "regmean", "fit_heads": True}}, "with fit_heads=True"),
        ({"rules": [{"match": "x", "merge_type": "ties"}]}, "SurgeryConfig.rules belongs into the recipe of 'init'"),
        ({"then": [{"merge_type": "wise_ft"}]}, "SurgeryConfig.then belongs into the recipe of 'init'"),
        ({"output": "adapter"}, "SurgeryConfig.output cannot be 'adapter'"),
        ({"init": 1}, "SurgeryConfig.init must be"),
        ({"init": {"merge_type": "ties", "densty": 1}}, "unknown key 'densty'"),
    ],
)
def test_config_refuses(settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SurgeryConfig(**settings)
