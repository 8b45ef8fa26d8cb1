"""The merge callback: the right model is merged, and the training does not notice."""

from __future__ import annotations

import json
import random
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import BertForSequenceClassification, BertTokenizer, Trainer, TrainerControl, TrainerState

from hf_merge import (
    CatConfig,
    ConfigError,
    DareConfig,
    LinearConfig,
    MergeCallback,
    ModelStockConfig,
    PlanError,
    RegMeanConfig,
    SlerpConfig,
    TaskArithmeticConfig,
    TiesConfig,
    WiseFtConfig,
)

from ..testing_utils import load_clean, run_process
from .trainers import make_trainer, save_base, state_of


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture(scope="module")
def other(base: Path) -> Path:
    model = BertForSequenceClassification.from_pretrained(base)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.02)
    model.save_pretrained(base.parent / "other")
    return base.parent / "other"


def loaded(folder: Path) -> dict[str, Tensor]:
    return state_of(load_clean(BertForSequenceClassification, folder))


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor], exact: bool = False) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        tolerance = 0 if exact else 1e-6
        torch.testing.assert_close(found[name], tensor.to(found[name].dtype), atol=tolerance, rtol=tolerance, msg=name)


def mixed(*pairs: tuple[float, dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: sum(weight * state[name].double() for weight, state in pairs) for name in pairs[0][1]}


# -- the training does not notice -------------------------------------------------------------------------------------

PLAIN = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "epoch"}


@dataclass
class Run:
    """What a training without the callback left behind."""

    state: dict[str, Tensor]
    losses: list[float]
    random: tuple[float, ...]
    training: bool


@pytest.fixture(scope="module")
def plain(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    trainer = make_trainer(base, tmp_path_factory.mktemp("plain"), **PLAIN)
    trainer.train()
    return Run(state_of(trainer.model), losses_of(trainer), random_numbers(), trainer.model.training)


def random_numbers() -> tuple[float, ...]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def losses_of(trainer: Trainer) -> list[float]:
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


@pytest.mark.parametrize(
    "options",
    [
        {"merge_on": "train_end"},
        {"merge_on": "epoch_end"},
        {"merge_on": "save"},
        {"merge_on": "epoch_end", "own": "previous"},
        {"merge_on": "train_end", "own": "epoch_end"},
    ],
    ids=str,
)
def test_training_is_the_same_to_the_bit(base, other, plain, tmp_path, options):
    trainer = make_trainer(base, tmp_path, **PLAIN)
    callback = MergeCallback(LinearConfig(), experts={"other": other}, **options).attach(trainer)
    trainer.train()
    assert callback.results
    assert random_numbers() == plain.random
    assert_equal(state_of(trainer.model), plain.state, exact=True)
    assert losses_of(trainer) == plain.losses and len(plain.losses) == 6
    assert trainer.model.training == plain.training


def test_random_methods_do_not_disturb_either(base, other, plain, tmp_path):
    callback = MergeCallback(DareConfig(density=0.5), experts=[other], merge_on="epoch_end")
    trainer = make_trainer(base, tmp_path, callbacks=[callback], **PLAIN)
    trainer.train()
    assert_equal(state_of(trainer.model), plain.state, exact=True)


# -- the right model is merged ----------------------------------------------------------------------------------------


def test_train_end_without_checkpoints(base, other, tmp_path):
    callback = MergeCallback(LinearConfig(), experts={"other": other})
    trainer = make_trainer(base, tmp_path / "run", callbacks=[callback])
    trainer.train()
    assert [result.folder for result in callback.results] == [tmp_path / "run" / "merged"]
    assert_equal(loaded(tmp_path / "run" / "merged"), mixed((0.5, state_of(trainer.model)), (0.5, loaded(other))))


@pytest.mark.parametrize("merge_on", ["save", "epoch_end"])
def test_every_checkpoint(base, other, tmp_path, merge_on):
    callback = MergeCallback(LinearConfig(), experts={"other": other}, merge_on=merge_on)
    trainer = make_trainer(base, tmp_path / "run", callbacks=[callback], save_strategy="epoch")
    trainer.train()
    assert [result.step for result in callback.results] == [3, 6]
    for result in callback.results:
        trained = loaded(tmp_path / "run" / f"checkpoint-{result.step}")
        assert result.folder == tmp_path / "run" / "merged" / f"checkpoint-{result.step}"
        assert_equal(loaded(result.folder), mixed((0.5, trained), (0.5, loaded(other))))


def test_save_total_limit(base, other, tmp_path):
    callback = MergeCallback(LinearConfig(), experts=[other], merge_on="save")
    options = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 2}
    make_trainer(base, tmp_path / "run", callbacks=[callback], **options).train()
    assert sorted(path.name for path in (tmp_path / "run" / "merged").iterdir()) == ["checkpoint-5", "checkpoint-6"]


