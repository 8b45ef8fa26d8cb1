from __future__ import annotations

import pytest
import torch
from peft.utils import merge_utils

from hf_merge import TiesConfig
from hf_merge.methods.selection import count_kept

from .elementwise import (
    dense_elect_and_merge,
    dense_task_vectors,
    dense_trim,
    make_group,
    merge,
    merge_groups,
    random_models,
)


def oracle(base, experts, density=0.2, weights=None, scaling=1.0, mean=True, majority_sign="total"):
    vectors = dense_task_vectors(base, experts)
    trimmed = torch.stack([dense_trim(vector, count_kept(density, vector.numel())) for vector in vectors])
    merged = dense_elect_and_merge(trimmed, weights or [1.0] * len(experts), mean, majority_sign)
    return (base.double() + scaling * merged).float()


# -- laws -------------------------------------------------------------------------------------------------------------


def test_identical_experts_give_the_trimmed_expert():
    base, (expert,) = random_models((20, 30), 1)
    merged = merge(TiesConfig(density=0.3), base, [expert] * 4)
    torch.testing.assert_close(merged, oracle(base, [expert], density=0.3))


def test_density_one_keeps_everything_and_density_zero_nothing():
    base, experts = random_models((20, 30), 3)
    torch.testing.assert_close(merge(TiesConfig(density=0.0), base, experts), base, rtol=0, atol=0)
    torch.testing.assert_close(merge(TiesConfig(density=1.0), base, experts[:1]), experts[0])


@pytest.mark.parametrize("scope", ["tensor", "model"])
def test_rescaling_to_the_norm_keeps_the_l1_norm(scope: str):
    base, (expert,) = random_models((20, 30), 1)
    config = TiesConfig(density=0.3, rescale="norm", scope=scope)
    (merged,) = merge_groups(config, [make_group(config, base, [expert])])
    plain = oracle(base, [expert], density=0.3) - base
    torch.testing.assert_close(merged - base, plain * (expert - base).abs().sum() / plain.abs().sum())


def test_a_parameter_of_one_entry_is_not_lost():
    merged = merge(TiesConfig(density=0.2), torch.tensor([1.0]), [torch.tensor([3.0]), torch.tensor([5.0])])
    assert merged.item() == 4.0


def test_an_expert_without_weight_has_no_influence():
    base, experts = random_models((20, 30), 3)
    with_it = merge(TiesConfig(weights=[1.0, 2.0, 0.0]), base, experts)
    torch.testing.assert_close(with_it, merge(TiesConfig(weights=[1.0, 2.0]), base, experts[:2]))


def test_a_negative_weight_subtracts_the_expert():
    base, (expert,) = random_models((20, 30), 1)
    merged = merge(TiesConfig(density=1.0, weights=-1.0), base, [expert])
    torch.testing.assert_close(merged, base - (expert - base))


def test_storage_in_bfloat16_does_not_change_the_arithmetic():
    base, experts = random_models((20, 30), 3)
    base, experts = base.bfloat16(), [expert.bfloat16() for expert in experts]
    merged = merge(TiesConfig(), base, experts)
    assert merged.dtype == torch.float32
    torch.testing.assert_close(merged, merge(TiesConfig(), base.float(), [expert.float() for expert in experts]))


# -- the formula ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("majority_sign", ["total", "frequency"])
@pytest.mark.parametrize("rule", ["mean", "sum"])
@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [0.2, 1.5, 0.7], [1.0, -0.5, 2.0]])
def test_agrees_with_the_dense_formula(weights: list[float], rule: str, majority_sign: str):
    base, experts = random_models((25, 40), 3)
    config = TiesConfig(density=0.4, scaling=0.7, weights=weights, merge=rule, majority_sign=majority_sign)
    expected = oracle(base, experts, 0.4, weights, 0.7, rule == "mean", majority_sign)
    torch.testing.assert_close(merge(config, base, experts), expected)


def test_an_entry_without_a_majority_takes_the_sign_of_most():
    base = torch.zeros(4)
    experts = [torch.tensor([-1.0, -2.0, -3.0, 4.0]), torch.tensor([-1.0, -2.0, -3.0, -4.0])]
    merged = merge(TiesConfig(density=1.0), base, experts)
    assert merged.tolist() == [-1.0, -2.0, -3.0, -4.0]


