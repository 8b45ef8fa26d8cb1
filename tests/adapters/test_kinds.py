"""Every kind of adapter that PEFT saves: the merged adapter's and the merged model's forward is that of the formula on dense changes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hf_merge import CatConfig, Merger, PlanError

from .helpers import KINDS, AdapterBed, make_adapters


every_kind = pytest.mark.parametrize("name", KINDS)
WEIGHTS = (1.0, -0.5, 0.7)


@pytest.fixture(scope="module")
def beds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, AdapterBed]:
    """Three adapters of each kind, made on first use."""

    class Beds(dict):
        def __missing__(self, name: str) -> AdapterBed:
            self[name] = make_adapters(KINDS[name], tmp_path_factory.mktemp(name), 3)
            return self[name]

    return Beds()


def assert_close(bed: AdapterBed, model: torch.nn.Module, oracle: torch.nn.Module) -> None:
    expected = bed.logits(oracle)
    assert torch.allclose(bed.logits(model), expected, atol=1e-5, rtol=1e-5), (
        (bed.logits(model) - expected).abs().max()
    )
    assert not torch.allclose(expected, bed.logits(bed.load()), atol=1e-4)


@every_kind
def test_merged_model(name: str, beds: dict[str, AdapterBed]):
    bed = beds[name].first(2)
    model = Merger.from_pretrained(bed.adapters, CatConfig(weights=list(WEIGHTS[:2]))).merge()
    assert_close(bed, model, bed.oracle(WEIGHTS[:2]))


@pytest.mark.parametrize("count", [2, 3])
@every_kind
def test_merged_adapter(name: str, count: int, beds: dict[str, AdapterBed], tmp_path: Path):
    bed = beds[name].first(count)
    kind = KINDS[name]
    config = CatConfig(weights=list(WEIGHTS[:count]), output="adapter", adapter_rank=None if kind.exact else 64)
    merger = Merger.from_pretrained(bed.adapters, config)
    if not kind.holds:
        with pytest.raises(PlanError, match="as factors: use output='model'"):
            merger.save_pretrained(tmp_path / "out")
        return
    merger.save_pretrained(tmp_path / "out")
    assert_close(bed, bed.attached(tmp_path / "out"), bed.oracle(WEIGHTS[:count]))


@pytest.mark.parametrize("name", [name for name, kind in KINDS.items() if not kind.exact and kind.holds])
def test_what_is_no_factors_needs_a_rank(name: str, beds: dict[str, AdapterBed]):
    bed = beds[name].first(2)
    with pytest.raises(PlanError, match="adapter_rank") as caught:
        Merger.from_pretrained(bed.adapters, CatConfig(output="adapter")).check()
    assert "'a'" in str(caught.value)
