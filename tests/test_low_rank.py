"""The algebra of factors against dense matrices."""

from __future__ import annotations

import pytest
import torch

from hf_merge.low_rank import Factors, concatenated, factorized, resized, singular_factors, stacked, truncated


SHAPES = {"tall": (12, 5, 3), "wide": (5, 12, 3), "rank above the size": (4, 6, 9), "rank one": (7, 7, 1)}


def random_factors(rows: int, columns: int, rank: int, seed: int = 0, stack: int | None = None) -> Factors:
    generator = torch.Generator().manual_seed(seed)
    lead = () if stack is None else (stack,)
    left = torch.randn(*lead, rows, rank, generator=generator, dtype=torch.float64)
    return Factors(left, torch.randn(*lead, rank, columns, generator=generator, dtype=torch.float64))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("stack", [None, 3])
def test_truncation_is_the_best_approximation(shape: str, stack: int | None):
    factors = random_factors(*SHAPES[shape], stack=stack)
    dense = factors.dense()
    left, values, right = torch.linalg.svd(dense, full_matrices=False)
    for rank in (1, 2, 20):
        best = (left[..., :rank] * values[..., None, :rank]) @ right[..., :rank, :]
        lost = (values[..., rank:].square().sum() / values.square().sum()).item()
        for found, discarded in (truncated(factors, rank), factorized(dense, rank)):
            assert torch.allclose(found.dense(), best)
            assert discarded == pytest.approx(lost, abs=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
def test_singular_factors(shape: str):
    factors = random_factors(*SHAPES[shape])
    left, values, right = singular_factors(factors)
    assert torch.allclose((left * values) @ right, factors.dense())
    assert torch.allclose(values, torch.linalg.svdvals(factors.dense())[: len(values)])


def test_sums_stacks_and_norms():
    one, two = random_factors(6, 4, 2), random_factors(6, 4, 3, seed=1)
    total = concatenated([one, two], [2.0, -1.0])
    assert total.rank == 5 and torch.allclose(total.dense(), 2 * one.dense() - two.dense())
    assert torch.allclose(stacked([one, two]).dense(), torch.stack([one.dense(), two.dense()]))
    assert torch.allclose(resized(one, 7).dense(), one.dense())
    assert torch.allclose(one.mT.dense(), one.dense().mT)
    assert one.norm() == pytest.approx(one.dense().norm().item())


def test_zero_is_neutral():
    one = random_factors(6, 4, 2)
    zero = Factors.zero(one)
    assert zero.norm() == 0.0 and zero.shape == one.shape
    assert torch.allclose(concatenated([one, zero]).dense(), one.dense())
    assert truncated(Factors(one.left * 0, one.right), 1)[1] == 0.0
