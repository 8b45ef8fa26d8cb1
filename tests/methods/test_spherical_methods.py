from __future__ import annotations

import math

import pytest
import torch

from hf_merge import KarcherConfig, MultiSlerpConfig, NuSlerpConfig, SlerpConfig
from hf_merge.errors import ConfigError
from hf_merge.methods.spherical import dot, row_norms

from .elementwise import merge, random_models


def dense_slerp(t: float, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    first, second = first.double(), second.double()
    angle = torch.acos((first * second).sum() / first.norm() / second.norm())
    return (torch.sin((1 - t) * angle) * first + torch.sin(t * angle) * second) / torch.sin(angle)


def norm(values: torch.Tensor) -> float:
    return values.double().norm().item()


def unrelated(shape=(20, 30), count=2):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for _ in range(count)]


# -- inner products ---------------------------------------------------------------------------------------------------


def test_inner_products_are_exact_and_do_not_depend_on_the_number_of_threads():
    first, second = unrelated((1_100_003,))
    threads = torch.get_num_threads()
    found = set()
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        found.add(dot(first, second))
    torch.set_num_threads(threads)
    assert len(found) == 1
    assert found.pop() == pytest.approx((first.double() @ second.double()).item(), rel=1e-12)
    torch.testing.assert_close(
        row_norms(first[:1000].view(10, 100)), first[:1000].view(10, 100).double().norm(dim=1, keepdim=True)
    )


def test_inner_products_of_nothing_are_zero():
    assert dot(torch.empty(0, 4), torch.empty(0, 4)) == 0.0


# -- slerp ------------------------------------------------------------------------------------------------------------


def test_slerp_ends_at_the_models():
    first, second = unrelated()
    torch.testing.assert_close(merge(SlerpConfig(t=0.0), None, [first, second]), first)
    torch.testing.assert_close(merge(SlerpConfig(t=1.0), None, [first, second]), second)


def test_slerp_between_models_of_one_norm_keeps_the_norm():
    first, second = unrelated()
    second *= norm(first) / norm(second)
    assert norm(merge(SlerpConfig(t=0.3), None, [first, second])) == pytest.approx(norm(first), rel=1e-6)


@pytest.mark.parametrize("t", [0.0, 0.25, 0.5, 0.9])
def test_slerp_agrees_with_the_formula(t: float):
    first, second = unrelated()
    torch.testing.assert_close(merge(SlerpConfig(t=t), None, [first, second]), dense_slerp(t, first, second).float())


def test_slerp_is_symmetric_under_exchange():
    first, second = unrelated()
    torch.testing.assert_close(
        merge(SlerpConfig(t=0.2), None, [first, second]), merge(SlerpConfig(t=0.8), None, [second, first])
    )


def test_slerp_of_one_expert_starts_at_the_base():
    first, second = unrelated()
    torch.testing.assert_close(
        merge(SlerpConfig(t=0.2), first, [second]), merge(SlerpConfig(t=0.2), None, [first, second])
    )


def test_slerp_of_two_experts_does_not_look_at_the_base():
    first, second, base = unrelated(count=3)
    assert torch.equal(merge(SlerpConfig(), base, [first, second]), merge(SlerpConfig(), None, [first, second]))


@pytest.mark.parametrize("factor", [1.0, 3.0, -1.0, -0.5, 0.0])
def test_slerp_of_parallel_or_zero_parameters_is_linear(factor: float):
    first, _ = unrelated()
    merged = merge(SlerpConfig(t=0.25), None, [first, factor * first])
    torch.testing.assert_close(merged, 0.75 * first + 0.25 * factor * first)


def test_slerp_below_its_threshold_is_linear_and_at_threshold_one_is_not():
    base, (expert,) = random_models((20, 30), 1, scale=0.01)
    linear = merge(SlerpConfig(), base, [expert])
    torch.testing.assert_close(linear, (base + expert) / 2)
    exact = merge(SlerpConfig(threshold=1.0), base, [expert])
    torch.testing.assert_close(exact, dense_slerp(0.5, base, expert).float())
    assert norm(exact) > norm(linear)


@pytest.mark.parametrize("angle", [1e-7, 1e-4, 0.5, 3.1])
def test_slerp_is_accurate_at_every_angle(angle: float):
    first = torch.tensor([1.0, 0.0], dtype=torch.float64)
    second = torch.tensor([math.cos(angle), math.sin(angle)], dtype=torch.float64)
    merged = merge(SlerpConfig(t=0.5, threshold=1.0), None, [first, second])
    expected = torch.tensor([math.cos(angle / 2), math.sin(angle / 2)], dtype=torch.float64)
    torch.testing.assert_close(merged, expected, rtol=1e-6, atol=1e-6)


# -- NuSLERP ----------------------------------------------------------------------------------------------------------


def test_nuslerp_works_on_task_vectors_when_there_is_a_base():
    base, first, second = unrelated(count=3)
    config = NuSlerpConfig(weights=[3.0, 1.0])
    expected = dense_slerp(0.25, first - base, second - base).float() + base
    torch.testing.assert_close(merge(config, base, [first, second]), expected)
    torch.testing.assert_close(merge(config, None, [first, second]), dense_slerp(0.25, first, second).float())


@pytest.mark.parametrize("granularity", ["row", "column"])
def test_nuslerp_treats_each_row_or_column_by_itself(granularity: str):
    first, second = unrelated((4, 30))
    expected = torch.stack([dense_slerp(0.5, one, other) for one, other in zip(first, second, strict=True)]).float()
    if granularity == "column":
        first, second, expected = first.T, second.T, expected.T
    torch.testing.assert_close(merge(NuSlerpConfig(granularity=granularity), None, [first, second]), expected)


