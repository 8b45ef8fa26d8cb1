"""Weight files that are filled in any order, by several threads at once."""

from __future__ import annotations

import errno
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hf_merge.checkpoints import shards
from hf_merge.checkpoints.folder import OutputFolder
from hf_merge.checkpoints.layout import plan_layout
from hf_merge.checkpoints.storage import TensorInfo
from hf_merge.errors import OutputError


SIZE, PART = 4096, 64


def output_of(folder: Path, count: int = 4) -> tuple[OutputFolder, dict[str, torch.Tensor]]:
    tensors = {f"t{index}": torch.arange(SIZE, dtype=torch.float32) + index * SIZE for index in range(count)}
    infos = {name: TensorInfo(tuple(value.shape), value.dtype) for name, value in tensors.items()}
    return OutputFolder(folder / "out", plan_layout(infos, "1MB"), "x"), tensors


@pytest.mark.parametrize("positioned", [True, False])
def test_threads_fill_one_file(positioned: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """With reads and writes that have positions, and on systems without them."""
    if not positioned:
        monkeypatch.delattr(os, "pwrite", raising=False)
        monkeypatch.delattr(os, "preadv", raising=False)
    output, tensors = output_of(tmp_path)

    def fill(name: str) -> None:
        for start in range(0, SIZE, PART):
            output.fill_part(name, tensors[name][start : start + PART], start)
            assert torch.equal(output.filled_part(name, start, PART), tensors[name][start : start + PART])

    with output, ThreadPoolExecutor(len(tensors)) as threads:
        list(threads.map(fill, tensors))
        for name in tensors:
            output.complete(name)
        output.seal()
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(found[name], value) for name, value in tensors.items())


def test_parts_fit_their_tensor(tmp_path: Path):
    output, tensors = output_of(tmp_path)
    with output:
        with pytest.raises(OutputError, match="'t1' gets 2 entries of torch.float32 at 4095"):
            output.fill_part("t1", tensors["t1"][:2], SIZE - 1)
        with pytest.raises(OutputError, match="torch.float64"):
            output.fill_part("t1", tensors["t1"][:2].double(), 0)
        with pytest.raises(OutputError, match=r"planned was \(4096,\)"):
            output.fill("t1", tensors["t1"][:2])


def test_the_disk_is_told_to_write_while_more_is_filled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    synced, sync = [], os.fsync

    def counting(descriptor: int) -> None:
        synced.append(threading.current_thread().name)
        sync(descriptor)

    monkeypatch.setattr(shards, "SYNCED", 2 * SIZE * 4)  # two tensors
    monkeypatch.setattr(os, "fsync", counting)
    output, tensors = output_of(tmp_path)
    with output:
        for name, value in tensors.items():
            output.write(name, value)
        output.seal()
    assert synced.count("hf_merge-sync") == 1  # the last two are left for the end
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(found[name], value) for name, value in tensors.items())


def test_what_the_disk_says_early_is_not_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The system tells of a failed write once."""
    sync = os.fsync

    def failing(descriptor: int) -> None:
        if threading.current_thread().name == "hf_merge-sync":
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(descriptor)

    monkeypatch.setattr(shards, "SYNCED", 1)
    monkeypatch.setattr(os, "fsync", failing)
    output, tensors = output_of(tmp_path)

    def write_all() -> None:
        with output:
            for name, value in tensors.items():
                output.write(name, value)
            output.seal()

    with pytest.raises(OutputError, match="disk is full"):
        write_all()
    assert not (tmp_path / "out").exists()
