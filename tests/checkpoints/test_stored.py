"""Tensors that stay in their files: parts are those of the whole, and a file that changes is noticed."""

from __future__ import annotations

import gc
import os
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from hf_merge.checkpoints import stored
from hf_merge.checkpoints.storage import SafetensorsStorage, StateDictStorage
from hf_merge.checkpoints.stored import StoredTensor
from hf_merge.errors import CheckpointError


pytestmark = pytest.mark.skipif(not stored.CAN_READ_PARTS, reason="the system has no positioned reads into memory")

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int64, torch.bool]


@pytest.fixture(autouse=True)
def small_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a few thousand entries go through it in several turns."""
    monkeypatch.setattr(stored, "STAGED", 1 << 10)
    monkeypatch.setattr(stored, "_local", threading.local())


def stored_tensor(folder: Path, tensor: torch.Tensor) -> StoredTensor:
    path = folder / "model.safetensors"
    save_file({"before": torch.ones(3), "weight": tensor, "zero": torch.zeros(7)}, path)
    return SafetensorsStorage({path.name: path}).stored("weight")


def values(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return torch.randint(0, 100, shape, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (0, 4), (5,), (37, 101)])
def test_the_whole(tmp_path: Path, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = values(dtype, *shape)
    found = stored_tensor(tmp_path, tensor)
    assert (found.shape, found.dtype, found.numel()) == (tensor.shape, dtype, tensor.numel())
    for wanted in (torch.float32, torch.float64, dtype):
        read = found.to(wanted)
        assert read.dtype == wanted
        assert torch.equal(read.double(), tensor.to(wanted).double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parts(tmp_path: Path, dtype: torch.dtype) -> None:
    tensor = values(dtype, 37, 101)
    flat, found = tensor.reshape(-1), stored_tensor(tmp_path, tensor).reshape(-1)
    for part in (slice(0, 1), slice(5, 5), slice(100, 1200), slice(3000, 9999), slice(None)):
        assert torch.equal(found[part].to(torch.float32), flat[part].float())
    assert torch.equal(found[100:3000][7:900].to(dtype), flat[107:1000])
    pieces = zip(found.split(500), flat.split(500), strict=True)
    assert all(torch.equal(one.to(dtype), other) for one, other in pieces)
    for places in ([], [0], [3, 3, 511, 512, 513, 3736], range(0, 3737, 5)):
        places = torch.tensor(list(places), dtype=torch.int64)
        assert torch.equal(found[places], flat[places])


def test_only_runs_of_flat_ones(tmp_path: Path) -> None:
    found = stored_tensor(tmp_path, values(torch.float32, 4, 5))
    with pytest.raises(IndexError):
        found[0:2]
    with pytest.raises(IndexError):
        found.reshape(-1)[::2]
    with pytest.raises(ValueError, match="flat"):
        found.reshape(2, 10)


def test_what_is_read_is_new(tmp_path: Path) -> None:
    found = stored_tensor(tmp_path, values(torch.float32, 1000))
    first = found.to(torch.float32)
    expected = first.clone()
    first.zero_()
    assert torch.equal(found.to(torch.float32), expected)


def test_models_in_memory_are_not_stored() -> None:
    assert StateDictStorage({"weight": torch.zeros(2)}, "here").stored("weight") is None


@pytest.mark.parametrize("begun", [False, True])
def test_a_truncated_file(tmp_path: Path, begun: bool) -> None:
    found = stored_tensor(tmp_path, values(torch.float32, 4000)).reshape(-1)
    if begun:
        found[:10].to(torch.float32)
    with open(tmp_path / "model.safetensors", "r+b") as file:
        file.truncate(8000)
    with pytest.raises(CheckpointError, match=r"truncated after the merge began|was changed after it was opened"):
        found.to(torch.float32)


def test_a_file_that_changes_between_two_parts(tmp_path: Path) -> None:
    found = stored_tensor(tmp_path, values(torch.float32, 4000)).reshape(-1)
    found[:10].to(torch.float32)
    path = tmp_path / "model.safetensors"
    with open(path, "r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(b"\1\2\3\4")
    os.utime(path, ns=(1, 1))
    with pytest.raises(CheckpointError, match="was changed after it was opened"):
        found[10:20].to(torch.float32)


def test_a_file_that_is_replaced_before_the_first_part(tmp_path: Path) -> None:
    found = stored_tensor(tmp_path, values(torch.float32, 4000))
    path = tmp_path / "model.safetensors"
    copy = path.with_suffix(".new")
    copy.write_bytes(path.read_bytes())
    os.replace(copy, path)
    with pytest.raises(CheckpointError, match="was changed after it was opened"):
        found.to(torch.float32)


def test_a_missing_file(tmp_path: Path) -> None:
    found = stored_tensor(tmp_path, values(torch.float32, 40))
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="Cannot read 'weight'"):
        found.to(torch.float32)


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="reads /proc")
def test_the_file_is_closed_when_nothing_needs_it(tmp_path: Path) -> None:
    def is_open() -> bool:
        links = (Path("/proc/self/fd") / name for name in os.listdir("/proc/self/fd"))
        return any(link.is_symlink() and os.readlink(link).startswith(str(tmp_path)) for link in links)

    found = stored_tensor(tmp_path, values(torch.float32, 40)).reshape(-1)
    assert not is_open()
    part = found[3:8]
    part.to(torch.float32)
    del found
    gc.collect()
    assert is_open()
    del part
    gc.collect()
    assert not is_open()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs forks")
def test_forks_and_threads_share_a_file(tmp_path: Path) -> None:
    tensor = values(torch.bfloat16, 50_000)
    found = stored_tensor(tmp_path, tensor).reshape(-1)
    found[:10].to(torch.float32)  # opens it
    errors: list[int] = []

    def look(step: int) -> None:
        for start in range(0, 50_000, step):
            if not torch.equal(found[start : start + step].to(torch.float32), tensor[start : start + step].float()):
                errors.append(start)

    fork = os.fork()
    if fork == 0:
        torch.set_num_threads(1)
        look(333)
        os._exit(len(errors) > 0)
    threads = [threading.Thread(target=look, args=(step,)) for step in (700, 1100)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert os.waitpid(fork, 0)[1] == 0
    assert not errors