def test_the_best_model_is_merged(base, other, tmp_path):
    callback = MergeCallback(LinearConfig(), experts={"other": other})
    options = {"save_strategy": "epoch", "eval_strategy": "epoch", "load_best_model_at_end": True}
    # The longer the worse: the best checkpoint is the first one.
    trainer = make_trainer(
        base, tmp_path / "run", callbacks=[callback], learning_rate=1.0, lr_scheduler_type="constant", **options
    )
    trainer.train()
    best = loaded(Path(trainer.state.best_model_checkpoint))
    assert_equal(state_of(trainer.model), best, exact=True)
    assert_equal(loaded(tmp_path / "run" / "merged"), mixed((0.5, best), (0.5, loaded(other))))


def lora_model(base: Path):
    torch.manual_seed(0)
    config = LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query", "value"], modules_to_save=["classifier"])
    return get_peft_model(BertForSequenceClassification.from_pretrained(base), config)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT asks for it
def test_peft_model(base, other, tmp_path):
    plain = make_trainer(lora_model(base), tmp_path / "plain")
    plain.train()
    callback = MergeCallback(LinearConfig(), experts={"other": other}, merge_on="epoch_end")
    trainer = make_trainer(lora_model(base), tmp_path / "run", callbacks=[callback])
    trainer.train()
    assert_equal(state_of(trainer.model), state_of(plain.model), exact=True)
    merged = state_of(trainer.model.merge_and_unload())
    assert_equal(loaded(callback.results[-1].folder), mixed((0.5, merged), (0.5, loaded(other))))


