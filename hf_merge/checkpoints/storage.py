"""Raw tensors by their names on disk, read one at a time: safetensors, `torch.save` files, and state dicts in memory.

Shapes and dtypes come from headers, so that a merge can be planned before a weight is read. Nothing is unpickled but
tensors (`weights_only=True`), and no name from an index leaves the model's folder.
"""

from __future__ import annotations

import json
import math
import os
import pickle
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import CheckpointError
from .memory import empty_tensor
from .stored import CAN_READ_PARTS, StoredFile, StoredTensor


SAFE_WEIGHTS, SAFE_INDEX = "model.safetensors", "model.safetensors.index.json"
TORCH_WEIGHTS, TORCH_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class TensorInfo:
    """Shape and dtype of a stored tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize


class Storage:
    """Tensors by name on disk. `infos` is filled from headers alone; `read` gives one tensor; `is_on_cpu` says whether no tensor comes
    from another device."""

    infos: dict[str, TensorInfo]
    is_on_cpu: bool = True

    def read(self, key: str) -> Tensor:
        """The tensor `key` in its stored dtype, on the CPU. The caller must not change it."""
        raise NotImplementedError(f"{type(self).__name__} does not implement read")

    def stored(self, key: str) -> StoredTensor | None:
        """The tensor `key` where it is, for reading it in parts; `None` where only [`~Storage.read`] reads."""
        return None

    def fingerprint(self) -> list[Any]:
        """What identifies the stored bytes cheaply (names and [`FileState`]s of the files), for resuming a merge."""
        return []


@dataclass(frozen=True)
class FileState:
    """What tells the content of a file from an earlier one without reading it. Times are in nanoseconds."""

    size: int
    modified: int
    inode: int
    changed: int

    @classmethod
    def of(cls, file: Path | int) -> FileState:
        """The state of a path or a descriptor."""
        found = os.stat(file)
        return cls(found.st_size, found.st_mtime_ns, found.st_ino, found.st_ctime_ns)

    def is_content_of(self, file: Path | int) -> bool:
        """Whether nothing was written to a path or a descriptor since. Links and permissions may have changed, which `changed` tells of
        too."""
        found = os.stat(file)
        return (self.size, self.modified, self.inode) == (found.st_size, found.st_mtime_ns, found.st_ino)


class FileStorage(Storage):
    """Tensors in files, which must stay as they were when they were opened: a header says nothing about another file's data.

    Args:
        files (`Mapping[str, Path]`): The files by name.

    Raises:
        CheckpointError: A file is not there.
    """

    def __init__(self, files: Mapping[str, Path]):
        self.files = dict(files)
        # Before the headers are read: whatever changes from now on is noticed.
        self._states = {path: _state(path) for path in self.files.values()}

    def fingerprint(self) -> list[Any]:
        return [[name, *vars(self._states[path]).values()] for name, path in self.files.items()]

    def _check_unchanged(self, path: Path, file: Path | int) -> None:
        """Raises [`CheckpointError`] unless `path` still has the content that it was opened with."""
        if not self._states[path].is_content_of(file):
            raise CheckpointError(
                f"'{path}' was changed after it was opened: what was read of it does not fit together. Run the merge again when "
                "nothing writes to it."
            )


def _state(path: Path) -> FileState:
    try:
        return FileState.of(path)
    except OSError as error:
        raise CheckpointError(f"Cannot open '{path}': {error}.") from error


class StateDictStorage(Storage):
    """A state dict that is in memory already. Tensors are handed out as they are, without a copy."""

    def __init__(self, state_dict: Mapping[str, Tensor], where: str):
        for key, value in state_dict.items():
            if not isinstance(value, Tensor):
                raise CheckpointError(f"{where}: '{key}' is a {type(value).__name__}, not a tensor.")
            if value.device.type == "meta":
                raise CheckpointError(
                    f"{where}: '{key}' has no data (it is on the meta device, e.g. offloaded): give the model's path instead."
                )
        self.tensors = state_dict
        self.is_on_cpu = all(value.device.type == "cpu" for value in state_dict.values())
        self.infos = {key: TensorInfo(tuple(value.shape), value.dtype) for key, value in state_dict.items()}

    def read(self, key: str) -> Tensor:
        return self.tensors[key].detach()


@dataclass(frozen=True)
class _Span:
    """Where a tensor lies in its file."""

    path: Path
    start: int
    info: TensorInfo


class SafetensorsStorage(FileStorage):
    """One or several safetensors files.

    Data are read with positioned reads into memory of their own rather than through a memory map, so that the resident
    memory is what the merge holds and not what the file's pages left behind.
    """

    def __init__(self, files: Mapping[str, Path], expected: Mapping[str, str] | None = None):
        super().__init__(files)
        self.spans: dict[str, _Span] = {}
        found: dict[str, Path] = {}
        for path in self.files.values():
            for key, span in _header(path).items():
                _refuse_duplicate(key, found, path)
                found[key] = path
                self.spans[key] = span
        _compare_with_index(found, self.files, expected)
        self.infos = {key: span.info for key, span in self.spans.items()}

    def read(self, key: str) -> Tensor:
        span = self.spans[key]
        tensor = empty_tensor(span.info.shape, span.info.dtype)
        try:
            with open(span.path, "rb", buffering=0) as file:
                self._check_unchanged(span.path, file.fileno())
                if span.info.nbytes:
                    _read_into(file, memoryview(tensor.reshape(-1).view(torch.uint8).numpy()), span.start)
                self._check_unchanged(span.path, file.fileno())
        except CheckpointError:
            raise
        except (OSError, EOFError) as error:
            raise CheckpointError(f"Cannot read '{key}' from '{span.path}': {error}.") from error
        return tensor

    def stored(self, key: str) -> StoredTensor | None:
        if not CAN_READ_PARTS:
            return None
        span = self.spans[key]
        file = StoredFile(span.path, partial(self._check_unchanged, span.path))
        return StoredTensor(file, key, span.start, torch.Size(span.info.shape), span.info.dtype)


def _read_into(file: Any, target: memoryview, start: int) -> None:
    file.seek(start)
    done = 0
    while done < len(target):
        count = file.readinto(target[done : done + (1 << 30)])
        if not count:
            raise EOFError("the file ends early, it was truncated after the merge began")
        done += count


def _header(path: Path) -> dict[str, _Span]:
    """The spans of all tensors of one file. safetensors' own reader validates the header completely first."""
    try:
        with safe_open(path, framework="pt") as file:
            keys = set(file.keys())
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            entries = json.loads(file.read(length))
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"'{path}' is not a complete safetensors file: {error}.") from error
    spans = {}
    for key, entry in entries.items():
        if key not in keys:
            continue
        if entry["dtype"] not in DTYPES:
            raise CheckpointError(f"'{path}': '{key}' has the dtype {entry['dtype']}, which cannot be merged.")
        info = TensorInfo(tuple(entry["shape"]), DTYPES[entry["dtype"]])
        spans[key] = _Span(path, 8 + length + entry["data_offsets"][0], info)
    return spans


