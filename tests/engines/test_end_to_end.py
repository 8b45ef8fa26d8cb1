"""The end-to-end engine: what it writes, what it refuses, what it tells callbacks, and that it changes nothing else."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForSequenceClassification, TrainerCallback

from hf_merge import (
    AdaMergingConfig,
    AutoMergedModelForSequenceClassification,
    DirectTrainConfig,
    DistillMergeConfig,
    FisherConfig,
    LinearConfig,
    Merger,
)
from hf_merge.engines.task_models import LazyTensors
from hf_merge.errors import ConfigError, NonFiniteError, PlanError
from hf_merge.training.arguments import ProDistillArguments

from ..methods.helpers_models import models, probe, samples
from ..zoo import ZOO, perturbed


class Counter(TrainerCallback):
    """Counts what it is told, and may end training after some epochs."""

    def __init__(self, epochs: int | None = None):
        self.epochs = epochs
        self.seen: dict[str, int] = {}
        self.logs: list[dict] = []

    def _count(self, event: str) -> None:
        self.seen[event] = self.seen.get(event, 0) + 1

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self._count("train_begin")
        assert kwargs["model"] is not None

    def on_train_end(self, args, state, control, **kwargs) -> None:
        self._count("train_end")

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self._count("step_end")

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        self.logs.append(dict(logs))

    def on_epoch_end(self, args, state, control, **kwargs) -> None:
        self._count("epoch_end")
        if self.seen["epoch_end"] == self.epochs:
            control.should_training_stop = True


@pytest.fixture
def on_disk(tmp_path):
    """Folders of a base model and of two experts."""
    base, experts = models()
    for name, model in {"base": base, **experts}.items():
        model.save_pretrained(tmp_path / name)
    return tmp_path


def from_disk(folder, config) -> Merger:
    return Merger.from_pretrained({"a": folder / "a", "b": folder / "b"}, config, base_model=folder / "base")


def test_saved_folder_is_what_merge_returns(on_disk) -> None:
    config, data = DistillMergeConfig(epochs=2), samples()
    merged = from_disk(on_disk, config).merge(data)
    from_disk(on_disk, config).save_pretrained(on_disk / "out", data=data)
    loaded = AutoModelForSequenceClassification.from_pretrained(on_disk / "out")
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in merged.state_dict().items())
    other = AutoMergedModelForSequenceClassification.from_pretrained(on_disk / "out", task="b")
    assert other.classifier.weight.shape[0] == 4
    report = json.loads((on_disk / "out" / "merge_report.json").read_text(encoding="utf-8"))
    assert report["blocks"]["model"]["epochs"] == 2
    assert set(report["parameters"]) == set(merged.state_dict())
    recipe = json.loads((on_disk / "out" / "merge_config.json").read_text(encoding="utf-8"))
    assert recipe["merge_type"] == "distill_merge"


def test_callbacks_are_told(on_disk) -> None:
    counter = Counter()
    args = ProDistillArguments(output_dir=str(on_disk / "runs"), logging_strategy="epoch", disable_tqdm=True)
    config = DirectTrainConfig(epochs=3, batch_size=2)
    from_disk(on_disk, config).merge(samples(6, labels=True), callbacks=[counter], args=args)
    assert counter.seen == {"train_begin": 1, "train_end": 1, "step_end": 9, "epoch_end": 3}
    assert [log["loss"] > 0 for log in counter.logs if "loss" in log] == [True] * 3


def test_a_callback_ends_training(on_disk) -> None:
    made, counter = from_disk(on_disk, AdaMergingConfig(epochs=50)), Counter(epochs=2)
    made.merge(samples(), callbacks=[counter])
    assert made.report.blocks["model"]["epochs"] == 2


def test_accumulation_is_a_larger_batch(on_disk) -> None:
    """For a loss that adds up: the same updates, but for the order of sums."""
    config = {"epochs": 2, "loss": "sse", "granularity": "tensor"}
    args = ProDistillArguments(output_dir=str(on_disk / "runs"), gradient_accumulation_steps=3, disable_tqdm=True)
    whole = from_disk(on_disk, DistillMergeConfig(**config)).merge(samples(6))
    parts = from_disk(on_disk, DistillMergeConfig(batch_size=2, **config)).merge(samples(6), args=args)
    for (name, one), two in zip(whole.named_parameters(), parts.parameters(), strict=True):
        if not name.endswith("key.bias"):
            torch.testing.assert_close(one, two, rtol=0, atol=1e-4)


def test_bf16_trains_and_keeps_float32_weights(on_disk) -> None:
    args = ProDistillArguments(output_dir=str(on_disk / "runs"), bf16=True, use_cpu=True, disable_tqdm=True)
    made = from_disk(on_disk, DirectTrainConfig(epochs=2))
    merged = made.merge(samples(labels=True), args=args)
    assert merged.dtype == torch.float32
    report = made.report.blocks["model"]
    assert report["last_loss"] < report["first_loss"]


@pytest.mark.parametrize("config", [FisherConfig(), AdaMergingConfig(), DirectTrainConfig()])
def test_samples_are_asked_for(config) -> None:
    base, experts = models()
    made = Merger.from_pretrained(experts, config, base_model=base)
    with pytest.raises(PlanError, match="needs calibration samples"):
        made.merge()
    with pytest.raises(PlanError, match="no calibration samples for 'b'"):
        made.merge({"a": samples()["a"]})
    with pytest.raises(ConfigError, match="samples of 'a' are empty"):
        made.merge(samples() | {"a": []})


def test_the_base_model_is_asked_for() -> None:
    made = Merger.from_pretrained(models()[1], AdaMergingConfig(init="linear"))
    with pytest.raises(PlanError, match="needs the base model"):
        made.merge(samples())


def test_one_sample_is_enough() -> None:
    base, experts = models()
    made = Merger.from_pretrained(experts, DistillMergeConfig(epochs=1), base_model=base)
    assert made.merge(samples(1)) is made.model


def test_a_rule_gives_parameters_to_another_method() -> None:
    base, experts = models()
    rule = {"match": r"layer\.0\.", "merge_type": "linear"}
    merged = Merger.from_pretrained(experts, DirectTrainConfig(rules=[rule], epochs=1), base_model=base).merge(
        samples(labels=True)
    )
    mean = Merger.from_pretrained(experts, LinearConfig(), base_model=base).merge()
    for name, value in merged.bert.named_parameters():
        assert torch.equal(value, mean.bert.get_parameter(name)) == ("layer.0." in name), name


def test_a_head_that_is_the_same_for_all_is_merged_too() -> None:
    base = ZOO["bert"].build()
    experts = {name: perturbed(base, seed) for seed, name in enumerate("ab", start=1)}
    data = {name: [{"input_ids": torch.tensor([5, 6, 7])}] for name in experts}

    def look(group) -> None:
        assert "classifier.weight" in group.parameters
        assert group.models.student(1).classifier.weight is group.model.classifier.weight

    probe(AdaMergingConfig(), data, look, Merger.from_pretrained(experts, AdaMergingConfig(), base_model=base))


def test_nan_is_refused_by_name() -> None:
    base, experts = models()
    made = Merger.from_pretrained(experts, DirectTrainConfig(epochs=3, learning_rate=1e38), base_model=base)
    with pytest.raises(NonFiniteError, match="Merging '.*' with 'direct_train' gave NaN or infinity"):
        made.merge(samples(labels=True))


def test_experts_are_read_when_they_are_asked_for() -> None:
    class Source:
        def __init__(self):
            self.count = 0

        def read(self, name: str) -> torch.Tensor:
            self.count += 1
            return torch.ones(2)

    sources = [Source(), Source()]
    tensors = LazyTensors(sources, ["x", "x"], torch.device("cpu"))
    assert len(tensors) == 2
    assert sources[0].count == 0
    assert torch.equal(tensors[1], torch.ones(2))
    assert [source.count for source in sources] == [0, 1]