def test_gradient_checkpointing(base, other, tmp_path):
    options = {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": False}}
    plain = make_trainer(base, tmp_path / "plain", **options)
    plain.train()
    callback = MergeCallback(LinearConfig(), experts={"other": other}, merge_on="epoch_end")
    trainer = make_trainer(base, tmp_path / "run", callbacks=[callback], **options)
    trainer.train()
    assert_equal(state_of(trainer.model), state_of(plain.model), exact=True)
    merged = mixed((0.5, state_of(trainer.model)), (0.5, loaded(other)))
    assert_equal(loaded(callback.results[-1].folder), merged)


# -- with its own past ------------------------------------------------------------------------------------------------


def test_wise_ft_with_the_start(base, tmp_path):
    callback = MergeCallback(WiseFtConfig(alpha=0.3), base_model="start")
    trainer = make_trainer(base, tmp_path / "run", callbacks=[callback])
    start = state_of(trainer.model)
    trainer.train()
    assert_equal(loaded(tmp_path / "run" / "merged"), mixed((0.7, start), (0.3, state_of(trainer.model))))


def test_the_start_as_an_expert(base, tmp_path):
    callback = MergeCallback(LinearConfig(weights={"start": 0.25, "trained": 0.75}), own="start")
    trainer = make_trainer(base, tmp_path / "run", callbacks=[callback])
    trainer.train()
    expected = mixed((0.25, loaded(base)), (0.75, state_of(trainer.model)))
    assert_equal(loaded(tmp_path / "run" / "merged"), expected)


def test_average_over_time(base, tmp_path):
    weights = {"previous": 0.9, "trained": 0.1}
    callback = MergeCallback(LinearConfig(weights=weights), own="previous", merge_on="save")
    trainer = make_trainer(base, tmp_path / "run", callbacks=[callback], save_strategy="steps", save_steps=2)
    trainer.train()
    average = loaded(base)
    for step in (2, 4, 6):
        average = mixed((0.9, average), (0.1, loaded(tmp_path / "run" / f"checkpoint-{step}")))
        assert_equal(loaded(tmp_path / "run" / "merged" / f"checkpoint-{step}"), average)


@pytest.mark.parametrize(("limit", "steps"), [(None, (2, 4, 6)), (2, (4, 6))])
def test_soup_of_checkpoints(base, tmp_path, limit, steps):
    callback = MergeCallback(LinearConfig(), own="save", max_snapshots=limit)
    trainer = make_trainer(base, tmp_path / "run", callbacks=[callback], save_strategy="steps", save_steps=2)
    trainer.train()
    states = [loaded(tmp_path / "run" / f"checkpoint-{step}") for step in steps]
    assert_equal(loaded(tmp_path / "run" / "merged"), mixed(*((1 / len(steps), state) for state in states)))


def test_a_method_for_several_experts_can_have_only_copies(base, tmp_path):
    callback = MergeCallback(ModelStockConfig(), base_model="start", own="epoch_end")
    make_trainer(base, tmp_path / "run", callbacks=[callback]).train()
    assert callback.results[0].folder.is_dir()


def test_the_base_is_where_the_model_was_loaded_from(base, other, tmp_path):
    callback = MergeCallback(TaskArithmeticConfig(scaling=0.4), experts={"other": other})
    trainer = make_trainer(base, tmp_path / "run", callbacks=[callback])
    trainer.train()
    expected = mixed((0.2, loaded(base)), (0.4, state_of(trainer.model)), (0.4, loaded(other)))
    assert_equal(loaded(tmp_path / "run" / "merged"), expected)


# -- the four methods of TRL's MergeModelCallback ---------------------------------------------------------------------


def trl_linear(policy: Tensor, target: Tensor) -> Tensor:
    return 0.5 * policy + 0.5 * target


def trl_ties(policy: Tensor, target: Tensor, density: float = 0.4) -> Tensor:
    """The policy is the base model: only the target's task vector counts. One vector agrees with itself in every sign."""
    vector = (target - policy).reshape(-1)
    kept = max(1, int(density * vector.numel()))
    mask = torch.zeros_like(vector)
    mask[vector.abs().argsort(descending=True)[:kept]] = 1
    return policy + (vector * mask).reshape(policy.shape)


def trl_slerp(policy: Tensor, target: Tensor) -> Tensor:
    a, b = policy.reshape(-1), target.reshape(-1)
    cosine = torch.dot(a, b) / (a.norm() * b.norm()).clamp(min=1e-8)
    if not abs(cosine) <= 0.9995:
        return 0.5 * policy + 0.5 * target
    angle = torch.arccos(cosine)
    return (torch.sin(0.5 * angle) * (policy + target)) / torch.sin(angle)


@pytest.mark.parametrize(
    ("config", "base_model", "formula"),
    [
        (LinearConfig(weights={"trained": 0.5, "target": 0.5}), None, trl_linear),
        (TiesConfig(density=0.4, scope="tensor", majority_sign="total"), "trained", trl_ties),
        (SlerpConfig(t=0.5), "trained", trl_slerp),
    ],
    ids=["linear", "ties", "slerp"],
)
def test_the_methods_of_trl(base, other, tmp_path, config, base_model, formula):
    callback = MergeCallback(config, {"target": other}, base_model=base_model)
    trainer = make_trainer(base, tmp_path / "run", callbacks=[callback])
    trainer.train()
    policy, target = state_of(trainer.model), loaded(other)
    expected = {name: formula(policy[name].double(), target[name].double()) for name in policy}
    assert_equal(loaded(tmp_path / "run" / "merged"), expected)


def test_dare_ties_of_trl(base, other, tmp_path):
    """Each entry is the policy's, or the policy's plus the target's task vector times one factor that keeps its L1 norm."""
    config = DareConfig(density=0.5, combination="ties", rescale="norm")
    callback = MergeCallback(config, {"target": other}, base_model="trained")
    trainer = make_trainer(base, tmp_path / "run", callbacks=[callback])
    trainer.train()
    policy, target, merged = state_of(trainer.model), loaded(other), loaded(tmp_path / "run" / "merged")
    for name in policy:
        vector, change = (one[name].double() - policy[name].double() for one in (target, merged))
        kept = change != 0
        if kept.any():
            factor = vector.abs().sum() / vector[kept].abs().sum()
            torch.testing.assert_close(change[kept], factor * vector[kept], atol=1e-5, rtol=1e-3)


# -- what lies beside, evaluation, refusals ---------------------------------------------------------------------------


def test_metrics_are_logged_and_evaluated_on_the_merged_model(base, other, tmp_path):
    trainer = make_trainer(base, tmp_path / "run")
    callback = MergeCallback(LinearConfig(), experts={"other": other}).attach(trainer)
    trainer.train()
    logged = next(row for row in trainer.state.log_history if "eval_merged_accuracy" in row)
    merged = make_trainer(tmp_path / "run" / "merged", tmp_path / "again")
    assert logged["eval_merged_loss"] == pytest.approx(merged.evaluate()["eval_loss"], abs=1e-6)
    assert callback.results[0].metrics["eval_merged_loss"] == logged["eval_merged_loss"]


def test_the_tokenizer_of_the_trainer_is_written(base, other, tmp_path):
    callback = MergeCallback(LinearConfig(), experts={"other": other})
    trainer = make_trainer(base, tmp_path / "run", callbacks=[callback])
    trainer.callback_handler.processing_class = BertTokenizer(vocab={f"w{index}": index for index in range(40)})
    trainer.train()
    assert BertTokenizer.from_pretrained(tmp_path / "run" / "merged").get_vocab()["w7"] == 7


def test_a_second_run_replaces_the_result_of_the_first(base, other, tmp_path):
    for seed in (0, 1):
        callback = MergeCallback(LinearConfig(), experts=[other])
        trainer = make_trainer(base, tmp_path / "run", callbacks=[callback], seed=seed)
        trainer.train()
    assert_equal(loaded(tmp_path / "run" / "merged"), mixed((0.5, state_of(trainer.model)), (0.5, loaded(other))))
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["merged"]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"merge_on": "sometimes"}, ConfigError, "merge_on"),
        ({"own": "future"}, ConfigError, "own"),
        ({"own": "start", "max_snapshots": 2}, ConfigError, "max_snapshots"),
        ({"experts": {"trained": "x"}}, ConfigError, "'trained' means the model in training"),
        ({"base_model": "trained"}, ConfigError, "what is it to be merged with"),
    ],
)
def test_bad_arguments(options, error, message):
    with pytest.raises(error, match=message):
        MergeCallback(LinearConfig(), **options)