class TorchStorage(FileStorage):
    """Files written by `torch.save`, memory-mapped where their format allows, loaded with `weights_only=True`."""

    def __init__(self, files: Mapping[str, Path], expected: Mapping[str, str] | None = None):
        super().__init__(files)
        self.tensors: dict[str, Tensor] = {}
        self._places: dict[str, Path] = {}
        for path in self.files.values():
            for key, tensor in _load_torch(path).items():
                _refuse_duplicate(key, self._places, path)
                self._places[key] = path
                self.tensors[key] = tensor
        _compare_with_index(self._places, self.files, expected)
        self.infos = {key: TensorInfo(tuple(value.shape), value.dtype) for key, value in self.tensors.items()}

    def read(self, key: str) -> Tensor:
        path = self._places[key]
        try:
            self._check_unchanged(path, path)
            tensor = self.tensors[key].detach().clone()
            self._check_unchanged(path, path)
        except CheckpointError:
            raise
        except OSError as error:
            raise CheckpointError(f"Cannot read '{key}' from '{path}': {error}.") from error
        return tensor


# What torch's restricted unpickler raises on damaged or foreign bytes: it interprets them as a program for a stack machine.
_LOAD_ERRORS = (
    OSError,
    RuntimeError,
    EOFError,
    pickle.UnpicklingError,
    struct.error,
    zipfile.BadZipFile,
    LookupError,
    ValueError,
    TypeError,
    AttributeError,
    AssertionError,
)


