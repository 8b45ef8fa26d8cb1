"""From what users have (datasets, texts, images, loaders, tensors) to single samples as a model's forward takes them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..errors import ConfigError, MissingDependencyError
from .batching import Sample, without_padding


if TYPE_CHECKING:
    from transformers import PretrainedConfig


LABELS = ("labels", "label", "label_ids")
SINGLE_DIMENSIONS = {
    "input_ids": 1,
    "decoder_input_ids": 1,
    "input_values": 1,
    "input_features": 2,
    "inputs_embeds": 2,
    "pixel_values": 3,
}
"""How many dimensions an argument of one sample has; one more means a batch."""


@dataclass(frozen=True)
class TaskModel:
    """What samples have to fit.

    Args:
        task (`str`): The expert's name.
        config ([`~transformers.PretrainedConfig`]): Its config.
        arguments (`frozenset[str]`): The arguments of its forward.
        main_input (`str`): The one that carries the samples.
        positions (`int`, *optional*): The largest number of tokens.
        folder (`Path`, *optional*): Where its tokenizer or processor is.
    """

    task: str
    config: PretrainedConfig
    arguments: frozenset[str]
    main_input: str
    positions: int | None = None
    folder: Path | None = None


def read_rows(task: str, samples: Any, wanted: int | None, generator: np.random.Generator) -> list[Any]:
    """The rows of a task: dictionaries, texts or images, drawn at random where the container can be indexed.

    Args:
        task (`str`): For messages.
        samples: The container.
        wanted (`int`, *optional*): How many; all of them when not given.
        generator (`numpy.random.Generator`): Draws them.
    """
    if isinstance(samples, (str, bytes)):
        raise ConfigError(f"The samples of '{task}' are one string: pass a list of texts.")
    if isinstance(samples, Tensor):
        samples = list(samples)
    if isinstance(samples, Mapping):
        samples = _rows_of_mapping(task, samples)
    if hasattr(samples, "__getitem__") and hasattr(samples, "__len__"):
        rows = _draw(samples, wanted, generator)
        rows = [row for item in rows for row in _unbatched(item)]
        return (
            rows
            if wanted is None or len(rows) <= wanted
            else [rows[i] for i in _indices(len(rows), wanted, generator)]
        )
    if isinstance(samples, Iterable):
        return _take(samples, wanted)
    raise ConfigError(
        f"The samples of '{task}' are a {type(samples).__name__}: pass a datasets.Dataset, a list of texts, images or "
        "dictionaries, a DataLoader, or a dictionary of tensors."
    )


def _indices(count: int, wanted: int, generator: np.random.Generator) -> list[int]:
    return sorted(int(index) for index in generator.permutation(count)[:wanted])


def _draw(samples: Sequence[Any], wanted: int | None, generator: np.random.Generator) -> list[Any]:
    if wanted is None or wanted >= len(samples):
        return [samples[index] for index in range(len(samples))]
    return [samples[index] for index in _indices(len(samples), wanted, generator)]


def _take(samples: Iterable[Any], wanted: int | None) -> list[Any]:
    """The first rows of something that can only be iterated, such as a DataLoader."""
    rows: list[Any] = []
    for item in samples:
        rows += _unbatched(item)
        if wanted is not None and len(rows) >= wanted:
            return rows[:wanted]
    return rows


def _rows_of_mapping(task: str, samples: Mapping[str, Any]) -> list[dict[str, Any]]:
    sizes = {key: len(value) for key, value in samples.items() if hasattr(value, "__len__")}
    if len(sizes) < len(samples) or len(set(sizes.values())) > 1:
        raise ConfigError(
            f"The samples of '{task}' are a dictionary whose values differ in length ({sizes}): every value needs one row per "
            "sample."
        )
    count = next(iter(sizes.values()), 0)
    return [{key: value[index] for key, value in samples.items()} for index in range(count)]


def _unbatched(item: Any) -> list[Any]:
    """One row, or the rows of a batch."""
    if not isinstance(item, Mapping):
        return [item]
    for key, dimensions in SINGLE_DIMENSIONS.items():
        value = item.get(key)
        if isinstance(value, Tensor) and value.dim() == dimensions + 1:
            count = value.shape[0]
            batched = {name: one for name, one in item.items() if isinstance(one, Tensor) and len(one) == count}
            return [{name: one[index] for name, one in batched.items()} for index in range(count)]
    return [item]


def to_samples(
    rows: Sequence[Any],
    model: TaskModel,
    processor: Any = None,
    columns: Sequence[str] | None = None,
    max_length: int | None = None,
) -> tuple[list[Sample], list[Any]]:
    """Turns rows into arguments of a model's forward.

    Args:
        rows (`Sequence`): Dictionaries, texts or images.
        model ([`TaskModel`]): What they have to fit.
        processor (*optional*): A tokenizer or processor; that of the expert's folder when it is needed and not given.
        columns (`Sequence[str]`, *optional*): Which columns hold the text (two for pairs) or the image.
        max_length (`int`, *optional*): Texts are cut to this many tokens.

    Returns:
        `tuple`: The samples, and their labels, apart (`None` where a row has none).
    """
    labels = [_label(row) for row in rows]
    if isinstance(rows[0], Mapping) and model.arguments.intersection(rows[0]):
        samples = [_from_row(row, model, index) for index, row in enumerate(rows)]
    else:
        contents = [_contents(row, model, columns) for row in rows]
        samples = _process(contents, model, processor, max_length)
    samples = [_with_decoder_inputs(without_padding(sample), model.config, model.arguments) for sample in samples]
    for index, sample in enumerate(samples):
        _check(sample, model, index)
    return samples, labels


def _label(row: Any) -> Any:
    if not isinstance(row, Mapping):
        return None
    return next((row[key] for key in LABELS if key in row), None)


def _from_row(row: Mapping[str, Any], model: TaskModel, index: int) -> dict[str, Tensor]:
    where = f"sample {index} of '{model.task}'"
    if not isinstance(row, Mapping):
        raise ConfigError(f"The {where} is a {type(row).__name__}, the first one is a dictionary: pass one form only.")
    try:
        sample = {
            key: torch.as_tensor(np.asarray(value) if isinstance(value, list) else value)
            for key, value in row.items()
            if key in model.arguments and key not in LABELS and value is not None
        }
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(f"The {where} cannot be turned into tensors: {error}") from error
    if not sample:
        raise ConfigError(f"The {where} has none of the arguments of the model, such as '{model.main_input}'.")
    return {
        key: value.float() if value.is_floating_point() else value.long() if value.dtype != torch.bool else value
        for key, value in sample.items()
    }


def _contents(row: Any, model: TaskModel, columns: Sequence[str] | None) -> Any:
    """The text, pair of texts or image of a row."""
    if not isinstance(row, Mapping):
        return row
    if columns is None:
        found = [key for key, value in row.items() if isinstance(value, str) and key not in LABELS]
        if not found:
            found = [key for key, value in row.items() if key not in LABELS and not isinstance(value, (int, float))]
        if len(found) != 1:
            raise ConfigError(
                f"The samples of '{model.task}' have the columns {', '.join(map(str, row))}: name the one with the text or "
                "image, CalibrationData(..., columns='text')."
            )
        columns = found
    missing = [column for column in columns if column not in row]
    if missing:
        raise ConfigError(
            f"The samples of '{model.task}' have no column '{missing[0]}', only {', '.join(map(str, row))}."
        )
    values = tuple(row[column] for column in columns)
    return values if len(values) > 1 else values[0]


def _process(contents: Sequence[Any], model: TaskModel, processor: Any, max_length: int | None) -> list[Sample]:
    if isinstance(contents[0], (str, tuple)):
        return _tokenize(contents, model, processor or _load(model, "AutoTokenizer"), max_length)
    processor = processor or _load(model, "AutoImageProcessor")
    encoded = processor(list(contents), return_tensors="pt")
    return [
        {key: value[index] for key, value in encoded.items() if key in model.arguments}
        for index in range(len(contents))
    ]


def _tokenize(contents: Sequence[Any], model: TaskModel, tokenizer: Any, max_length: int | None) -> list[Sample]:
    limits = [limit for limit in (max_length, model.positions, getattr(tokenizer, "model_max_length", None)) if limit]
    pairs = isinstance(contents[0], tuple)
    texts = list(zip(*contents, strict=True)) if pairs else [contents]
    encoded = tokenizer(*map(list, texts), truncation=bool(limits), max_length=min(limits, default=None))
    names = [key for key in encoded if key in model.arguments]
    return [{key: torch.tensor(encoded[key][index]) for key in names} for index in range(len(contents))]


def _load(model: TaskModel, auto_class: str) -> Any:
    import transformers

    remedy = "pass the samples as dictionaries of tensors, or CalibrationData(..., processor=...)."
    if model.folder is None:
        raise ConfigError(f"The expert '{model.task}' was given in memory, without a tokenizer or processor: {remedy}")
    try:
        return getattr(transformers, auto_class).from_pretrained(
            model.folder, local_files_only=True, trust_remote_code=False
        )
    except ImportError as error:
        raise MissingDependencyError("torchvision", "Reading images") from error
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(
            f"No {auto_class} can be loaded from '{model.folder}', the expert '{model.task}': {remedy}"
        ) from error


def _with_decoder_inputs(sample: Sample, config: PretrainedConfig, arguments: frozenset[str]) -> Sample:
    """Adds what an encoder-decoder's decoder reads, where it was not given: the input, shifted right by its start token, or
    that token alone when the input is not text."""
    if not config.is_encoder_decoder or "decoder_input_ids" not in arguments:
        return sample
    if "decoder_input_ids" in sample or "decoder_inputs_embeds" in sample:
        return sample
    text_config = config.get_text_config(decoder=True)
    start = getattr(text_config, "decoder_start_token_id", None)
    start = start if start is not None else getattr(text_config, "bos_token_id", None) or 0
    tokens = torch.full((1,), start, dtype=torch.long)
    if "input_ids" in sample:
        tokens = torch.cat([tokens, sample["input_ids"][:-1]])
    return {**sample, "decoder_input_ids": tokens}


def _check(sample: Sample, model: TaskModel, index: int) -> None:
    where = f"Sample {index} of '{model.task}'"
    for key, value in sample.items():
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise ConfigError(f"{where} holds NaN or infinity in '{key}': remove it.")
        if key in SINGLE_DIMENSIONS and value.dim() != SINGLE_DIMENSIONS[key]:
            raise ConfigError(
                f"{where}: '{key}' has the shape {tuple(value.shape)}; {SINGLE_DIMENSIONS[key]} dimension(s) were expected."
            )
        too_long = model.positions is not None and key in ("input_ids", "decoder_input_ids")
        if too_long and len(value) > model.positions:
            raise ConfigError(
                f"{where} has {len(value)} tokens in '{key}', but the model has {model.positions} positions: cut it."
            )