def test_what_cannot_be_merged_is_found_before_training(base, tmp_path):
    wrong = save_base(tmp_path / "wrong")
    config = json.loads((wrong / "config.json").read_text())
    (wrong / "config.json").write_text(json.dumps(config | {"num_attention_heads": 4}))
    trainer = make_trainer(base, tmp_path / "run", callbacks=[MergeCallback(LinearConfig(), experts=[wrong])])
    with pytest.raises(PlanError, match="num_attention_heads"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_a_folder_of_something_else_is_not_replaced(base, other, tmp_path):
    (tmp_path / "run" / "merged").mkdir(parents=True)
    (tmp_path / "run" / "merged" / "thesis.txt").write_text("years of work")
    trainer = make_trainer(base, tmp_path / "run", callbacks=[MergeCallback(LinearConfig(), experts=[other])])
    with pytest.raises(ConfigError, match="not written by a merge"):
        trainer.train()


def test_a_checkpoint_of_something_else_is_not_replaced(base, other, tmp_path):
    callback = MergeCallback(LinearConfig(), experts=[other], merge_on="epoch_end")
    foreign = tmp_path / "run" / "merged" / "checkpoint-3" / "checkpoint-1"
    foreign.mkdir(parents=True)
    (foreign / "merge_config.json").write_text("{}")
    with pytest.raises(ConfigError, match="not written by a merge"):
        make_trainer(base, tmp_path / "run", callbacks=[callback]).train()
    assert foreign.is_dir()


def test_leftovers_are_not_pruned(base, other, tmp_path):
    left = tmp_path / "run" / "merged" / "checkpoint-7.new"
    left.mkdir(parents=True)
    (left / "merge_config.json").write_text("{}")
    callback = MergeCallback(LinearConfig(), experts=[other], merge_on="epoch_end")
    make_trainer(base, tmp_path / "run", callbacks=[callback], save_total_limit=1).train()
    found = sorted(path.name for path in left.parent.iterdir())
    assert found == ["checkpoint-6", "checkpoint-7.new"]


@pytest.mark.parametrize("options", [{"own": "start"}, {"own": "previous"}, {"base_model": "start"}], ids=str)
def test_a_resumed_training_has_no_start(base, tmp_path, options):
    make_trainer(base, tmp_path / "run", save_strategy="epoch").train()
    again = make_trainer(base, tmp_path / "run", callbacks=[MergeCallback(LinearConfig(), **options)])
    with pytest.raises(ConfigError, match="before the training, which goes on from step 3"):
        again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))