def _load_torch(path: Path) -> dict[str, Tensor]:
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except _LOAD_ERRORS as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"'{path}' cannot be loaded without executing code, or is damaged ({first}). Convert it to safetensors in an "
            "environment that you trust."
        ) from error
    if not isinstance(loaded, Mapping) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in loaded.items()
    ):
        raise CheckpointError(f"'{path}' is not a state dict: a mapping from names to tensors was expected.")
    for key, value in loaded.items():
        if value.dtype not in DTYPE_NAMES or value.layout is not torch.strided:
            raise CheckpointError(
                f"'{path}': '{key}' is a {value.layout} tensor of {value.dtype}, which cannot be merged."
            )
    return dict(loaded)


def _refuse_duplicate(key: str, found: Mapping[str, Path], path: Path) -> None:
    if key in found:
        raise CheckpointError(
            f"The tensor '{key}' is stored twice, in '{found[key]}' and in '{path}': remove the stale file."
        )


def _compare_with_index(
    found: Mapping[str, Path], files: Mapping[str, Path], expected: Mapping[str, str] | None
) -> None:
    """Refuses shards that do not hold what their index says.

    Args:
        found (`Mapping[str, Path]`): Where each tensor is.
        files (`Mapping[str, Path]`): The shards by file name.
        expected (`Mapping[str, str]`, *optional*): The index: tensor -> file name. `None` for a single file.
    """
    if expected is None:
        return
    for key, filename in expected.items():
        if found.get(key) != files[filename]:
            raise CheckpointError(f"The index says that '{key}' is in '{files[filename]}', but it is not there.")
    extra = sorted(set(found) - set(expected))
    if extra:
        raise CheckpointError(
            f"'{found[extra[0]]}' holds '{extra[0]}', which the index beside it does not list ({len(extra)} such tensor(s)): "
            "the shards and the index are of different models."
        )


def open_storage(folder: Path) -> Storage:
    """Finds the weight files of a model folder, in the order of transformers: safetensors, its index, `.bin`, its index.

    Raises:
        CheckpointError: There are none, a shard is missing, or the index is malformed or points outside the folder.
    """
    if not folder.is_dir():
        raise CheckpointError(f"The folder '{folder}' does not exist.")
    for single, index, kind in (
        (SAFE_WEIGHTS, SAFE_INDEX, SafetensorsStorage),
        (TORCH_WEIGHTS, TORCH_INDEX, TorchStorage),
    ):
        weight_map = _weight_map(folder / index) if (folder / index).is_file() else None
        if (folder / single).is_file():
            if weight_map is not None and set(weight_map.values()) != {single}:
                raise CheckpointError(
                    f"'{folder}' holds both '{single}' and '{index}', of which one is stale: remove the one that is not meant."
                )
            return kind({single: folder / single})
        if weight_map is not None:
            return kind({name: folder / name for name in dict.fromkeys(weight_map.values())}, weight_map)
    raise CheckpointError(
        f"No weights in '{folder}': expected '{SAFE_WEIGHTS}', '{SAFE_INDEX}', '{TORCH_WEIGHTS}' or '{TORCH_INDEX}'."
    )


def _weight_map(index: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"'{index}' is not a weight index with the key 'weight_map': {error!r}.") from error
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"'{index}': 'weight_map' must be a non-empty object.")
    for key, name in weight_map.items():
        if not isinstance(name, str) or not _is_plain_name(name):
            raise CheckpointError(
                f"'{index}' places '{key}' in {name!r}: only plain file names beside the index are read."
            )
    missing = sorted({name for name in weight_map.values() if not (index.parent / name).is_file()})
    if missing:
        raise CheckpointError(f"'{index.parent}' lacks the shard(s) {', '.join(missing)} named by '{index.name}'.")
    return weight_map


def _is_plain_name(name: str) -> bool:
    return name not in ("", ".", "..") and not any(character in name for character in "/\\\0:")
