"""What identifies a measurement: the rows, the code that measures them and the processor, by content, so that finished rows of a
comparison are taken over where nothing changed and nowhere else."""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import pickle
import tempfile
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FunctionType, MethodType
from typing import TYPE_CHECKING, Any

import numpy as np

from ..checkpoints.processors import processor_files
from .metrics import METRICS, Metric


if TYPE_CHECKING:
    from .tasks import EvaluationTask


def fingerprint(rows: Sequence[Any], task: EvaluationTask) -> str:
    """Identifies rows and how they are measured.

    Args:
        rows (`Sequence`): The rows.
        task ([`EvaluationTask`]): How they become inputs, predictions and a number.
    """
    digest = hashlib.sha256(f"{task.measure.name} {task.columns} {task.max_length}".encode())
    for part in (_metric(task.metric), _code(task.predict), _processor(task.processor)):
        digest.update(hashlib.sha256(part).digest())
    for row in rows:
        digest.update(_stable(row))
    return digest.hexdigest()


def folder_fingerprint(folder: Path | None) -> str:
    """Identifies the tokenizer or processor in a model folder."""
    digest = hashlib.sha256()
    for path in sorted(processor_files(folder)) if folder is not None else ():
        digest.update(path.as_posix().encode() + b"\0" + hashlib.sha256(_content(folder / path)).digest())
    return digest.hexdigest()


def _unknown() -> bytes:
    """Equal to nothing: what cannot be identified is measured again."""
    return uuid.uuid4().bytes


def _metric(metric: Any) -> bytes:
    if isinstance(metric, Metric):
        return _stable([metric.name, metric.greater_is_better]) + _code(metric.compute) + _code(metric.reduce)
    if isinstance(metric, (str, Path)):
        path = Path(metric)
        files = sorted(path.rglob("*.py")) if path.is_dir() else [path]
        return str(metric).encode() if str(metric) in METRICS else b"".join(one.read_bytes() for one in files)
    if callable(getattr(metric, "compute", None)) and hasattr(metric, "name"):  # a module of `evaluate`
        return _source(inspect.getmodule(type(metric))) + _stable([metric.name, getattr(metric, "config_name", None)])
    return _code(metric)


def _code(function: Any) -> bytes:
    """The source of a function, and the values that it was made with."""
    if function is None:
        return b"None"
    if isinstance(function, functools.partial):
        return _code(function.func) + _stable([function.args, function.keywords])
    if isinstance(function, MethodType):
        return _code(function.__func__) + _stable(function.__self__)
    if not isinstance(function, FunctionType):
        return _source(type(function)) + _stable(function)
    try:
        bound = [cell.cell_contents for cell in function.__closure__ or ()]
        return _source(function) + _stable([function.__defaults__, function.__kwdefaults__, *bound])
    except (ValueError, RecursionError):  # a name that has no value yet, or functions that refer to each other
        return _unknown()


def _source(thing: Any) -> bytes:
    try:
        return inspect.getsource(thing).encode()
    except (OSError, TypeError):  # typed into a shell, or compiled
        return _unknown()


def _processor(processor: Any) -> bytes:
    """The files that a processor is saved as; that of a model's folder is identified with the model."""
    if processor is None:
        return b"None"
    if not hasattr(processor, "save_pretrained"):
        return _code(processor)
    with tempfile.TemporaryDirectory(prefix="hf_merge-processor-") as folder:
        processor.save_pretrained(folder)
        files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
        return b"".join(path.name.encode() + b"\0" + _content(path) for path in files)


def _content(path: Path) -> bytes:
    if path.name != "tokenizer.json":
        return path.read_bytes()
    definition = json.loads(path.read_text(encoding="utf-8"))
    for key in ("truncation", "padding"):  # left over from the last call
        definition.pop(key, None)
    return json.dumps(definition).encode()


def _stable(value: Any) -> bytes:
    """A text of a value that is the same in every process."""
    if isinstance(value, Mapping):
        return (
            b"{" + b",".join(str(key).encode() + b":" + _stable(value[key]) for key in sorted(value, key=str)) + b"}"
        )
    if isinstance(value, (list, tuple)):
        return b"[" + b",".join(map(_stable, value)) + b"]"
    if isinstance(value, (str, int, float, bool, type(None))):
        return repr(value).encode()
    if isinstance(value, (FunctionType, MethodType, functools.partial)):
        return _code(value)
    array = np.asarray(value)
    if not array.dtype.hasobject:
        return f"{array.shape} {array.dtype}".encode() + array.tobytes()
    if array.ndim:
        return f"{array.shape}".encode() + _stable(array.tolist())
    try:
        return pickle.dumps(value, protocol=4)
    except (pickle.PicklingError, TypeError, AttributeError):
        return _unknown()
