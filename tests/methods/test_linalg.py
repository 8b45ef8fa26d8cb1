"""The decompositions and products that the spectral methods share."""

from __future__ import annotations

import pytest
import torch

from hf_merge.methods import linalg
from hf_merge.methods.linalg import eigenpairs_in_place, times_transposed

from .helpers_linear import relative


SHAPES = {"small": (8, 9, 10), "large": (300, 200, 170), "whole blocks": (512, 160, 128), "wide": (40, 700, 350)}


def factors(shape: tuple[int, int, int], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    m, n, k = shape
    return torch.randn(m, k, generator=generator).to(dtype), torch.randn(n, k, generator=generator).to(dtype)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_product_equals_float64(shape, dtype):
    left, right = factors(shape, dtype)
    expected = left.double() @ right.double().mT
    tolerance = 1e-6 if dtype == torch.float32 else 1e-14
    assert relative(times_transposed(left, right), expected) < tolerance
    out = torch.full(shape[:2], torch.nan, dtype=dtype)
    assert times_transposed(left, right, out) is out
    assert relative(out, expected) < tolerance


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this build of torch has no oneDNN")
def test_only_large_float32_products_go_to_onednn():
    large, small = (factors(SHAPES[name], torch.float32) for name in ("large", "small"))
    assert linalg._suits_onednn(*large) == torch.backends.mkl.is_available()
    assert not linalg._suits_onednn(*small)
    assert not linalg._suits_onednn(*factors(SHAPES["large"], torch.float64))


@pytest.mark.parametrize("rank", [1, 7, 40], ids=lambda rank: f"rank {rank}")
def test_eigenpairs_rebuild_the_matrix(rank):
    rows = factors((rank, 1, 40), torch.float64)[0]
    matrix = rows.mT @ rows
    values, vectors = eigenpairs_in_place(matrix.clone())
    assert torch.equal(values, values.sort().values)
    assert relative((vectors * values) @ vectors.mT, matrix) < 1e-13
    assert relative(vectors.mT @ vectors, torch.eye(40, dtype=torch.float64)) < 1e-12
