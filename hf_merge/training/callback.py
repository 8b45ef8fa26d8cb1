"""[`MergeCallback`]: merges the model that a [`~transformers.Trainer`] is training, with other experts or with its own past."""

from __future__ import annotations

import copy
import logging
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler, DefaultFlowCallback

from ..auto import AutoMergedModel
from ..config import CONFIG_NAME, MergeConfig
from ..data.calibration import CalibrationData
from ..engines.choice import find_data_problems
from ..engines.opening import name_experts
from ..engines.ranks import all_ranks
from ..errors import ConfigError, PlanError
from ..hub import upload_folder
from ..merger import Merger
from ..registry import get_merge_method
from .snapshots import SavedProcessor, plain_model, same_weights, undisturbed, weights_of


logger = logging.getLogger(__name__)

TRAINED, START, PREVIOUS = "trained", "start", "previous"
EVENTS = ("train_end", "epoch_end", "save")
PASTS = (START, PREVIOUS, "epoch_end", "save")
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


@dataclass
class MergeResult:
    """One merge of a run.

    Args:
        step (`int`): The step of training.
        folder (`Path`): Where the merged model is.
        metrics (`dict[str, float]`): Of its evaluation.
    """

    step: int
    folder: Path
    metrics: dict[str, float] = field(default_factory=dict)