@pytest.mark.parametrize("majority_sign", ["total", "frequency"])
def test_agrees_with_peft(majority_sign: str):
    # With equal weights the two definitions coincide, but for entries without a majority: those are positive in PEFT. PEFT keeps
    # int(density N) entries, here the same number: it differs where that is 0 or where the product is rounded down (0.29 · 100).
    base, experts = random_models((32, 50), 5)
    vectors = [expert - base for expert in experts]
    expected = base + merge_utils.ties(vectors, torch.ones(5), 0.25, majority_sign)
    merged = merge(TiesConfig(density=0.25, majority_sign=majority_sign), base, experts)
    votes = torch.stack([dense_trim(vector, 400) for vector in vectors])
    votes = votes if majority_sign == "total" else votes.sign()
    decided = votes.sum(dim=0) != 0
    assert decided.float().mean() > 0.5
    torch.testing.assert_close(merged[decided], expected[decided])


def test_each_expert_may_have_its_own_density():
    base, experts = random_models((25, 40), 2)
    merged = merge(TiesConfig(density={"expert0": 0.1, "expert1": 1.0}), base, experts)
    vectors = dense_task_vectors(base, experts)
    expected = dense_elect_and_merge(torch.stack([dense_trim(vectors[0], 100), vectors[1]]), [1.0, 1.0])
    torch.testing.assert_close(merged, (base.double() + expected).float())


# -- scope="model" ----------------------------------------------------------------------------------------------------


def model_groups(config: TiesConfig):
    """Three parameters of very different magnitude."""
    groups = []
    for index, (shape, scale) in enumerate([((20, 30), 1e-3), ((40,), 1.0), ((1,), 1e-6)]):
        base, experts = random_models(shape, 2, scale, seed=index)
        groups.append(make_group(config, base, experts, name=f"layer.{index}", depth=index / 2))
    return groups


def flat_oracle(groups, densities):
    """Per expert one sort of all magnitudes of the model; each parameter cut at its own density."""
    merged = []
    for group, density in zip(groups, densities, strict=True):
        trimmed = []
        for expert in range(2):
            everything = (
                torch.cat([other.task_vector(expert).reshape(-1) for other in groups])
                .abs()
                .sort(descending=True)
                .values
            )
            k = count_kept(density, everything.numel())
            vector = group.task_vector(expert).double()
            trimmed.append(vector * (vector.abs() >= everything[k - 1]) if k else torch.zeros_like(vector))
        merged.append((group.base.double() + dense_elect_and_merge(torch.stack(trimmed), [1.0, 1.0])).float())
    return merged


@pytest.mark.parametrize("density", [0.0, 0.001, 0.1, 0.5, 1.0])
def test_model_scope_takes_one_threshold_over_all_parameters(density: float):
    config = TiesConfig(density=density, scope="model")
    groups = model_groups(config)
    for found, expected in zip(merge_groups(config, groups), flat_oracle(groups, [density] * 3), strict=True):
        torch.testing.assert_close(found, expected)


def test_model_scope_does_not_depend_on_the_order_of_the_parameters():
    config = TiesConfig(density=0.1, scope="model")
    groups = model_groups(config)
    forwards, backwards = merge_groups(config, groups), merge_groups(config, groups[::-1])
    assert all(torch.equal(one, other) for one, other in zip(forwards, backwards[::-1], strict=True))


def test_model_scope_with_a_gradient_of_densities():
    config = TiesConfig(density={"gradient": [0.5, 0.0]}, scope="model")
    groups = model_groups(config)
    for found, expected in zip(merge_groups(config, groups), flat_oracle(groups, [0.5, 0.25, 0.0]), strict=True):
        torch.testing.assert_close(found, expected)


def test_model_scope_leaves_a_parameter_of_small_changes_alone():
    config = TiesConfig(density=0.05, scope="model")
    groups = model_groups(config)
    assert torch.equal(merge_groups(config, groups)[2], groups[2].base)
