"""Drives transformers' callbacks from the training of blocks: progress bars, loggers, early stopping and callbacks of users."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import get_reporting_integration_callbacks
from transformers.trainer_callback import CallbackHandler, DefaultFlowCallback, ProgressCallback
from transformers.utils import logging

from ..engines.options import EngineOptions
from ..methods.block_base import BlockMonitor
from .arguments import ProDistillArguments


class CallbackMonitor(BlockMonitor):
    """One run for the whole merge: `on_train_begin` and `on_train_end` once, steps and epochs counted over all blocks.

    `control.should_training_stop` ends the training of the current block, and the merge goes on with the next one;
    `control.should_epoch_stop` ends the current pass. `state.best_metric` is forgotten at the beginning of a block.

    Args:
        args ([`~transformers.TrainingArguments`]): Of the run.
        callbacks (`Sequence`, *optional*): Classes or instances of [`~transformers.TrainerCallback`].
    """

    def __init__(
        self, args: TrainingArguments, callbacks: Sequence[TrainerCallback | type[TrainerCallback]] | None = None
    ):
        self.args = args
        known: list[Any] = [DefaultFlowCallback, *get_reporting_integration_callbacks(args.report_to)]
        if not args.disable_tqdm and logging.is_progress_bar_enabled():
            known.append(ProgressCallback)
        self.handler = CallbackHandler([*known, *(callbacks or ())], None, None, None, None)
        self.state = TrainerState()
        self.control = TrainerControl()
        self.block = ""
        self._blocks = 0
        self._index = -1
        self._started = False
        self._logged = (0, 0.0)
        self._epoch_steps = 1
        self._epoch_start = 0.0

    def begin(self, blocks: int) -> None:
        self._blocks = blocks

    def begin_block(
        self, name: str, module: nn.Module, optimizer: torch.optim.Optimizer, epochs: int, steps: int
    ) -> None:
        self.block = name
        self._index += 1
        self.handler.model, self.handler.optimizer = module, optimizer
        self.state.best_metric = None
        self.control.should_training_stop = False
        self._epoch_steps = steps
        if not self._started:
            self._start(epochs, steps)
        self._logged = (self.state.global_step, 0.0)

    def _start(self, epochs: int, steps: int) -> None:
        self._started = True
        self.state.max_steps = self._blocks * epochs * steps
        self.state.num_train_epochs = self._blocks * epochs
        self.state.epoch = 0.0
        self.state.compute_steps(self.args, self.state.max_steps)
        self.control = self.handler.on_train_begin(self.args, self.state, self.control)
        self.control.should_training_stop = False

    def begin_epoch(self) -> None:
        self._epoch_start = self.state.epoch
        self.control = self.handler.on_epoch_begin(self.args, self.state, self.control)

    def begin_step(self) -> None:
        self.control = self.handler.on_step_begin(self.args, self.state, self.control)

    def end_step(self, loss: float, learning_rate: float) -> bool:
        self.state.global_step += 1
        self.state.epoch += 1 / self._epoch_steps
        step, total = self._logged
        self._logged = (step, total + loss)
        self.control = self.handler.on_step_end(self.args, self.state, self.control)
        # The default flow ends a run at max_steps; a block ends by its own epochs.
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = False
        self._log(learning_rate)
        return self.control.should_epoch_stop or self.control.should_training_stop

    def end_epoch(self, loss: float) -> bool:
        self.state.epoch = float(round(self._epoch_start + 1))
        self.control = self.handler.on_epoch_end(self.args, self.state, self.control)
        if self.control.should_evaluate:
            metrics = {"eval_loss": loss, "epoch": self.state.epoch}
            self.control = self.handler.on_evaluate(self.args, self.state, self.control, metrics)
            self._remember_best(loss)
        self._log(self.handler.optimizer.param_groups[0]["lr"])
        return self.control.should_training_stop

    def end_block(self) -> None:
        self.handler.optimizer = None

    def _remember_best(self, loss: float) -> None:
        if self.state.best_metric is None or loss < self.state.best_metric:
            self.state.best_metric = loss

    def _log(self, learning_rate: float) -> None:
        if not self.control.should_log:
            return
        self.control.should_log = False
        step, total = self._logged
        count = self.state.global_step - step
        if count:
            logs: dict[str, Any] = {
                "loss": total / count,
                "learning_rate": learning_rate,
                "epoch": self.state.epoch,
                "block": self._index,
            }
            self._logged = (self.state.global_step, 0.0)
            self.state.log_history.append(logs | {"step": self.state.global_step, "block_name": self.block})
            self.control = self.handler.on_log(self.args, self.state, self.control, logs)

    def end(self) -> None:
        if self._started:
            self.control = self.handler.on_train_end(self.args, self.state, self.control)


def engine_options(
    args: ProDistillArguments | None = None, callbacks: Sequence[TrainerCallback | type[TrainerCallback]] | None = None
) -> EngineOptions:
    """What an engine is told by arguments and callbacks.

    Args:
        args ([`ProDistillArguments`], *optional*): The defaults when not given.
        callbacks (`Sequence`, *optional*): Classes or instances of [`~transformers.TrainerCallback`].
    """
    args = ProDistillArguments() if args is None else args
    return args.engine_options(CallbackMonitor(args, callbacks))
