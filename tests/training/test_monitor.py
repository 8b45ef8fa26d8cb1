"""Callbacks of transformers and of users work in block-wise training."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import EarlyStoppingCallback, TrainerCallback, TrainerControl, TrainerState

from hf_merge import ConfigError, Merger, ProDistillArguments, ProDistillConfig

from ..zoo import ZOO, perturbed


class Recorder(TrainerCallback):
    """Keeps what it is told."""

    def __init__(self):
        self.events: list[str] = []
        self.logs: list[dict[str, Any]] = []
        self.state: TrainerState | None = None

    def __getattribute__(self, name: str):
        if name.startswith("on_"):
            events = object.__getattribute__(self, "events")

            def record(args, state, control, **kwargs):
                events.append(name)
                self.state = state
                if name == "on_log":
                    self.logs.append(dict(kwargs["logs"]))
                if name == "on_step_begin":
                    assert kwargs["model"] is not None and kwargs["optimizer"] is not None
                return control

            return record
        return object.__getattribute__(self, name)


def merge(config: ProDistillConfig | None = None, **kwargs) -> Merger:
    base = ZOO["vit"].build()
    experts = {task: perturbed(base, seed) for seed, task in enumerate("ab", start=1)}
    merger = Merger.from_pretrained(experts, config or ProDistillConfig(epochs=3, batch_size=1), base_model=base)
    merger.merge({task: ZOO["vit"].inputs() for task in experts}, **kwargs)
    return merger


def test_events_come_in_the_order_of_the_trainer():
    recorder = Recorder()
    merge(callbacks=[recorder])
    epoch = ["on_epoch_begin"] + ["on_step_begin", "on_step_end"] * 2 + ["on_epoch_end", "on_evaluate"]
    assert recorder.events == ["on_init_end"] * recorder.events.count("on_init_end") + [
        "on_train_begin",
        *epoch * 9,
        "on_train_end",
    ]
    assert recorder.state.global_step == recorder.state.max_steps == 18
    assert recorder.state.epoch == pytest.approx(9)


def test_losses_are_logged_as_often_as_the_arguments_say():
    recorder = Recorder()
    merge(callbacks=[recorder], args=ProDistillArguments(logging_steps=3))
    assert len(recorder.logs) == 6
    assert {"loss", "learning_rate", "epoch", "block"} <= set(recorder.logs[0])
    assert [log["block"] for log in recorder.logs] == [0, 0, 1, 1, 2, 2]
    assert [entry["step"] for entry in recorder.state.log_history] == [3, 6, 9, 12, 15, 18]


def test_early_stopping_stops_a_block_and_not_the_merge():
    config = ProDistillConfig(epochs=20, learning_rate=1e-9)
    merger = merge(config, callbacks=[EarlyStoppingCallback(early_stopping_patience=2, early_stopping_threshold=1e-3)])
    assert [report["epochs"] for report in merger.report.blocks.values()] == [3, 3, 3]


def test_a_callback_can_stop_a_block():
    class Impatient(TrainerCallback):
        def on_step_end(self, args, state, control: TrainerControl, **kwargs):
            control.should_training_stop = True
            return control

    merger = merge(callbacks=[Impatient])
    assert [report["epochs"] for report in merger.report.blocks.values()] == [1, 1, 1]


def test_the_seed_of_the_arguments_orders_the_batches():
    config = ProDistillConfig(epochs=2, batch_size=1, learning_rate=0.05)
    states = [merge(config, args=ProDistillArguments(seed=seed)).model.state_dict() for seed in (None, 0, 1)]
    name = "vit.layers.2.mlp.fc1.weight"
    assert (states[0][name] == states[1][name]).all()
    assert (states[0][name] != states[2][name]).any()


@pytest.mark.parametrize(
    ("name", "value"), [("learning_rate", 0.1), ("num_train_epochs", 7), ("lr_scheduler_type", "cosine")]
)
def test_what_belongs_into_the_recipe_is_an_error(name: str, value):
    with pytest.raises(ConfigError, match=f"ProDistillArguments.{name} is part of the recipe"):
        ProDistillArguments(**{name: value})


def test_values_of_the_caches_are_checked():
    with pytest.raises(ConfigError, match="activation_cache_dtype: 'int8'"):
        ProDistillArguments(activation_cache_dtype="int8")
    with pytest.raises(ConfigError, match="must not be negative"):
        ProDistillArguments(activation_cache_limit=-1)


def test_arguments_are_quiet_by_default(capsys: pytest.CaptureFixture[str]):
    merge(args=ProDistillArguments(logging_steps=1))
    assert capsys.readouterr().out == ""
