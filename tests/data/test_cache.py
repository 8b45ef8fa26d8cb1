"""Activations come back as they were put, wherever they are kept."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hf_merge.data.cache import ActivationCache
from hf_merge.errors import ConfigError


@pytest.mark.parametrize("where", ["memory", "disk", "cpu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.bool, torch.long])
def test_what_is_put_comes_back(where: str, dtype: torch.dtype, tmp_path: Path):
    cache = ActivationCache(where, folder=tmp_path)
    for shape in ((2, 3, 4), (), (0, 3)):
        tensor = torch.randn(shape).to(dtype)
        loaded = cache.put(tensor).load()
        assert loaded.dtype == dtype
        assert torch.equal(loaded, tensor)
    cache.close()


def test_more_than_the_limit_goes_to_disk(tmp_path: Path):
    cache = ActivationCache(limit=1000, folder=tmp_path)
    kept = [cache.put(torch.full((100,), float(index))) for index in range(5)]
    assert cache.used == 800
    assert len(list(tmp_path.rglob("*.bin"))) == 3
    assert [float(one.load()[0]) for one in kept] == [0, 1, 2, 3, 4]
    del kept[:]
    assert cache.used == 0
    assert not list(tmp_path.rglob("*.bin"))
    cache.close()
    assert not list(tmp_path.iterdir())


def test_only_hidden_states_are_rounded():
    cache = ActivationCache(dtype=torch.bfloat16)
    tensor = torch.tensor([1.0 + 2**-20])
    assert cache.put(tensor, rounded=True).load().dtype == torch.float32
    assert float(cache.put(tensor, rounded=True).load()) == 1.0
    assert torch.equal(cache.put(tensor).load(), tensor)


def test_a_negative_limit_is_refused():
    with pytest.raises(ConfigError, match="must not be negative, got -1"):
        ActivationCache(limit=-1)