def test_nuslerp_of_opposite_task_vectors_is_linear():
    base, first, _ = unrelated(count=3)
    merged = merge(NuSlerpConfig(weights=[3.0, 1.0]), base, [first, 2 * base - first])
    torch.testing.assert_close(merged, base + 0.5 * (first - base))


def test_nuslerp_refuses_weights_that_sum_to_zero():
    with pytest.raises(ConfigError, match="sum to zero"):
        merge(NuSlerpConfig(weights=0.0), None, unrelated())


# -- MultiSLERP and the Karcher mean ----------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [MultiSlerpConfig(), KarcherConfig()], ids=["multislerp", "karcher"])
def test_spherical_means_of_two_are_the_middle_of_the_arc(config):
    first, second = unrelated()
    second *= norm(first) / norm(second)
    torch.testing.assert_close(merge(config, None, [first, second]), dense_slerp(0.5, first, second).float())


@pytest.mark.parametrize("config_cls", [MultiSlerpConfig, KarcherConfig], ids=["multislerp", "karcher"])
def test_spherical_means_of_identical_experts_are_the_expert(config_cls):
    (expert,) = unrelated(count=1)
    torch.testing.assert_close(merge(config_cls(weights=[1.0, 2.0, 3.0]), None, [expert] * 3), expert)


@pytest.mark.parametrize("config_cls", [MultiSlerpConfig, KarcherConfig], ids=["multislerp", "karcher"])
def test_spherical_means_have_the_mean_norm(config_cls):
    experts = [expert * factor for expert, factor in zip(unrelated(count=3), (1.0, 2.0, 5.0), strict=True)]
    expected = (norm(experts[0]) + norm(experts[1]) + 2 * norm(experts[2])) / 4
    assert norm(merge(config_cls(weights=[1.0, 1.0, 2.0]), None, experts)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("config_cls", [MultiSlerpConfig, KarcherConfig], ids=["multislerp", "karcher"])
def test_spherical_means_of_opposite_experts_are_linear(config_cls):
    (expert,) = unrelated(count=1)
    merged = merge(config_cls(weights=[1.0, 1.0]), None, [expert, -3 * expert])
    torch.testing.assert_close(merged, -expert)


@pytest.mark.parametrize("config_cls", [MultiSlerpConfig, KarcherConfig], ids=["multislerp", "karcher"])
def test_an_expert_of_zeros_shortens_the_mean_and_does_not_turn_it(config_cls):
    first, second = unrelated()
    merged = merge(config_cls(), None, [first, second, torch.zeros_like(first)])
    torch.testing.assert_close(merged, merge(config_cls(), None, [first, second]) * 2 / 3)


def test_multislerp_works_on_task_vectors_when_there_is_a_base():
    base, *experts = unrelated(count=4)
    expected = base + merge(MultiSlerpConfig(), None, [expert - base for expert in experts])
    torch.testing.assert_close(merge(MultiSlerpConfig(), base, experts), expected)


def test_multislerp_without_normalize_takes_the_weights_as_they_are():
    base, (first, second) = random_models((20, 30), 2)
    normalized = merge(MultiSlerpConfig(weights=[1.0, 3.0]), base, [first, second])
    plain = merge(MultiSlerpConfig(weights=[1.0, 3.0], normalize=False), base, [first, second])
    torch.testing.assert_close(plain - base, 4 * (normalized - base), rtol=1e-4, atol=1e-5)


def test_multislerp_is_the_mean_direction():
    experts = unrelated(count=3)
    direction = sum(weight * expert / norm(expert) for weight, expert in zip((0.5, 0.2, 0.3), experts, strict=True))
    length = sum(weight * norm(expert) for weight, expert in zip((0.5, 0.2, 0.3), experts, strict=True))
    merged = merge(MultiSlerpConfig(weights=[5.0, 2.0, 3.0]), None, experts)
    torch.testing.assert_close(merged, direction / norm(direction) * length)


@pytest.mark.parametrize("count", [2, 3, 6])
@pytest.mark.parametrize("scale", [1.0, 1e-3])
def test_karcher_is_where_the_pulls_of_the_experts_cancel(count: int, scale: float):
    _, experts = random_models((20, 30), count, scale)
    weights = [1.0 + index for index in range(count)]
    experts = [expert.double() for expert in experts]
    mean = merge(KarcherConfig(weights=weights, tol=1e-9), None, experts)
    mean = mean / mean.norm()
    pull = torch.zeros_like(mean)
    for weight, expert in zip(weights, experts, strict=True):
        unit = expert / expert.norm()
        angle = torch.acos((unit * mean).sum().clamp(-1, 1))
        pull += weight * angle / torch.sin(angle) * (unit - torch.cos(angle) * mean)
    assert norm(pull) < 1e-6 * scale * sum(weights)


def test_karcher_does_not_lose_small_task_vectors_stored_in_bfloat16():
    base, experts = random_models((256, 256), 3, scale=1e-4)
    stored = [expert.bfloat16() for expert in experts]
    merged = merge(KarcherConfig(), None, stored)
    mean = torch.stack([expert.double() for expert in stored]).mean(dim=0)
    # So close together the Karcher mean is the mean, up to terms of second order.
    assert norm(merged - mean) < 0.01 * norm(mean - base.bfloat16().double())
