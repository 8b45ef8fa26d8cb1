"""TSV-Merge, Iso-C, Iso-CTS and SVC: laws, and equality with the definitions written plainly in float64."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from hf_merge import ConfigError, MergeConfig, SvcConfig, TaskArithmeticConfig
from hf_merge.methods.base import ParameterKind
from hf_merge.methods.isotropic.method import directions_per_task
from hf_merge.methods.linalg import polar_factor, randomized_triplets, singular_triplets
from hf_merge.methods.svc import Svc
from hf_merge.methods.tsv_m import TsvM

from .helpers_linear import group_of, merge, relative, task_matrices


SHAPES = {"square": (24, 24), "tall": (40, 16), "wide": (10, 36)}
METHODS = ("tsv_m", "iso_c", "iso_cts", "svc", "ace")

every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
every_method = pytest.mark.parametrize("merge_type", METHODS)


# -- the definitions, literally -----------------------------------------------------------------------------------


def literal_polar(matrix):
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    return left @ right


def literal_tsv_m(vectors):
    count = max(1, min(vectors.shape[1:]) // len(vectors))
    parts = [torch.linalg.svd(vector, full_matrices=False) for vector in vectors]
    left = literal_polar(torch.cat([u[:, :count] for u, _, _ in parts], dim=1))
    right = literal_polar(torch.cat([v[:count] for _, _, v in parts]))
    return left @ torch.diag(torch.cat([s[:count] for _, s, _ in parts])) @ right


def literal_iso_c(vectors):
    left, values, right = torch.linalg.svd(vectors.sum(0), full_matrices=False)
    return values.mean() * left @ right


def literal_iso_cts(vectors, fraction=0.8):
    size, n = min(vectors.shape[1:]), len(vectors)
    per_task = round((size - int(size * fraction)) / n)
    common = size - per_task * n
    u, s, v = torch.linalg.svd(vectors.sum(0), full_matrices=False)
    left, values, right = [u[:, :common]], [s[:common]], [v[:common]]
    for vector in vectors:
        us, ss, vs = torch.linalg.svd(vector - left[0] @ left[0].mT @ vector, full_matrices=False)
        left.append(us[:, :per_task])
        values.append(ss[:per_task])
        right.append(vs[:per_task])
    return torch.cat(values).mean() * literal_polar(torch.cat(left, dim=1)) @ literal_polar(torch.cat(right))


def literal_svc(merged, vectors, alpha):
    left, values, right = torch.linalg.svd(merged, full_matrices=False)
    factors = []
    for direction in left.mT:
        answer = direction @ merged
        scores = [answer @ (direction @ vector) / (direction @ vector).square().sum() for vector in vectors]
        factors.append(len(vectors) / sum(max(alpha, score.item()) for score in scores))
    return left @ torch.diag(values * torch.tensor(factors, dtype=values.dtype)) @ right


def literal_ace(vectors, ridge=1e-3, heterogeneity=1.0, fraction=0.3):
    n, inp = len(vectors), vectors.shape[2]
    identity, ones = torch.eye(inp, dtype=vectors.dtype), torch.ones(inp, inp, dtype=vectors.dtype)
    heterogeneous = vectors.square().sum((1, 2)).log().var() > heterogeneity
    covariances = []
    for vector in vectors:
        centred = vector - vector.mean(0)
        covariance = centred.mT @ centred
        covariances.append(covariance / covariance.trace() if heterogeneous else covariance)
    epsilon = ridge * sum(covariances).trace() / inp / n
    ridged = [covariance + epsilon * identity for covariance in covariances]
    system = sum(ridged) + ones / inp @ sum(covariances)
    merged = sum(v @ c for v, c in zip(vectors, ridged, strict=True)) @ torch.linalg.inv(system)
    if not heterogeneous:
        return merged
    mean = sum(covariances) / n
    residual = sum(v @ (c - mean) for v, c in zip(vectors, covariances, strict=True))
    u, s, v = torch.linalg.svd(merged + residual, full_matrices=False)
    count = int(len(s) * fraction)
    return merged + s[:count].mean() * u[:, :count] @ v[:count]


ORACLES = {"tsv_m": literal_tsv_m, "iso_c": literal_iso_c, "iso_cts": literal_iso_cts, "ace": literal_ace}


@every_shape
@pytest.mark.parametrize("n", [2, 3, 8])
@pytest.mark.parametrize("merge_type", ORACLES)
def test_equals_the_definition(merge_type, n, shape):
    vectors = task_matrices(n, n, *shape)
    assert relative(merge(vectors, merge_type)[0], ORACLES[merge_type](vectors)) < 1e-5


@every_shape
def test_ace_equals_the_definition_on_heterogeneous_layers(shape):
    vectors = task_matrices(3, 3, *shape) * torch.tensor([1.0, 8.0, 0.125], dtype=torch.float64)[:, None, None]
    assert relative(merge(vectors, "ace")[0], literal_ace(vectors)) < 1e-5


@every_shape
@pytest.mark.parametrize("scaling", [0.3, 1.0])
def test_svc_equals_the_definition(shape, scaling):
    vectors = task_matrices(5, 3, *shape)
    merged, _ = merge(vectors, "svc", inner_settings={"scaling": scaling})
    assert relative(merged, literal_svc(scaling * vectors.sum(0), vectors, 0.1)) < 1e-5


# -- laws ---------------------------------------------------------------------------------------------------------


@every_method
def test_order_of_experts_does_not_matter(merge_type):
    vectors = task_matrices(1, 4, 12, 20)
    assert relative(merge(vectors, merge_type)[0], merge(vectors.flip(0), merge_type)[0]) < 1e-5


@every_method
def test_scale_equivariance(merge_type):
    vectors = task_matrices(2, 3, 12, 20)
    assert relative(merge(vectors * 1024, merge_type)[0], 1024 * merge(vectors, merge_type)[0]) < 1e-5


@every_method
def test_zero_task_vectors_are_skipped(merge_type):
    vectors = task_matrices(3, 3, 12, 20)
    with_zero = torch.cat([vectors, torch.zeros_like(vectors[:1])])
    assert relative(merge(with_zero, merge_type)[0], merge(vectors, merge_type)[0]) < 1e-6


@every_method
@pytest.mark.parametrize("n", [1, 3])
def test_experts_equal_to_the_base_give_the_base(merge_type, n):
    assert not merge(torch.zeros(n, 6, 8, dtype=torch.float64), merge_type)[0].any()


@every_method
def test_conv1d_and_mixtures_are_the_same_per_matrix(merge_type):
    layers = [task_matrices(seed, 3, 10, 14) for seed in (4, 5)]
    plain = [merge(layer, merge_type)[0] for layer in layers]
    assert relative(merge(layers[0], merge_type, ParameterKind.TRANSPOSED_LINEAR)[0], plain[0]) < 1e-6
    stacked, _ = merge(torch.stack(layers, dim=1), merge_type, ParameterKind.EXPERT_LINEAR)
    assert relative(stacked, torch.stack(plain)) < 1e-6


@pytest.mark.parametrize("shape", [(3, 20), (20, 3), (1, 5)], ids=str)
@every_method
def test_more_experts_than_directions(merge_type, shape):
    merged, _ = merge(task_matrices(6, 6, *shape), merge_type)
    assert torch.isfinite(merged).all()
    assert merged.any()


def test_tsv_m_of_one_expert_is_that_expert():
    vectors = task_matrices(7, 1, 12, 20)
    assert relative(merge(vectors, "tsv_m")[0], vectors[0]) < 1e-5


def test_tsv_m_of_identical_experts_is_their_truncation():
    """The polar factors share each direction among the copies, so that nothing is counted twice."""
    expert = task_matrices(8, 1, 12, 20)[0]
    merged, report = merge(expert.expand(3, -1, -1), "tsv_m")
    u, s, v = torch.linalg.svd(expert, full_matrices=False)
    assert relative(merged, u[:, :4] * s[:4] @ v[:4]) < 1e-5
    assert report["tsv_energy"] == pytest.approx((s[:4].square().sum() / s.square().sum()).item(), rel=1e-6)


def test_orthogonal_low_rank_experts_are_all_kept_by_tsv_m():
    vectors = torch.zeros(2, 12, 12, dtype=torch.float64)
    vectors[0, :6, :6], vectors[1, 6:, 6:] = task_matrices(9, 2, 6, 6)
    assert relative(merge(vectors, "tsv_m")[0], vectors.sum(0)) < 1e-5


@pytest.mark.parametrize("merge_type", ["tsv_m", "iso_c", "iso_cts"])
def test_low_rank_experts_stay_in_their_span(merge_type):
    """Null-space vectors of an SVD are arbitrary: none of them may reach the result."""
    vectors = task_matrices(10, 3, 24, 30, rank=2)
    merged, _ = merge(vectors, merge_type)
    assert torch.linalg.matrix_rank(merged, rtol=1e-5) <= 6
    rows = torch.linalg.svd(torch.cat(list(vectors)), full_matrices=False)[2][:6]
    assert relative(merged @ rows.mT @ rows, merged) < 1e-5


def test_iso_c_has_one_singular_value():
    values = torch.linalg.svdvals(merge(task_matrices(11, 3, 12, 20), "iso_c")[0])
    assert (values.max() / values.min()).item() == pytest.approx(1.0, abs=1e-5)


def test_directions_per_task_never_exceed_the_matrix():
    for size in range(1, 40):
        for tasks in range(1, 12):
            for fraction in (0.0, 0.5, 0.8, 1.0):
                assert 0 <= directions_per_task(size, tasks, fraction) * tasks <= size


def test_svc_leaves_one_expert_alone():
    vectors = task_matrices(12, 1, 12, 20)
    merged, _ = merge(vectors, "svc", inner_settings={"scaling": 1.0})
    assert relative(merged, vectors[0]) < 1e-5


def test_svc_undoes_the_accumulation_of_identical_experts():
    """The sum of n copies answers n times as strongly as each: calibrated back to one."""
    expert = task_matrices(13, 1, 12, 20)[0]
    merged, _ = merge(expert.expand(4, -1, -1), "svc", inner_settings={"scaling": 1.0})
    assert relative(merged, expert) < 1e-5


def test_svc_leaves_orthogonal_experts_alone():
    vectors = torch.zeros(2, 12, 12, dtype=torch.float64)
    vectors[0, :6, :6], vectors[1, 6:, 6:] = task_matrices(14, 2, 6, 6)
    merged, _ = merge(vectors, "svc", inner_settings={"scaling": 1.0})
    assert relative(merged, vectors.sum(0)) < 1e-5


# -- SVC as a wrapper ---------------------------------------------------------------------------------------------


def test_svc_gives_other_parameters_to_the_inner_method():
    vectors = task_matrices(15, 2, 1, 6)
    config = SvcConfig(inner_settings={"scaling": 0.5})
    merged = Svc()(group_of(vectors, config, ParameterKind.BIAS))
    assert relative(merged, 0.5 * vectors.sum(0)) < 1e-6


@pytest.mark.parametrize(
    ("inner", "alpha"), [("task_arithmetic", 0.1), ("iso_cts", 0.2), ("tsv_m", 1.0), ("wudi", 1.0)]
)
def test_svc_takes_the_strength_of_the_paper(inner, alpha):
    assert SvcConfig(inner=inner).strength == alpha
    assert SvcConfig(inner=inner, alpha=0.5).strength == 0.5


@pytest.mark.parametrize("inner", ["wudi", "tsv_m", "ties", "dare"])
def test_svc_wraps_other_methods_and_their_rounds(inner):
    vectors = task_matrices(16, 3, 12, 20)
    merged, _ = merge(vectors, "svc", inner=inner)
    plain, _ = merge(vectors, inner)
    assert relative(merged, literal_svc(plain, vectors, SvcConfig(inner=inner).strength)) < 1e-4


def test_svc_settings_travel_with_the_recipe(tmp_path):
    config = SvcConfig(inner="ties", inner_settings={"density": 0.3}, alpha=0.2)
    config.save_pretrained(tmp_path)
    loaded = MergeConfig.from_pretrained(tmp_path)
    assert loaded == config
    assert loaded.inner_config.density == 0.3


def test_a_rule_may_choose_svc():
    config = TaskArithmeticConfig(rules=[{"match": "first", "merge_type": "svc"}])
    resolved = config.resolve("first.weight", 0.5, ["a", "b"])
    assert resolved.inner_config.weights == [1.0, 1.0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"inner": "svc"}, "calibrates itself"),
        ({"inner": "tiess"}, "Did you mean 'ties'"),
        ({"inner_settings": {"scale": 1.0}}, "Did you mean 'scaling'"),
        ({"inner_settings": {"scaling": "big"}}, "TaskArithmeticConfig.scaling"),
        ({"inner_settings": {"seed": 3}}, "'seed' is not a setting"),
        ({"inner_settings": [1]}, "must be a dictionary"),
    ],
    ids=str,
)
def test_svc_refuses_an_inner_method_that_cannot_be(settings, message):
    with pytest.raises(ConfigError, match=message):
        SvcConfig(**settings)


def test_svc_respects_the_number_of_experts_of_the_inner_method():
    with pytest.raises(ConfigError, match="inner='slerp' merges"):
        merge(task_matrices(17, 3, 6, 8), "svc", inner="slerp")


# -- decompositions -----------------------------------------------------------------------------------------------


def test_polar_factor_is_the_nearest_orthonormal_matrix():
    matrix = task_matrices(18, 1, 12, 5)[0]
    factor = polar_factor(matrix)
    assert relative(factor.mT @ factor, torch.eye(5, dtype=torch.float64)) < 1e-10
    assert relative(factor @ (factor.mT @ matrix), matrix) < 1e-10


def test_randomized_triplets_find_a_low_rank_matrix_exactly():
    matrix = task_matrices(19, 1, 30, 50, rank=5)[0]
    found = randomized_triplets(matrix, 5, 5, 1, np.random.default_rng(0))
    assert relative(found.matrix(), matrix) < 1e-6
    assert found.residual < 1e-6


def test_randomized_triplets_tell_their_error():
    matrix = task_matrices(20, 1, 60, 80)[0]
    residuals = [randomized_triplets(matrix, 10, 5, power, np.random.default_rng(0)).residual for power in (0, 2, 12)]
    assert residuals == sorted(residuals, reverse=True)
    exact = singular_triplets(matrix).top(10)
    found = randomized_triplets(matrix, 10, 20, 12, np.random.default_rng(0))
    assert torch.allclose(found.values, exact.values, rtol=1e-3)


@pytest.mark.parametrize("merge_type", ["tsv_m", "iso_cts"])
def test_randomized_svd_is_near_the_exact_one_and_reported(merge_type):
    vectors = task_matrices(21, 4, 40, 60)
    exact, plain_report = merge(vectors, merge_type)
    near, report = merge(vectors, merge_type, svd="randomized", power_iterations=10, oversampling=20)
    assert relative(near, exact) < 1e-2
    assert 0 <= report["svd_residual"] < 1e-2
    assert "svd_residual" not in plain_report


def test_randomized_svd_depends_on_seed_and_expert_only():
    vectors = task_matrices(22, 3, 20, 30)
    settings = {"svd": "randomized", "power_iterations": 0}
    assert torch.equal(merge(vectors, "tsv_m", **settings)[0], merge(vectors, "tsv_m", **settings)[0])
    config = MergeConfig.from_merge_type("tsv_m", **settings)
    group = group_of(vectors, config)
    first, second = (TsvM()(dataclasses.replace(group, seed=seed)) for seed in (0, 1))
    assert not torch.equal(first, second)
