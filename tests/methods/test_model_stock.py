from __future__ import annotations

import itertools

import pytest
import torch

from hf_merge import ModelStockConfig, WiseFtConfig
from hf_merge.methods.base import ParameterKind

from .elementwise import dense_task_vectors, merge, random_models


def oracle(base, experts):
    """The formula on flat vectors, every pair of experts by itself."""
    vectors = dense_task_vectors(base, experts)
    flat = vectors.flatten(1)
    cosines = [
        torch.nn.functional.cosine_similarity(flat[i], flat[j], dim=0, eps=0.0)
        for i, j in itertools.combinations(range(len(experts)), 2)
    ]
    cos = torch.stack(cosines).nan_to_num(0.0).mean().clamp(0, 1)
    t = len(experts) * cos / (1 + (len(experts) - 1) * cos)
    return (base.double() + t * vectors.mean(dim=0)).float()


def correlated(shape, count, scale=0.05):
    base, experts = random_models(shape, count + 1, scale)
    common = experts.pop() - base
    return base, [expert + common for expert in experts]


def test_identical_experts_give_the_expert():
    base, (expert,) = random_models((20, 30), 1)
    torch.testing.assert_close(merge(ModelStockConfig(), base, [expert] * 3), expert)


def test_opposite_experts_give_the_base():
    base, (expert,) = random_models((20, 30), 1)
    torch.testing.assert_close(merge(ModelStockConfig(), base, [expert, 2 * base - expert]), base)


def test_experts_that_disagree_on_the_whole_give_the_base():
    base = torch.zeros(2)
    experts = [torch.tensor([1.0, 0.0]), torch.tensor([-0.5, 0.1])]
    assert torch.equal(merge(ModelStockConfig(), base, experts), base)


@pytest.mark.parametrize("count", [2, 3, 5])
@pytest.mark.parametrize("shape", [(20, 30), (64,), (4, 3, 2, 2)])
def test_agrees_with_the_formula(shape, count: int):
    base, experts = correlated(shape, count)
    torch.testing.assert_close(merge(ModelStockConfig(), base, experts), oracle(base, experts))


@pytest.mark.parametrize("scale", [1e-3, 1e-5, 1e-12])
def test_small_task_vectors_are_merged_like_large_ones(scale: float):
    # mergekit clamps the product of the norms at 1e-6, which pulls a small parameter to the base.
    base, experts = correlated((64,), 2)
    vectors = [expert - base for expert in experts]
    zero = torch.zeros(64)
    expected = oracle(zero, vectors)
    small = merge(ModelStockConfig(), zero, [vector * scale for vector in vectors])
    torch.testing.assert_close(small / scale, expected)


def test_an_expert_equal_to_the_base_is_at_right_angles_to_every_other():
    base, (first, second) = correlated((20, 30), 2)
    torch.testing.assert_close(
        merge(ModelStockConfig(), base, [first, second, base]), oracle(base, [first, second, base])
    )


@pytest.mark.parametrize("kind", [ParameterKind.LINEAR, ParameterKind.TRANSPOSED_LINEAR])
def test_filter_wise_has_one_ratio_for_each_output_unit(kind: ParameterKind):
    base, experts = correlated((6, 30), 3)
    expected = torch.stack([oracle(base[row], [expert[row] for expert in experts]) for row in range(6)])
    if kind is ParameterKind.TRANSPOSED_LINEAR:
        base, experts, expected = base.T, [expert.T for expert in experts], expected.T
    torch.testing.assert_close(merge(ModelStockConfig(filter_wise=True), base, experts, kind=kind), expected)


def test_filter_wise_treats_a_vector_as_one_filter():
    base, experts = correlated((30,), 3)
    merged = merge(ModelStockConfig(filter_wise=True), base, experts, kind=ParameterKind.BIAS)
    torch.testing.assert_close(merged, oracle(base, experts))


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_wise_ft_is_the_line_between_base_and_expert(alpha: float):
    base, experts = random_models((20, 30), 1)
    torch.testing.assert_close(merge(WiseFtConfig(alpha=alpha), base, experts), torch.lerp(base, experts[0], alpha))
