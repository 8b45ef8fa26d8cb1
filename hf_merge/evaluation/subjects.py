"""What can be evaluated: a merger, a merged folder, a model, or models by task. All answer the same three questions: which model
is for a task, what its samples have to fit, and which expert it is compared with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from ..auto import AutoMergedModel
from ..checkpoints.opening import open_source
from ..checkpoints.source import ModelSource
from ..config import CONFIG_NAME, MergeConfig
from ..data.samples import TaskModel
from ..engines.calibrated import task_model
from ..engines.opening import Opening
from ..engines.sealing import HEADS_FOLDER
from ..errors import ConfigError, suggest
from ..hub import ADAPTER_CONFIG_NAME, fetch_folder
from ..merger import Merger
from ..modeling.assembly import assemble


class Subject(Protocol):
    """Something that is evaluated."""

    def check(self, tasks: list[str]) -> None:
        """Raises [`ConfigError`] when there is no model for one of the tasks."""

    def model(self, task: str) -> PreTrainedModel:
        """The model for a task."""

    def fits(self, task: str) -> TaskModel:
        """What samples of a task have to fit."""

    def experts(self) -> dict[str, ModelSource]:
        """The experts that are known, by name."""


def subject_of(subject: Any, trust_remote_code: bool = False) -> Subject:
    """The subject that is meant by a [`Merger`], a path or Hub id, a model, or a dictionary of these by task."""
    if isinstance(subject, Merger):
        return MergerSubject(subject)
    if isinstance(subject, (str, Path)):
        return _of_folder(subject, trust_remote_code)
    if isinstance(subject, PreTrainedModel):
        return ModelsSubject({}, subject)
    if isinstance(subject, Mapping) and subject:
        return ModelsSubject(subject, None, trust_remote_code)
    raise ConfigError(
        f"A {type(subject).__name__} cannot be evaluated: pass a Merger, a folder, a PreTrainedModel, or a dictionary of models by task."
    )


def _of_folder(name: str | Path, trust_remote_code: bool) -> Subject:
    folder, _ = fetch_folder(name)
    if (folder / ADAPTER_CONFIG_NAME).is_file():
        return AdapterSubject(folder, trust_remote_code)
    if not (folder / "config.json").is_file() and (folder / CONFIG_NAME).is_file():
        recipe = MergeConfig.from_pretrained(folder)
        return MergerSubject(Merger.from_pretrained(config=recipe, trust_remote_code=trust_remote_code))
    return FolderSubject(folder, trust_remote_code)


class MergerSubject:
    """The result of a merge in memory, under every expert's head."""

    def __init__(self, merger: Merger):
        self.merger = merger
        self._sources = {source.name: source for source in merger.experts}

    def check(self, tasks: list[str]) -> None:
        if self.merger.plan.heads:
            _check_names(tasks, list(self._sources))

    def model(self, task: str) -> PreTrainedModel:
        if task in self._sources and self.merger.config.heads != "first":
            return self.merger.model_for(task)
        return self.merger.model if self.merger.model is not None else self.merger.merge()

    def fits(self, task: str) -> TaskModel:
        source = self._sources.get(task) or self.merger.experts[0]
        return replace(task_model(source), task=task)

    def experts(self) -> dict[str, ModelSource]:
        return self._sources


class FolderSubject:
    """A folder with weights, merged or not; with heads per task where it has some."""

    def __init__(self, folder: Path, trust_remote_code: bool = False):
        self.folder = folder
        self._trust = trust_remote_code
        self._source = open_source("merged", str(folder), trust_remote_code=trust_remote_code)
        heads = folder / HEADS_FOLDER
        self._heads = sorted(path.name for path in heads.iterdir() if path.is_dir()) if heads.is_dir() else []

    def check(self, tasks: list[str]) -> None:
        if self._heads:
            _check_names(tasks, self._heads)

    def model(self, task: str) -> PreTrainedModel:
        head = task if task in self._heads else None
        with _no_loading_bars():
            return AutoMergedModel.from_pretrained(self.folder, task=head, trust_remote_code=self._trust)

    def fits(self, task: str) -> TaskModel:
        return replace(task_model(self._source), task=task)

    def experts(self) -> dict[str, ModelSource]:
        """Those that the folder's recipe names."""
        if not (self.folder / CONFIG_NAME).is_file():
            return {}
        return _experts_of(MergeConfig.from_pretrained(self.folder), Opening(self._trust))


