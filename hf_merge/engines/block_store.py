"""Where finished blocks wait for the end of a merge: in memory, or in files from which a killed merge goes on."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..checkpoints.folder import SHARED_WITHIN
from ..errors import OutputError


_RECORD = "blocks.json"


class BlockStore:
    """Keeps the merged parameters of finished blocks, in their output dtype.

    Args:
        folder (`Path`, *optional*): Keeps them in files there. In memory when not given.
        fingerprint (`str`): Identifies recipe, models and samples; files of another fingerprint are discarded.
        writes (`bool`): Whether this process puts blocks there; one that does not reads what another one puts, see
            [`~BlockStore.follow`].

    Raises:
        OutputError: The folder holds something else, or cannot be written.
    """

    def __init__(self, folder: Path | None = None, fingerprint: str = "", writes: bool = True):
        self.folder = folder
        self._tensors: dict[str, Tensor] = {}
        self._reports: dict[str, dict[str, Any]] = {}
        self._block_of: dict[str, str] = {}
        if folder is not None and writes:
            self._recover(fingerprint)

    def __contains__(self, block: str) -> bool:
        return block in self._reports

    def has(self, name: str) -> bool:
        """Whether a parameter belongs to a finished block."""
        return name in self._block_of

    @property
    def finished(self) -> list[str]:
        """The finished blocks."""
        return list(self._reports)

    def follow(self, blocks: Sequence[str]) -> None:
        """Takes over blocks that another process has put into the folder.

        Args:
            blocks (`Sequence[str]`): Their names.

        Raises:
            OutputError: They do not appear there.
        """
        deadline = time.monotonic() + SHARED_WITHIN
        for block in blocks:
            while block not in self and not self._is_taken_over(self._path(block)):
                if time.monotonic() > deadline:
                    raise OutputError(
                        f"'{self._path(block)}', a finished block of rank 0, is not there: all ranks must be given one work folder, on a "
                        "file system that their hosts share."
                    )
                time.sleep(0.05)

    def report(self, block: str) -> dict[str, Any]:
        """What was reported about a finished block."""
        return self._reports[block]

    def put(self, block: str, tensors: Mapping[str, Tensor], report: Mapping[str, Any]) -> None:
        """Keeps a finished block.

        Args:
            block (`str`): Its name.
            tensors (`Mapping[str, torch.Tensor]`): Its parameters by module name.
            report (`Mapping`): JSON-ready data about it.
        """
        if self.folder is None:
            self._tensors.update(tensors)
        else:
            self._write(block, tensors, report)
        self._reports[block] = dict(report)
        self._block_of.update(dict.fromkeys(tensors, block))

    def read(self, name: str) -> Tensor:
        """A parameter of a finished block."""
        if self.folder is None:
            return self._tensors[name]
        with safe_open(self._path(self._block_of[name]), framework="pt") as file:
            return file.get_tensor(name)

    def _path(self, block: str) -> Path:
        return self.folder / f"{block}.safetensors"

    def _write(self, block: str, tensors: Mapping[str, Tensor], report: Mapping[str, Any]) -> None:
        path = self._path(block)
        temporary = path.with_suffix(".writing")
        try:
            contents = {name: tensor.contiguous() for name, tensor in tensors.items()}
            save_file(contents, temporary, metadata={"block": block, "report": json.dumps(report)})
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except OSError as error:
            raise OutputError(f"Cannot write the finished block '{path}': {error}.") from error

    def _recover(self, fingerprint: str) -> None:
        record, known = self.folder / _RECORD, json.dumps({"fingerprint": fingerprint})
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not record.is_file() and any(self.folder.iterdir()):
                raise OutputError(
                    f"The work folder '{self.folder}' holds other files: choose another one, or remove it first."
                )
            if not record.is_file() or record.read_text(encoding="utf-8", errors="replace") != known:
                for path in self.folder.glob("*.safetensors"):
                    path.unlink()
                record.write_text(known, encoding="utf-8")
            for path in sorted(self.folder.glob("*.safetensors")):
                self._take_over(path)
        except OutputError:
            raise
        except OSError as error:
            raise OutputError(f"The work folder '{self.folder}' cannot be used: {error}.") from error

    def _take_over(self, path: Path) -> None:
        """Keeps a finished block; one that is damaged is done again."""
        if not self._is_taken_over(path):
            path.unlink()

    def _is_taken_over(self, path: Path) -> bool:
        try:
            with safe_open(path, framework="pt") as file:
                metadata, names = file.metadata() or {}, list(file.keys())
            block, report = metadata["block"], json.loads(metadata["report"])
        except (FileNotFoundError, SafetensorError, KeyError, ValueError):
            return False
        if self._path(block) != path:
            return False
        self._reports[block] = report
        self._block_of.update(dict.fromkeys(names, block))
        return True

    def remove(self) -> None:
        """Removes the files."""
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)
