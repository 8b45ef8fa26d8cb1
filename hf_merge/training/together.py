"""Fine-tune, then merge, in one call: [`merge_trainers`] and [`merge_checkpoints`]."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import Trainer

from ..config import MergeConfig
from ..data.calibration import CalibrationData
from ..engines.opening import name_experts
from ..errors import ConfigError
from ..merger import Merger, default_config
from ..registry import get_merge_method
from .callback import origin_of, refuse_adapter_output
from .snapshots import SavedProcessor, plain_model


def merge_trainers(
    trainers: Mapping[str, Trainer] | Sequence[Trainer],
    config: MergeConfig | None = None,
    *,
    base_model: Any = None,
    train: bool = True,
    num_samples: int = 64,
    seed: int = 0,
    output_dir: str | Path | None = None,
    **merger_kwargs,
) -> Merger:
    """Trains the experts and merges them.

    Heads that differ are kept per task, see [`Merger.model_for`]. Methods that need samples get some of each trainer's training
    data.

    Args:
        trainers (`dict` or `list`): The trainers, by task.
        config ([`MergeConfig`], *optional*): The recipe; `WudiConfig()` when the base model is known.
        base_model (*optional*): The base model. When not given: the checkpoint that all trainers' models were loaded from.
        train (`bool`): Whether trainers that have not trained yet do so now.
        num_samples (`int`): How many samples of each task a method gets that needs some.
        seed (`int`): Of their draw.
        output_dir (`str`, *optional*): Also write the merged model there.
        merger_kwargs: Of [`Merger.from_pretrained`].

    Returns:
        [`Merger`]: After the merge, with `model`, `model_for(task)` and `report`.

    Raises:
        ConfigError: There are no trainers, their data cannot be indexed, or the recipe's result is an adapter.
        PlanError: The models cannot be merged.
    """
    named: dict[str, Trainer] = name_experts(trainers)
    refuse_adapter_output(config)
    untrained = [trainer for trainer in named.values() if train and trainer.state.global_step == 0]
    if untrained:
        _open(named, config, base_model, merger_kwargs).check()
    for trainer in untrained:
        trainer.train()
    merger = _open(named, config, base_model, merger_kwargs)
    data = None
    if get_merge_method(merger.config.merge_type).method_cls.needs_data(merger.config):
        rows = {name: few_shot_rows(name, trainer, num_samples, seed) for name, trainer in named.items()}
        data = CalibrationData(rows)
    merger.merge(data)
    if output_dir is not None:
        merger.save_pretrained(output_dir)
    return merger


def _open(
    named: Mapping[str, Trainer], config: MergeConfig | None, base_model: Any, merger_kwargs: Mapping[str, Any]
) -> Merger:
    """The trainers' models as they are now."""
    models = {name: plain_model(trainer.model, name) for name, trainer in named.items()}
    if base_model is None and (config is None or config.base_model is None):
        origins = {origin_of(model) for model in models.values()}
        base_model = origins.pop() if len(origins) == 1 else None
    config = default_config(base_model is not None) if config is None else config
    merger = Merger.from_pretrained(models, config, base_model=base_model, **merger_kwargs)
    for source in merger.experts:
        saved = SavedProcessor(getattr(named[source.name], "processing_class", None))
        source.processors, source.keep = saved.folder, saved
    return merger


def few_shot_rows(name: str, trainer: Trainer, count: int, seed: int) -> list[Any]:
    """Some rows of a trainer's training data; collated where the rows themselves are not what the model reads.

    Args:
        name (`str`): The task.
        trainer ([`~transformers.Trainer`]): The trainer.
        count (`int`): How many.
        seed (`int`): Of the draw.
    """
    dataset = trainer.train_dataset
    if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        raise ConfigError(
            f"The training data of '{name}' is a {type(dataset).__name__}, from which no samples can be drawn: merge with "
            "Merger.from_pretrained and pass samples."
        )
    generator = np.random.default_rng([seed, *name.encode()])
    rows = [dataset[int(index)] for index in sorted(generator.permutation(len(dataset))[:count])]
    main_input = plain_model(trainer.model, name).main_input_name
    if isinstance(rows[0], Mapping) and main_input in rows[0]:
        return rows
    return [trainer.data_collator([row]) for row in rows]


def merge_checkpoints(
    checkpoints: str | Path | Mapping[str, Any] | Sequence[Any],
    config: MergeConfig | None = None,
    *,
    last: int | None = None,
    base_model: Any = None,
    output_dir: str | Path | None = None,
    **merger_kwargs,
) -> Merger:
    """Merges checkpoints: those of one run (a soup along the trajectory), or any others.

    Args:
        checkpoints (`str`, `dict` or `list`): The output folder of a [`~transformers.Trainer`], whose `checkpoint-<step>` folders
            become the experts `"step_<step>"`; or checkpoints.
        config ([`MergeConfig`], *optional*): The recipe; the plain average when not given.
        last (`int`, *optional*): Only so many, the latest ones.
        base_model (*optional*): The base model.
        output_dir (`str`, *optional*): Write the merged model there, from disk to disk; it is merged in memory otherwise.
        merger_kwargs: Of [`Merger.from_pretrained`].

    Returns:
        [`Merger`]: After the merge.

    Raises:
        ConfigError: There are no checkpoints, or fewer than asked for.
        PlanError: They cannot be merged.
    """
    if isinstance(checkpoints, (str, Path)):
        checkpoints = checkpoints_of(Path(checkpoints))
    named = name_experts(checkpoints)
    if last is not None:
        if not 1 <= last <= len(named):
            raise ConfigError(f"last={last} is not possible: there are {len(named)} checkpoint(s).")
        named = dict(list(named.items())[-last:])
    config = default_config(False) if config is None else config
    merger = Merger.from_pretrained(named, config, base_model=base_model, **merger_kwargs)
    if output_dir is None:
        merger.merge()
    else:
        merger.save_pretrained(output_dir)
    return merger


def checkpoints_of(folder: Path) -> dict[str, Path]:
    """The checkpoints in the output folder of a trainer, by step, in order."""
    found = {int(match[1]): path for path in folder.glob("checkpoint-*") if (match := _STEP.fullmatch(path.name))}
    if not found:
        raise ConfigError(f"There are no checkpoints (checkpoint-<step>) in '{folder}'.")
    return {f"step_{step}": found[step] for step in sorted(found)}


_STEP = re.compile(r"checkpoint-(\d+)")
