"""Records of what opening a model folder found out: names, kinds, ties, what its config says. They are kept between processes, since
finding it out takes the import of transformers' models, which is longer than many merges.

A record is found by everything that it was made from: the files beside the weights, their headers, this library and transformers. It is
a digest and plain JSON in the cache folder of the Hub (`HF_MERGE_CACHE` names another one, or none when it is empty), never a part of a model,
and a process that has loaded transformers' models already neither reads nor leaves any.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import inspect
import json
import logging
import math
import os
import re
import secrets
import stat
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..kinds import ParameterKind
from ..modeling.anatomy import Anatomy, ParameterInfo
from .description import Description
from .names import ConversionGroup, NameMap
from .storage import DTYPE_NAMES, DTYPES, Storage, TensorInfo


if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from .opening import FolderSource


logger = logging.getLogger(__name__)

CACHE_VARIABLE = "HF_MERGE_CACHE"
CONFIG_FILE, GENERATION_FILE = "config.json", "generation_config.json"
MOST_RECORDS = 256
"""How many records are kept; the oldest ones go first."""

_MODELS = "transformers.modeling_utils"
_RECORD = re.compile(r"[0-9a-f]{40}\.json")
_UNFINISHED = re.compile(r"[0-9a-f]{40}\.json\.[0-9a-f]{8}\.writing")
_DAY = 86400
_SAVED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass
class ModelRecord:
    """What is known of a model folder.

    Args:
        description ([`Description`]): What config and class say.
        anatomy ([`Anatomy`]): What the modules say.
        names ([`NameMap`]): How its files map to parameters.
        files (`dict[str, str]`): What transformers writes beside the weights of a result with this config, by file name, for
            `config.json` with the dtype of the weights behind it.
        origins (`dict[str, list[int]]`): The files of code that all this depends on, with their sizes and times.
    """

    description: Description
    anatomy: Anatomy
    names: NameMap
    files: dict[str, str]
    origins: dict[str, list[int]]

    def to_json(self) -> str:
        anatomy = dataclasses.asdict(self.anatomy)
        anatomy["parameters"] = [
            [one.name, one.kind.value, one.depth, one.shape, one.is_task_head]
            for one in self.anatomy.parameters.values()
        ]
        names = dataclasses.asdict(self.names)
        names["groups"] = [
            [{name: _info_to_json(info) for name, info in group.targets.items()}, group.sources, group.patterns]
            for group in self.names.groups
        ]
        description = dataclasses.asdict(self.description)
        description["labels"] = list(self.description.labels.items())
        content = {"description": description, "anatomy": anatomy, "names": names}
        content |= {"files": self.files, "origins": self.origins}
        text = json.dumps(content)
        return f"{_digest(text)}\n{text}"

    @classmethod
    def from_json(cls, text: str) -> ModelRecord:
        """The inverse of [`~ModelRecord.to_json`]; raises `ValueError`, `LookupError`, `TypeError` or `AttributeError` on anything else."""
        digest, _, text = text.partition("\n")
        if digest != _digest(text):
            raise ValueError("its content is not what was written")
        content = json.loads(text)
        description = Description(**content["description"])
        description.labels = dict(description.labels)
        anatomy = Anatomy(**content["anatomy"])
        anatomy.parameters = {
            name: ParameterInfo(name, ParameterKind(kind), depth, tuple(shape), is_head)
            for name, kind, depth, shape, is_head in anatomy.parameters
        }
        names = NameMap(**content["names"])
        names.groups = [
            ConversionGroup({name: _info_from_json(info) for name, info in targets.items()}, sources, patterns)
            for targets, sources, patterns in names.groups
        ]
        return cls(description, anatomy, names, dict(content["files"]), dict(content["origins"]))

    @classmethod
    def of(cls, source: FolderSource) -> ModelRecord | None:
        """The record of an opened folder; `None` where code that is not transformers' has a part in it, or a config cannot be saved."""
        if source.description.has_code or not source.description.class_path.startswith("transformers."):
            return None
        try:
            files, origins = _saved_files(source), _origins(source)
        except (
            OSError,
            ValueError,
            TypeError,
            KeyError,
        ) as error:  # configs that cannot be saved, code that is in no file
            logger.debug("No record of %s is kept: %r", source, error)
            return None
        return cls(source.description, source.anatomy, source.names, files, origins)

    def is_current(self) -> bool:
        """Whether the code that it depends on is as it was."""
        return bool(self.origins) and all(_state(path) == state for path, state in self.origins.items())


