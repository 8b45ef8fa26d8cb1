"""Memory of tensors that nobody uses any more is used again, and never while somebody does."""

from __future__ import annotations

import gc

import numpy as np
import pytest
import torch

from hf_merge.checkpoints import memory
from hf_merge.checkpoints.memory import empty_tensor


@pytest.fixture(autouse=True)
def pool(monkeypatch: pytest.MonkeyPatch) -> memory._Pool:
    found = memory._Pool()
    monkeypatch.setattr(memory, "_pool", found)
    return found


SIZE = memory.SMALLEST


def address(size: int = SIZE) -> int:
    """Of a tensor that is gone."""
    return empty_tensor((size,), torch.uint8).data_ptr()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.bool, torch.complex64])
@pytest.mark.parametrize("shape", [(), (0, 3), (7,), (300, 500, 5)])
def test_shape_and_dtype(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    found = empty_tensor(shape, dtype)
    assert (tuple(found.shape), found.dtype) == (shape, dtype)
    found.zero_()


def test_what_is_gone_is_used_again_for_the_same_size(pool: memory._Pool) -> None:
    first = address()
    assert address(SIZE + 1) != first
    assert empty_tensor((SIZE // 4,), torch.float32).data_ptr() == first


def test_a_view_keeps_the_memory(pool: memory._Pool) -> None:
    tensor = empty_tensor((SIZE // 2,), torch.int16).fill_(7)
    used = tensor.data_ptr()
    views = [tensor[5:9], tensor.numpy()[11:12], tensor.view(torch.uint8)[-2:].view(torch.int16)]
    del tensor
    while views:
        gc.collect()
        other = empty_tensor((SIZE,), torch.uint8).fill_(1)
        assert other.data_ptr() != used
        assert set(np.asarray(views[0]).tolist()) == {7}
        del other, views[0]
    assert {one.ctypes.data for one in pool._free} > {used}


def test_little_is_kept(pool: memory._Pool) -> None:
    many = [empty_tensor((memory.KEPT // 3,), torch.uint8) for _ in range(5)]
    del many
    assert [one.nbytes for one in pool._free] == [memory.KEPT // 3] * 3
    address()
    assert [one.nbytes for one in pool._free] == [memory.KEPT // 3] * 2 + [SIZE]
    for size in (memory.KEPT + 1, 100):
        address(size)
        assert [one.nbytes for one in pool._free] == [memory.KEPT // 3] * 2 + [SIZE]


def test_giving_back_does_not_wait(pool: memory._Pool) -> None:
    """The collector may end a tensor while this thread takes memory for another."""
    tensor = empty_tensor((SIZE,), torch.uint8)
    with pool._lock:
        del tensor
    assert pool._free == []
    assert empty_tensor((SIZE,), torch.uint8).numel() == SIZE