class AdapterSubject:
    """A folder with a merged adapter, and the same adapter under the heads of other tasks."""

    def __init__(self, folder: Path, trust_remote_code: bool = False):
        self._folder = folder
        self._opening = Opening(trust_remote_code)
        self._recipe = MergeConfig.from_pretrained(folder) if (folder / CONFIG_NAME).is_file() else None
        heads = folder / HEADS_FOLDER
        self._heads = sorted(path.name for path in heads.iterdir() if path.is_dir()) if heads.is_dir() else []

    def check(self, tasks: list[str]) -> None:
        if self._heads:
            _check_names(tasks, self._heads)

    def model(self, task: str) -> PreTrainedModel:
        return load(self._source(task))

    def fits(self, task: str) -> TaskModel:
        return replace(task_model(self._source(task)), task=task)

    def experts(self) -> dict[str, ModelSource]:
        return {} if self._recipe is None else _experts_of(self._recipe, self._opening)

    def _source(self, task: str) -> ModelSource:
        folder = self._folder / HEADS_FOLDER / task if task in self._heads else self._folder
        base = self._recipe.base_model if self._recipe is not None else None
        return self._opening.models({"merged": str(folder)}, base, infer=False)[0][0]


def _experts_of(recipe: MergeConfig, opening: Opening) -> dict[str, ModelSource]:
    """The experts that a recipe names.

    Raises:
        MergeError: They cannot be opened, or were in memory.
    """
    sources, _ = opening.models(recipe.experts or {}, recipe.base_model, infer=False)
    return {source.name: source for source in sources}


class ModelsSubject:
    """Models by task, or one model for all tasks."""

    def __init__(self, models: Mapping[str, Any], default: PreTrainedModel | None, trust_remote_code: bool = False):
        self._sources = {
            name: open_source(name, model, trust_remote_code=trust_remote_code) for name, model in models.items()
        }
        self._default = open_source("model", default) if default is not None else None

    def check(self, tasks: list[str]) -> None:
        if self._default is None:
            _check_names(tasks, list(self._sources))

    def model(self, task: str) -> PreTrainedModel:
        return load(self._source(task))

    def fits(self, task: str) -> TaskModel:
        return replace(fitting(self._source(task)), task=task)

    def experts(self) -> dict[str, ModelSource]:
        return {}

    def _source(self, task: str) -> ModelSource:
        return self._default if self._default is not None else self._sources[task]


def load(source: ModelSource) -> PreTrainedModel:
    """The model of a source, in its own dtype; a model in memory is itself."""
    if source.live is not None:
        return source.live
    state = {name: source.read(name) for name in source.parameters}
    with _no_loading_bars():
        return assemble(source.model_class, source.config, state, source.dtype, source.generation_config)


@contextmanager
def _no_loading_bars() -> Iterator[None]:
    """Without the bars of transformers, which would stand between those of the tasks: one for every model and task."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def fitting(source: ModelSource) -> TaskModel:
    """What samples have to fit; a model in memory has the tokenizer of the local folder that it was loaded from."""
    fits = task_model(source)
    if fits.folder is None and source.live is not None and Path(source.live.name_or_path or "?").is_dir():
        return replace(fits, folder=Path(source.live.name_or_path))
    return fits


@contextmanager
def evaluating(model: PreTrainedModel, device: torch.device | None = None) -> Iterator[PreTrainedModel]:
    """The model in evaluation mode on a device; a model of the user is put back as it was, also where an error occurs. A model that a
    device map has placed stays where it is."""
    modes, origin = {module: module.training for module in model.modules()}, model.device
    moves = device is not None and getattr(model, "hf_device_map", None) is None
    model.eval()
    try:
        yield model.to(device) if moves else model
    finally:
        if moves:
            model.to(origin)
        for module, training in modes.items():
            module.training = training


def _check_names(tasks: list[str], known: list[str]) -> None:
    unknown = [task for task in tasks if task not in known]
    if unknown:
        raise ConfigError(
            f"There is no head for the task '{unknown[0]}'.{suggest(unknown[0], known)} Tasks: {', '.join(known)}."
        )