@dataclass
class Recorder:
    """Finds and keeps records. Made before any model is opened: from then on the process may have loaded transformers' models.

    Args:
        folder (`Path`, *optional*): Where the records are; `None` where none are used.
    """

    folder: Path | None = field(default_factory=lambda: None if _MODELS in sys.modules else cache_folder())
    _known: dict[str, ModelRecord | None] = field(default_factory=dict, repr=False)
    _looked_for: dict[Path, Path] = field(default_factory=dict, repr=False)
    _headers: dict[int, tuple[Storage, str]] = field(default_factory=dict, repr=False)

    def find(self, folder: Path, storage: Storage) -> ModelRecord | None:
        """The record of a model folder, or `None`.

        Args:
            folder (`Path`): The folder.
            storage ([`Storage`]): Its tensors.
        """
        path = self._path(folder, storage)
        if path is None:
            return None
        self._looked_for[folder] = path
        if path.name not in self._known:
            self._known[path.name] = _read(path)
        return self._known[path.name]

    def keep(self, source: FolderSource) -> None:
        """Leaves a record of an opened folder. A cache that cannot be written is no error."""
        path = self._path(source.folder, source.storage)
        if path is None or self._known.get(path.name) is not None:
            return
        if path != self._looked_for.get(source.folder):  # its config was changed after it was opened
            return
        record = self._known[path.name] = ModelRecord.of(source)
        if record is None:
            return
        writing = path.with_name(f"{path.name}.{secrets.token_hex(4)}.writing")
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with open(os.open(writing, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
                file.write(record.to_json())
            os.replace(writing, path)
            _forget_oldest(path.parent)
        except OSError as error:
            logger.debug("No record of %s is kept: %s", source, error)
            with suppress(OSError):
                writing.unlink(missing_ok=True)

    def _path(self, folder: Path, storage: Storage) -> Path | None:
        """The file of a record, which is named by what it is found by; `None` where there can be none."""
        transformers = importlib.util.find_spec("transformers")
        if self.folder is None or transformers is None:
            return None
        try:
            beside = [(folder / name).read_bytes() if (folder / name).is_file() else b"" for name in _BESIDE]
        except OSError:
            return None
        if id(storage) not in self._headers:
            headers = [[key, DTYPE_NAMES[info.dtype], info.shape] for key, info in sorted(storage.infos.items())]
            self._headers[id(storage)] = storage, _digest(json.dumps(headers))
        _, headers = self._headers[id(storage)]
        digest = hashlib.sha256(json.dumps([transformers.origin, __file__, headers]).encode())
        for content in beside:
            digest.update(hashlib.sha256(content).digest())
        return self.folder / f"{digest.hexdigest()[:40]}.json"


_BESIDE = (CONFIG_FILE, GENERATION_FILE)


def cache_folder() -> Path | None:
    """Where records are kept; `None` when the user wants none."""
    wanted = os.environ.get(CACHE_VARIABLE)
    if wanted is not None:
        return Path(wanted).expanduser() if wanted else None
    from huggingface_hub.constants import HF_HOME

    return Path(HF_HOME) / "hf_merge"


def _read(path: Path) -> ModelRecord | None:
    try:
        if not (_is_own(path.parent) and _is_own(path)):
            logger.debug("The record '%s' is not used: others may write it.", path)
            return None
        record = ModelRecord.from_json(path.read_text(encoding="utf-8"))
        if not record.is_current():
            return None
        with suppress(OSError):
            os.utime(path)  # the ones that are used stay
        return record
    except FileNotFoundError:
        return None
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        logger.debug("The record '%s' cannot be read: %r", path, error)
        return None


def _is_own(path: Path) -> bool:
    """Whether nobody but this user may write a file or folder, where the system tells."""
    if not hasattr(os, "geteuid"):
        return True
    found = path.stat()
    return found.st_uid == os.geteuid() and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def _forget_oldest(folder: Path) -> None:
    """Removes the records that were not used for longest, and what processes that were killed left. Other files stay."""
    records = [path for path in folder.iterdir() if _RECORD.fullmatch(path.name)]
    for path in sorted(records, key=_last_use)[:-MOST_RECORDS]:
        path.unlink(missing_ok=True)
    for path in folder.iterdir():
        if _UNFINISHED.fullmatch(path.name) and _last_use(path) < time.time() - _DAY:
            path.unlink(missing_ok=True)


def _last_use(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:  # another process removed it
        return math.inf


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _info_to_json(info: TensorInfo) -> list[Any]:
    return [DTYPE_NAMES[info.dtype], info.shape]


def _info_from_json(content: list[Any]) -> TensorInfo:
    return TensorInfo(tuple(content[1]), DTYPES[content[0]])


def _saved_files(source: FolderSource) -> dict[str, str]:
    """What transformers writes beside the weights, see [`ModelRecord`]."""
    files = {}
    with tempfile.TemporaryDirectory(prefix="hf_merge-record-") as temporary:
        for dtype in _SAVED_DTYPES:
            source.config_for(dtype).save_pretrained(temporary)
            files[f"{CONFIG_FILE} {dtype}"] = (Path(temporary) / CONFIG_FILE).read_text(encoding="utf-8")
        if source.generation_config is not None:
            source.generation_config.save_pretrained(temporary)
            files[GENERATION_FILE] = (Path(temporary) / GENERATION_FILE).read_text(encoding="utf-8")
    return files


def _origins(source: FolderSource) -> dict[str, list[int]]:
    """The files that define the classes of the modules and of the configs, and those that read them."""
    things = [source.generation_config, *source.shell.modules(), *_with_parts(source.config)]
    classes = {one for thing in things for one in type(thing).__mro__}
    modules = {one.__module__ for one in classes if one.__module__.startswith("transformers.")}
    modules |= {"transformers", "transformers.conversion_mapping", "transformers.core_model_loading", "torch.version"}
    modules |= {name for name in sys.modules if name.startswith((f"{_PACKAGE}.checkpoints.", f"{_PACKAGE}.modeling."))}
    modules.add(f"{_PACKAGE}.kinds")
    paths: Iterable[str] = (inspect.getfile(sys.modules[name]) for name in sorted(modules))
    return {path: _state(path) for path in paths}


def _with_parts(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    """A config and those of the parts of the model."""
    yield config
    for part in vars(config).values():
        if hasattr(part, "model_type"):
            yield from _with_parts(part)


_PACKAGE = __name__.partition(".")[0]


def _state(path: str) -> list[int] | None:
    """Size and time of a file."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return [found.st_size, found.st_mtime_ns]