class MergeCallback(TrainerCallback):
    """Merges the model in training, as it is in memory: the best one with `load_best_model_at_end`, also with `save_strategy="no"`,
    as a PEFT model, or wrapped for several processes. The training goes on as if the callback were not there, to the bit.

    In recipes the model is called `"trained"`. The merged model is written by the main process into `<output_dir>/merged`, or
    `<output_dir>/merged/checkpoint-<step>` with `merge_on="save"` and `"epoch_end"`, of which `save_total_limit` are kept.

    Args:
        config ([`MergeConfig`], *optional*): The recipe; as [`Merger.from_pretrained`] chooses when not given.
        experts (`dict` or `list`, *optional*): Other models: paths, Hub ids, models in memory.
        base_model (*optional*): The base model. `"start"`: the model as it was when training began; `"trained"`: the model in
            training, which is no expert then. When not given and the method needs one: the checkpoint that the model was loaded from.
        merge_on (`str`): `"train_end"`, `"epoch_end"` or `"save"`.
        own (`str`, *optional*): What of its own past the model is merged with. `"start"`: itself at the beginning, as expert
            `"start"`. `"previous"`: the last result of this callback, as expert `"previous"`, at first the beginning: an average
            over time. `"epoch_end"` or `"save"`: copies made at these events, as experts `"step_<n>"`: a soup. Copies are on the
            CPU.
        max_snapshots (`int`, *optional*): How many copies of `own="epoch_end"` and `"save"` are kept, the last ones.
        data (`dict`, *optional*): Calibration samples by expert, for methods that need some.
        evaluate (`bool`): Evaluate each result on the trainer's evaluation data; needs [`~MergeCallback.attach`].
        metric_key_prefix (`str`): Begins the names of its metrics.
        push_to_hub (`bool`): Upload each result.
        repo_id (`str`, *optional*): Where to; the name of the output folder and "-merged" by default.
        merger_kwargs: Of [`Merger.from_pretrained`]: `dtype`, `device_map`, `token`, ...

    **Attributes**:
        - **results** (`list[MergeResult]`) -- The merges of the last run, in order.

    Example:

        >>> callback = MergeCallback(LinearConfig(), experts={"chat": "me/chat-model"})
        >>> trainer = Trainer(..., callbacks=[callback])
        >>> trainer.train()
    """

    def __init__(
        self,
        config: MergeConfig | None = None,
        experts: Mapping[str, Any] | Sequence[Any] | None = None,
        *,
        base_model: Any = None,
        merge_on: str = "train_end",
        own: str | None = None,
        max_snapshots: int | None = None,
        data: Mapping[str, Any] | None = None,
        evaluate: bool = True,
        metric_key_prefix: str = "eval_merged",
        push_to_hub: bool = False,
        repo_id: str | None = None,
        **merger_kwargs,
    ):
        _check_choice("merge_on", merge_on, EVENTS)
        if own is not None:
            _check_choice("own", own, PASTS)
        if max_snapshots is not None and (max_snapshots < 1 or own not in EVENTS):
            raise ConfigError(
                f"max_snapshots={max_snapshots} must be positive, and is for own='epoch_end' and own='save'."
            )
        self.experts = name_experts(experts) if experts else {}
        reserved = [name for name in self.experts if name in (TRAINED, START, PREVIOUS) or name.startswith("step_")]
        if reserved:
            raise ConfigError(f"The expert name '{reserved[0]}' means the model in training: choose another one.")
        if isinstance(base_model, str) and base_model == TRAINED and not self.experts:
            raise ConfigError(
                "base_model='trained' makes the model in training the base: what is it to be merged with?"
            )
        refuse_adapter_output(config)
        self.config = config
        self.base_model = base_model
        self.merge_on = merge_on
        self.own = own
        self.max_snapshots = max_snapshots
        self.data = data
        self.evaluate = evaluate
        self.metric_key_prefix = metric_key_prefix
        self.push_to_hub = push_to_hub
        self.repo_id = repo_id
        self.merger_kwargs = merger_kwargs
        self.trainer: Trainer | None = None
        self.results: list[MergeResult] = []
        self._snapshots: dict[str, dict[str, Tensor]] = {}
        self._start: dict[str, Tensor] | None = None
        self._previous: dict[str, Tensor] | None = None

    def attach(self, trainer: Trainer) -> MergeCallback:
        """Adds the callback to a trainer, so that it can evaluate the merged models and log to the trainer's reporters.

        Args:
            trainer ([`~transformers.Trainer`]): The trainer.

        Returns:
            [`MergeCallback`]: Itself.
        """
        self.trainer = trainer
        known = trainer.callback_handler.callbacks
        if self in known:
            known.remove(self)
        known.insert(0, self)  # reporters close at the end of training: log before
        return self

    # -- events ---------------------------------------------------------------------------------------------------

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module = None, **kwargs
    ) -> None:
        """Finds out now what could stop the merge at the end."""
        self.results, self._snapshots, self._previous = [], {}, None
        is_start = isinstance(self.base_model, str) and self.base_model == START
        needs_start = is_start or self.own in (START, PREVIOUS)
        if needs_start and state.global_step > 0:
            used = f"own='{self.own}'" if self.own in (START, PREVIOUS) else "base_model='start'"
            raise ConfigError(
                f"{used} needs the weights from before the training, which goes on from step {state.global_step} here: train from "
                "the beginning, or pass the model from before as base_model or as an expert."
            )
        main = state.is_world_process_zero
        if self.evaluate and self.trainer is None and main:
            logger.warning(
                "The merged models are not evaluated: call MergeCallback.attach(trainer), or set evaluate=False."
            )
        self._start = weights_of(model, START) if needs_start and main else None

        def check() -> None:
            _check_free(self._folder(args, state))
            self._check(self._merger(model, kwargs.get("processing_class"), has_snapshots=False))

        with undisturbed():
            on_main_process(check, main, "prepare the merge")

    def on_epoch_end(self, args, state, control, model=None, **kwargs) -> None:
        self._on("epoch_end", args, state, model, kwargs.get("processing_class"))

    def on_save(self, args, state, control, model=None, **kwargs) -> None:
        self._on("save", args, state, model, kwargs.get("processing_class"))

    def on_train_end(self, args, state, control, model=None, **kwargs) -> None:
        self._on("train_end", args, state, model, kwargs.get("processing_class"))

    def _on(self, event: str, args: TrainingArguments, state: TrainerState, model: nn.Module, processor: Any) -> None:
        if self.own == event and state.is_world_process_zero:
            self._snapshots[f"step_{state.global_step}"] = weights_of(model)
            for name in list(self._snapshots)[: -self.max_snapshots if self.max_snapshots else 0]:
                del self._snapshots[name]
        if event == self.merge_on:
            with undisturbed():
                self._merge(args, state, model, processor)

    def _check(self, merger: Merger) -> None:
        data = None if self.data is None else CalibrationData.of(self.data)
        problems = merger.problems()
        if data is None or self.own not in EVENTS:  # the copies to come have names that are not known yet
            problems += find_data_problems(merger.plan, data)
        if problems:
            raise PlanError(problems)

    # -- merging --------------------------------------------------------------------------------------------------

    def _merge(self, args: TrainingArguments, state: TrainerState, model: nn.Module, processor: Any) -> None:
        folder = self._folder(args, state)

        def write() -> None:
            self._write(self._merger(model, processor), folder)
            self._prune(args, folder)
            if self.own == PREVIOUS:
                self._previous = weights_of(AutoMergedModel.from_pretrained(folder), PREVIOUS)

        def upload() -> None:
            upload_folder(folder, self.repo_id or f"{Path(args.output_dir).absolute().name}-merged")

        main = state.is_world_process_zero
        on_main_process(write, main, f"write '{folder}'")
        result = MergeResult(state.global_step, folder)
        self.results.append(result)
        if self.trainer is not None and self.evaluate and self.trainer.eval_dataset is not None:
            result.metrics = evaluate_with(self.trainer, folder, self.metric_key_prefix)
            self.trainer.log(dict(result.metrics))
        if self.push_to_hub:
            on_main_process(upload, main, f"upload '{folder}'")

    def _merger(self, model: nn.Module, processor: Any, has_snapshots: bool = True) -> Merger:
        trained = plain_model(model)
        own = self._own(trained)
        if self.own in EVENTS and not has_snapshots:
            own["step_0"] = trained  # stands for the copies to come
        base = self._base(trained)
        merger = Merger.from_pretrained(own | self.experts, self.config, base_model=base, **self.merger_kwargs)
        saved = SavedProcessor(processor)
        for source in (*merger.experts, merger.base):
            if source is not None and (source.name in own or (source is merger.base and source.folder is None)):
                source.processors, source.keep = saved.folder, saved
        return merger

    def _own(self, trained: PreTrainedModel) -> dict[str, Any]:
        """The experts that are the model in training, now and before. It comes first: the result has its class and config."""
        if self._is_base:
            return {}
        if self._snapshots:
            present = weights_of(trained)
            same = next((name for name, copied in self._snapshots.items() if same_weights(copied, present)), None)
            return {TRAINED: trained} | {name: copied for name, copied in self._snapshots.items() if name != same}
        if self.own == START:
            return {TRAINED: trained, START: self._start}
        if self.own == PREVIOUS:
            return {TRAINED: trained, PREVIOUS: self._start if self._previous is None else self._previous}
        return {TRAINED: trained}

    @property
    def _is_base(self) -> bool:
        return isinstance(self.base_model, str) and self.base_model == TRAINED

    def _base(self, trained: PreTrainedModel) -> Any:
        if isinstance(self.base_model, str) and self.base_model == START:
            return self._start
        if self._is_base:
            return trained
        if self.base_model is not None or (self.config is not None and self.config.base_model is not None):
            return self.base_model
        needed = self.config is not None and get_merge_method(self.config.merge_type).method_cls.requires_base
        return origin_of(trained) if needed else None

    def _folder(self, args: TrainingArguments, state: TrainerState) -> Path:
        folder = Path(args.output_dir).absolute() / "merged"
        return folder if self.merge_on == "train_end" else folder / f"checkpoint-{state.global_step}"

    def _write(self, merger: Merger, folder: Path) -> None:
        """Writes beside the folder first: what is there from an earlier run is replaced by something complete."""
        fresh = folder.with_name(folder.name + ".new")
        for place in (folder, fresh):
            _check_free(place)
        shutil.rmtree(fresh, ignore_errors=True)
        merger.save_pretrained(fresh, data=self.data, distributed=False)
        if folder.is_dir():
            shutil.rmtree(folder)
        fresh.rename(folder)

    def _prune(self, args: TrainingArguments, latest: Path) -> None:
        if self.merge_on == "train_end" or args.save_total_limit is None:
            return
        steps = {
            int(match[1]): path
            for path in latest.parent.glob("checkpoint-*")
            if (match := _CHECKPOINT.fullmatch(path.name)) and _is_ours(path)
        }
        for step in sorted(steps)[: -max(args.save_total_limit, 1)]:
            shutil.rmtree(steps[step])


