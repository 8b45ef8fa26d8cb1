"""Fine-tune and merge in one call."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import BertForSequenceClassification

from hf_merge import (
    AutoMergedModel,
    CatConfig,
    ConfigError,
    LinearConfig,
    RegMeanConfig,
    TaskArithmeticConfig,
    merge_checkpoints,
    merge_trainers,
)

from ..testing_utils import load_clean
from .trainers import make_trainer, save_base, state_of


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("models") / "base")


def two_trainers(base: Path, folder: Path) -> dict:
    return {
        "pairs": make_trainer(base, folder / "pairs", labels=2, max_steps=2),
        "triples": make_trainer(base, folder / "triples", labels=3, seed=1, max_steps=2),
    }


def test_trainers_are_trained_and_merged_with_a_head_for_each(base, tmp_path):
    trainers = two_trainers(base, tmp_path)
    merger = merge_trainers(trainers, TaskArithmeticConfig(scaling=0.4), output_dir=tmp_path / "merged")
    assert all(trainer.state.global_step == 2 for trainer in trainers.values())
    start = state_of(BertForSequenceClassification.from_pretrained(base))
    states = [state_of(trainer.model) for trainer in trainers.values()]
    for task, trainer in trainers.items():
        for model in (merger.model_for(task), AutoMergedModel.from_pretrained(tmp_path / "merged", task=task)):
            for name, tensor in model.state_dict().items():
                if name.startswith("classifier"):
                    expected = trainer.model.state_dict()[name]
                else:
                    expected = start[name] + 0.4 * sum(state[name] - start[name] for state in states)
                torch.testing.assert_close(tensor, expected, atol=1e-6, rtol=1e-5)


def test_trainers_that_trained_are_not_trained_again(base, tmp_path):
    trainers = two_trainers(base, tmp_path)
    for trainer in trainers.values():
        trainer.train()
    before = state_of(trainers["pairs"].model)
    merge_trainers(trainers, LinearConfig())
    for name, tensor in before.items():
        assert torch.equal(trainers["pairs"].model.state_dict()[name], tensor)


def test_samples_come_from_the_trainers(base, tmp_path):
    trainers = two_trainers(base, tmp_path)
    merger = merge_trainers(trainers, RegMeanConfig(), num_samples=8)
    assert merger.model_for("triples").config.num_labels == 3
    again = merge_trainers(trainers, RegMeanConfig(), num_samples=8)
    for name, tensor in merger.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], tensor), name


def test_recipes_are_checked_before_training(base, tmp_path):
    trainers = two_trainers(base, tmp_path)
    with pytest.raises(ConfigError, match="output='adapter'"):
        merge_trainers(trainers, CatConfig(output="adapter"))
    with pytest.raises(ConfigError, match="float99"):
        merge_trainers(trainers, LinearConfig(), dtype="float99")
    assert all(trainer.state.global_step == 0 for trainer in trainers.values())


def test_trainers_in_a_list_get_names(base, tmp_path):
    merger = merge_trainers(list(two_trainers(base, tmp_path).values()), LinearConfig(), train=False)
    assert [source.name for source in merger.experts] == ["expert_0", "expert_1"]


def run_with_checkpoints(base: Path, folder: Path) -> Path:
    make_trainer(base, folder, save_strategy="steps", save_steps=2).train()
    return folder


@pytest.mark.parametrize(("last", "steps"), [(None, (2, 4, 6)), (2, (4, 6))])
def test_checkpoints_of_a_run(base, tmp_path, last, steps):
    run = run_with_checkpoints(base, tmp_path / "run")
    merger = merge_checkpoints(run, last=last)
    states = [state_of(BertForSequenceClassification.from_pretrained(run / f"checkpoint-{step}")) for step in steps]
    for name, tensor in merger.model.state_dict().items():
        torch.testing.assert_close(tensor, sum(state[name] for state in states) / len(states), atol=1e-6, rtol=1e-5)
    merge_checkpoints(run, last=last, output_dir=tmp_path / "soup")
    load_clean(BertForSequenceClassification, tmp_path / "soup")


def test_refusals(base, tmp_path):
    with pytest.raises(ConfigError, match="no checkpoints"):
        merge_checkpoints(tmp_path)
    with pytest.raises(ConfigError, match="last=3"):
        merge_checkpoints([base], last=3)
    trainer = make_trainer(base, tmp_path / "run")
    trainer.train_dataset = iter([])
    with pytest.raises(ConfigError, match="no samples can be drawn"):
        merge_trainers({"a": trainer, "b": trainer}, RegMeanConfig(), train=False)
