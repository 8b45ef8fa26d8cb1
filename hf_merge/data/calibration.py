"""[`CalibrationData`]: a few samples per task, usually unlabelled, for methods that look at activations."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import ConfigError, suggest
from .batching import Batch, Sample, make_batches
from .labels import read_label
from .samples import TaskModel, read_rows, to_samples


Augmentation = Callable[[int, dict[str, Tensor], np.random.Generator], dict[str, Tensor]]


class CalibrationData:
    """Samples by task, for [`Merger.merge`] and [`Merger.save_pretrained`]. A plain dictionary `{task: samples}` does as well.

    The samples of a task are one of: a `datasets.Dataset`, a list of texts, of images or of dictionaries, a `DataLoader` or
    another iterable of batches, a dictionary of batched tensors. Labels may be there; they are kept apart.

    Args:
        samples (`dict`): The samples by the experts' names.
        num_samples (`int`, *optional*): How many of each task are used, drawn with `seed`. All when not given.
        seed (`int`): Of the draw.
        processor (*optional*): A tokenizer or processor, or a dictionary with one for each task. That of each expert's folder
            when not given.
        columns (`str`, `list[str]` or `dict`, *optional*): The column with the text or image; two columns for pairs of texts. A
            dictionary when the tasks differ.
        max_length (`int`, *optional*): Texts are cut to this many tokens.
        augment (`Callable`, *optional*): Changes samples: `augment(task, arguments, generator) -> arguments`, with the number of
            the task, the tensors of a forward for some samples (of equal shape, for copies), and a numpy generator. Fresh masks
            for a masked language model; for images see [`RandomShift`] and [`Mixup`]. Methods of the FS-Merge family change every batch of training, all others the `copies`.
        copies (`int`): How many times each sample is there; all but the first time it is changed by `augment`.

    Raises:
        ConfigError: A task has no samples.

    Example:

        >>> data = CalibrationData({"spam": spam_texts, "movies": dataset}, num_samples=64, columns={"movies": "review"})
        >>> merger.merge(data)
    """

    def __init__(
        self,
        samples: Mapping[str, Any],
        *,
        num_samples: int | None = None,
        seed: int = 0,
        processor: Any = None,
        columns: str | Sequence[str] | Mapping[str, Any] | None = None,
        max_length: int | None = None,
        augment: Augmentation | None = None,
        copies: int = 1,
    ):
        if not isinstance(samples, Mapping) or not samples:
            raise ConfigError(
                f"Calibration data must be a dictionary {{task: samples}}, got {type(samples).__name__}."
            )
        if num_samples is not None and num_samples < 1:
            raise ConfigError(f"num_samples must be at least 1, got {num_samples}.")
        if copies < 1 or (copies > 1 and augment is None):
            raise ConfigError(f"copies={copies} needs to be positive, and 'augment' to make the copies differ.")
        self.samples = dict(samples)
        self.num_samples = num_samples
        self.seed = seed
        self.processor = processor
        self.columns = columns
        self.max_length = max_length
        self.augment = augment
        self.copies = copies

    @classmethod
    def of(cls, data: CalibrationData | Mapping[str, Any]) -> CalibrationData:
        """`data` itself, or a dictionary of samples as `CalibrationData`."""
        return data if isinstance(data, CalibrationData) else cls(data)

    def problems(self, tasks: Sequence[str]) -> list[str]:
        """What does not fit to the experts, as sentences."""
        found = [
            f"The calibration data name the task '{task}', but no expert is called so.{suggest(task, tasks)} "
            f"Experts: {', '.join(tasks)}."
            for task in self.samples
            if task not in tasks
        ]
        missing = [task for task in tasks if task not in self.samples]
        if missing:
            found.append(
                f"There are no calibration samples for {', '.join(map(repr, missing))}: give some for every expert."
            )
        return found

    def load(self, models: Sequence[TaskModel]) -> TaskSamples:
        """Draws and converts the samples.

        Args:
            models (`Sequence[TaskModel]`): One for each expert, in order.

        Raises:
            ConfigError: A task is empty, or a sample does not fit to its model.
        """
        samples, labels = [], {}
        for task, model in enumerate(models):
            generator = np.random.default_rng([self.seed, *model.task.encode()])
            rows = read_rows(model.task, self.samples[model.task], self.num_samples, generator)
            if not rows:
                raise ConfigError(f"The calibration samples of '{model.task}' are empty.")
            one, labels[model.task] = to_samples(
                rows, model, _for_task(self.processor, model.task), self._columns_of(model.task), self.max_length
            )
            samples.append(
                [*one, *(copy for _ in range(self.copies - 1) for copy in self._changed(task, one, generator))]
            )
            labels[model.task] *= self.copies
        return TaskSamples(samples, labels, [_padding(model) for model in models])

    def _changed(self, task: int, samples: Sequence[Sample], generator: np.random.Generator) -> list[Sample]:
        """A changed copy of every sample; those of equal shapes are changed together."""
        alike: dict[tuple, list[int]] = {}
        for index, sample in enumerate(samples):
            shapes = tuple((key, value.dtype, tuple(value.shape)) for key, value in sample.items())
            alike.setdefault(shapes, []).append(index)
        changed: dict[int, Sample] = {}
        for indices in alike.values():
            batch = {key: torch.stack([samples[index][key] for index in indices]) for key in samples[indices[0]]}
            batch = self.augment(task, batch, generator)
            for row, index in enumerate(indices):
                changed[index] = {key: value[row] for key, value in batch.items()}
        return [changed[index] for index in range(len(samples))]

    def _columns_of(self, task: str) -> Sequence[str] | None:
        columns = _for_task(self.columns, task)
        return [columns] if isinstance(columns, str) else columns


class TaskSamples:
    """The samples of every expert, ready to be batched.

    Args:
        samples (`list[list[Sample]]`): By expert.
        labels (`dict[str, list]`): By task; `None` where there is none.
        paddings (`list[dict]`): What each argument is padded with, by expert.
    """

    def __init__(self, samples: list[list[Sample]], labels: dict[str, list], paddings: list[dict[str, int]]):
        self.samples = samples
        self.labels = labels
        self._paddings = paddings

    def batches(self, batch_size: int) -> list[list[Batch]]:
        """The batches of every expert, samples of similar length together."""
        return [
            make_batches(samples, batch_size, padding)
            for samples, padding in zip(self.samples, self._paddings, strict=True)
        ]

    @property
    def paddings(self) -> list[dict[str, int]]:
        """What each argument is padded with, by expert."""
        return self._paddings

    def labelled(self, configs: Sequence[Any]) -> TaskSamples:
        """The same samples with their labels as the argument `labels`, -100 where it is padded.

        Args:
            configs (`Sequence[PretrainedConfig]`): Of the experts, in order; they know the names of classes.

        Raises:
            ConfigError: A sample has no label, or one that its expert does not know.
        """
        samples = [
            [
                {**sample, "labels": read_label(label, task, index, config)}
                for index, (sample, label) in enumerate(zip(rows, labels, strict=True))
            ]
            for rows, (task, labels), config in zip(self.samples, self.labels.items(), configs, strict=True)
        ]
        return TaskSamples(samples, self.labels, [padding | {"labels": -100} for padding in self._paddings])

    def fingerprint(self) -> str:
        """Identifies the samples."""
        digest = hashlib.sha256()
        for samples in self.samples:
            for sample in samples:
                for key, value in sorted(sample.items()):
                    digest.update(f"{key} {tuple(value.shape)} {value.dtype}".encode())
                    digest.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
            digest.update(b"|")
        return digest.hexdigest()


def _for_task(value: Any, task: str) -> Any:
    return value.get(task) if type(value) is dict else value


def _padding(model: TaskModel) -> dict[str, int]:
    pad = getattr(model.config.get_text_config(), "pad_token_id", None)
    pad = pad if isinstance(pad, int) and pad >= 0 else 0
    return {"input_ids": pad, "decoder_input_ids": pad}