def test_missing_data_are_found_before_training(base, other, tmp_path):
    trainer = make_trainer(base, tmp_path / "run", callbacks=[MergeCallback(RegMeanConfig(), experts=[other])])
    with pytest.raises(PlanError, match="regmean"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_an_adapter_is_no_result(other):
    with pytest.raises(ConfigError, match="output='adapter'"):
        MergeCallback(CatConfig(output="adapter"), experts=[other])


def test_an_evaluation_that_cannot_be_is_told(base, other, tmp_path, caplog):
    trainer = make_trainer(base, tmp_path / "run", callbacks=[MergeCallback(LinearConfig(), experts=[other])])
    trainer.train()
    assert "attach" in caplog.text


# -- several processes ------------------------------------------------------------------------------------------------


def test_other_processes_write_nothing(base, other, tmp_path):
    callback = MergeCallback(LinearConfig(), experts=[other], own="epoch_end")
    trainer = make_trainer(base, tmp_path / "run")
    state, control = TrainerState(is_world_process_zero=False), TrainerControl()
    for event in ("on_train_begin", "on_epoch_end", "on_train_end"):
        getattr(callback, event)(trainer.args, state, control, model=trainer.model)
    assert not (tmp_path / "run" / "merged").exists()
    assert not callback._snapshots


SCRIPT = """
import sys
from dataclasses import dataclass
from pathlib import Path
import torch
from accelerate import PartialState
from hf_merge import LinearConfig, MergeCallback
from tests.training.trainers import make_trainer
base, other, out, merging = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), sys.argv[4] == "merging"
trainer = make_trainer(base, out, per_device_train_batch_size=4, ddp_backend="gloo", eval_strategy="epoch")
if merging:
    MergeCallback(LinearConfig(), experts={"other": other}, merge_on="epoch_end").attach(trainer)
trainer.train()
assert PartialState().num_processes == 2
torch.save(trainer.accelerator.unwrap_model(trainer.model).state_dict(), out / f"rank-{PartialState().process_index}.pt")
if merging and PartialState().is_main_process:
    assert any("eval_merged_loss" in row for row in trainer.state.log_history)
"""


@pytest.mark.slow
def test_two_processes(base, other, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    for kind in ("plain", "merging"):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        out = tmp_path / kind
        run = run_process([*command, str(script), str(base), str(other), str(out), kind], OMP_NUM_THREADS="1")
        assert run.returncode == 0, run.stderr[-3000:]
    plain, *merging = (
        torch.load(tmp_path / name, weights_only=True)
        for name in ("plain/rank-0.pt", "merging/rank-0.pt", "merging/rank-1.pt")
    )
    for state in merging:
        assert_equal(state, plain, exact=True)
    merged = loaded(tmp_path / "merging" / "merged" / "checkpoint-6")
    assert_equal(merged, mixed((0.5, plain), (0.5, loaded(other))))
