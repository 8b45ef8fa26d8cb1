from __future__ import annotations

import itertools

import pytest
import torch

from hf_merge.methods import selection
from hf_merge.methods.selection import (
    Cut,
    Parts,
    count_kept,
    cut_largest,
    cuts_of_parts,
    high_histogram,
    largest_mask,
    locate,
    low_histogram,
    magnitude_of,
)


CASES = {
    "normal": torch.randn(1000, generator=torch.Generator().manual_seed(0)),
    "small": torch.randn(1000, generator=torch.Generator().manual_seed(1)) * 1e-30,
    "subnormal": torch.randn(300, generator=torch.Generator().manual_seed(2)) * 1e-40,
    "bfloat16 steps": torch.randn(1000, generator=torch.Generator().manual_seed(3)).bfloat16().float(),
    "few values": torch.randint(-2, 3, (500,), generator=torch.Generator().manual_seed(4)).float(),
    "mostly zero": torch.randn(500, generator=torch.Generator().manual_seed(5)) * (torch.arange(500) % 50 == 0),
    "all equal": torch.full((64,), -0.5),
    "all zero": torch.zeros(64),
    "huge": torch.tensor([3e38, -3.4e38, 1.0, -0.0, 0.0]),
    "one": torch.tensor([0.25]),
    "matrix": torch.randn(30, 40, generator=torch.Generator().manual_seed(6)),
}


def stable_mask(values: torch.Tensor, k: int) -> torch.Tensor:
    order = values.abs().reshape(-1).argsort(descending=True, stable=True)
    mask = torch.zeros(values.numel(), dtype=torch.bool)
    mask[order[:k]] = True
    return mask.view(values.shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", CASES)
def test_keeps_exactly_the_k_largest_and_the_lowest_index_among_equals(case: str, dtype: torch.dtype):
    values = CASES[case].to(dtype)
    size = values.numel()
    for k in sorted({0, 1, 2, size // 10, size // 2, size - 1, size}):
        if 0 <= k <= size:
            assert torch.equal(largest_mask(values, k), stable_mask(values, k)), k


def test_more_than_one_chunk_is_selected_as_one():
    values = torch.randint(-50, 51, (600_000,), generator=torch.Generator().manual_seed(0)).float()
    for k in (1, 299_999, 599_999):
        assert torch.equal(largest_mask(values, k), stable_mask(values, k))


SKEWED = {
    "rising": lambda size: torch.arange(1.0, size + 1),
    "falling": lambda size: torch.arange(size, 0.0, -1),
    "mostly zero": lambda size: torch.cat([torch.zeros(size - 1000), torch.arange(1000.0)]),
    "two values": lambda size: (torch.arange(size) % 3 == 0).float() - 2,
}


@pytest.mark.parametrize("case", SKEWED)
@pytest.mark.parametrize("is_sample_random", [True, False])
def test_a_sample_that_misleads_costs_time_only(monkeypatch, case: str, is_sample_random: bool):
    size = 100_003
    values = SKEWED[case](size)
    if not is_sample_random:
        monkeypatch.setattr(selection, "_sampled_places", lambda size: torch.arange(selection._SAMPLE))
    for k in (1, 999, 1000, 1001, 30_000, 66_668, 66_669, size - 1):
        assert torch.equal(largest_mask(values, k), stable_mask(values, k)), k
    first, second = cuts_of_parts(Parts.of(values), size, [20_000, 70_000])
    assert torch.equal(first.mask(values), stable_mask(values, 20_000))
    assert torch.equal(second.mask(values), stable_mask(values, 70_000))


def test_few_entries_are_looked_at_closely(monkeypatch):
    values = torch.randn(400_000, generator=torch.Generator().manual_seed(0))
    inside = []
    see = selection._Bracket.conclude
    monkeypatch.setattr(
        selection._Bracket,
        "conclude",
        lambda self, parts: inside.append(sum(map(len, self._inside))) or see(self, parts),
    )
    for k in (1, 4000, 200_000, 399_000):
        assert torch.equal(largest_mask(values, k), stable_mask(values, k))
    assert len(inside) == 4, "one pass is enough"
    assert max(inside) < 400_000 / 16


def test_cuts_are_nested():
    values = CASES["few values"]
    masks = [largest_mask(values, k) for k in range(0, 501, 7)]
    assert all((small <= large).all() for small, large in itertools.pairwise(masks))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", CASES)
def test_trim_is_the_values_times_the_mask(case: str, dtype: torch.dtype):
    values = CASES[case].to(dtype)
    for k in (0, 1, values.numel() // 3, values.numel()):
        for cut in (cut_largest(values, k), Cut(cut_largest(values, k).threshold)):
            assert torch.equal(cut.trim(values.clone()), values * cut.mask(values)), k


def test_layout_does_not_matter():
    values = CASES["matrix"].bfloat16().float()
    assert torch.equal(largest_mask(values.T.contiguous().T, 100), largest_mask(values, 100))


def test_a_cut_without_ties_keeps_all_equal_entries():
    assert torch.equal(Cut(0.5).mask(torch.tensor([0.5, -0.5, 0.4, 1.0])), torch.tensor([True, True, False, True]))
    assert cut_largest(torch.empty(0), 0).mask(torch.tensor([1.0, 0.0])).sum() == 0


def test_histograms_of_parts_add_up_to_the_threshold_of_the_whole():
    values = CASES["normal"]
    parts = values.split(123)
    for k in (1, 17, 500, 1000):
        high, rank = locate(sum(high_histogram(part) for part in parts), k)
        low, _ = locate(sum(low_histogram(part, high) for part in parts), rank)
        assert magnitude_of(high, low) == values.abs().sort(descending=True).values[k - 1].item()


@pytest.mark.parametrize(
    ("density", "size", "kept"),
    [
        (0.0, 10, 0),
        (1.0, 10, 10),
        (0.2, 1, 1),
        (0.29, 100, 29),
        (0.57, 100, 57),
        (0.2, 14, 2),
        (0.5, 0, 0),
        (1.0, 1, 1),
    ],
)
def test_count_kept(density: float, size: int, kept: int):
    assert count_kept(density, size) == kept