def evaluate_with(trainer: Trainer, folder: Path, prefix: str) -> dict[str, float]:
    """The metrics of a merged model on a trainer's evaluation data. All processes have to call this.

    Args:
        trainer ([`~transformers.Trainer`]): Its data, collator, metrics and arguments are used; it is not changed.
        folder (`Path`): The merged model.
        prefix (`str`): Begins the names of the metrics.
    """
    model = AutoMergedModel.from_pretrained(folder).to(trainer.args.device)
    shadow = copy.copy(trainer)
    shadow.model = shadow.model_wrapped = model
    shadow.is_in_train = False
    shadow.state, shadow.control = copy.deepcopy(trainer.state), TrainerControl()
    shadow.callback_handler = CallbackHandler([DefaultFlowCallback()], model, trainer.processing_class, None, None)
    return shadow.evaluate(metric_key_prefix=prefix)


def origin_of(model: PreTrainedModel) -> str | None:
    """The checkpoint that a model was loaded from."""
    return getattr(model.config, "_name_or_path", None) or None


def on_main_process(work: Callable[[], None], is_main: bool, what: str) -> None:
    """Does something in the main process while the others wait. Where it fails there, it fails everywhere.

    Args:
        work (`Callable`): Does it.
        is_main (`bool`): Whether this is the main process.
        what (`str`): What it does, for the message.
    """
    all_ranks(what).step(work if is_main else lambda: None, what)


def refuse_adapter_output(config: MergeConfig | None) -> None:
    """Raises for a recipe whose result is an adapter, where a model is wanted."""
    if config is not None and config.output == "adapter":
        raise ConfigError(
            "output='adapter' is not possible here, the result is a model: leave it out, or merge saved adapters with "
            "Merger.from_pretrained(...).save_pretrained(folder)."
        )


def _check_free(folder: Path) -> None:
    if folder.is_dir() and any(folder.iterdir()) and not _is_ours(folder):
        raise ConfigError(f"'{folder}' was not written by a merge: move it away, the merged model goes there.")


def _is_ours(folder: Path) -> bool:
    return (folder / CONFIG_NAME).is_file()


def _check_choice(name: str, value: Any, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ConfigError(
            f"Invalid value for MergeCallback's {name}: {value!r}. It must be one of {', '.join(allowed)}."
        )
