"""Copies to devices, which go through page-locked memory beside what the device computes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_merge.engines import transfer
from hf_merge.engines.transfer import Transfer, copy_in_parts


class Event:
    """Notes what is done to it."""

    def __init__(self, log: list[tuple[str, Any]], index: int):
        self.log, self.index = log, index

    def synchronize(self) -> None:
        self.log.append(("wait", self.index))

    def record(self) -> None:
        self.log.append(("record", self.index))


@pytest.mark.parametrize("nbytes", [0, 1, 8, 9, 16, 17, 40, 41])
def test_copies_in_parts(nbytes: int):
    log: list[tuple[str, int]] = []
    source = torch.arange(nbytes, dtype=torch.uint8)
    target = torch.full_like(source, 255)
    buffers = [torch.empty(8, dtype=torch.uint8) for _ in range(2)]
    copy_in_parts(source, target, buffers, [Event(log, 0), Event(log, 1)])
    assert torch.equal(source, target)
    parts = max(1, -(-nbytes // 8))
    assert log == [step for part in range(parts) for step in (("wait", part % 2), ("record", part % 2))]


def test_copies_ahead_use_a_stream_of_their_own(monkeypatch):
    log: list[tuple[str, Any]] = []
    own = SimpleNamespace(synchronize=lambda: log.append(("wait", "stream")))

    @contextmanager
    def current(stream: Any) -> Iterator[None]:
        assert stream is own
        log.append(("enter", "stream"))
        yield
        log.append(("leave", "stream"))

    backend = SimpleNamespace(
        Stream=lambda device: own,
        Event=lambda: Event(log, 0),
        stream=current,
        current_stream=lambda device: f"default of {device}",
    )
    make = torch.empty
    monkeypatch.setattr(torch, "get_device_module", lambda device: backend)
    monkeypatch.setattr(torch, "empty", lambda *args, pin_memory=False, **kwargs: make(*args, **kwargs))
    monkeypatch.setattr(Tensor, "record_stream", lambda self, stream: log.append(("used by", stream)))
    monkeypatch.setattr(transfer, "STAGED", 16)
    link = Transfer(torch.device("cpu"))
    for dtype in (torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.bool):
        for shape in ((), (0, 3), (5, 7)):
            tensor = torch.randint(0, 2, shape).to(dtype).requires_grad_(dtype == torch.float32)
            log.clear()
            sent = link.send_ahead(tensor)
            assert sent.dtype == dtype and sent.shape == tensor.shape and not sent.requires_grad
            assert torch.equal(sent.reshape(-1).view(torch.uint8), tensor.detach().reshape(-1).view(torch.uint8))
            assert log[0] == ("enter", "stream")
            assert log[-3:] == [("leave", "stream"), ("wait", "stream"), ("used by", "default of cpu")]
    turned = torch.arange(6).view(2, 3).mT
    assert link.send_ahead(turned) is turned  # as it lies in memory


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.bool])
@pytest.mark.parametrize("shape", [(), (0, 3), (5, 7), (3000, 4001)])
def test_copies_to_cuda(dtype: torch.dtype, shape: tuple[int, ...]):
    link = Transfer(torch.device("cuda", 0))
    for _ in range(3):
        tensor = torch.randint(0, 2, shape).to(dtype)
        for sent in (link.send_ahead(tensor), link.send_ahead(tensor.mT if tensor.dim() == 2 else tensor)):
            assert sent.device == link.device
        assert torch.equal(link.send_ahead(tensor).cpu().view(torch.uint8), tensor.view(torch.uint8))
    link.empty_cache()
