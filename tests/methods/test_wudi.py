"""WUDI: laws, and equality with the definitions written literally in float64."""

from __future__ import annotations

import math
from unittest import mock

import pytest
import torch

from hf_merge import ConfigError, WudiConfig
from hf_merge.methods.base import ParameterKind
from hf_merge.methods.wudi import Wudi, merge_low_rank
from hf_merge.methods.wudi.layer import REFERENCE_RMS
from hf_merge.methods.wudi.objective import GramObjective, RowObjective, Term
from hf_merge.methods.wudi.solvers import effective_rank, exponential_filter

from .helpers_linear import group_of, merge, relative, task_matrices


SHAPES = {
    "square": {"out": 24, "inp": 24},
    "tall": {"out": 40, "inp": 16},
    "wide": {"out": 8, "inp": 48},
    "very wide": {"out": 3, "inp": 96},
    "rank-deficient": {"out": 24, "inp": 30, "rank": 3},
}
SOLVERS = ("adaptive", "spectral", "closed_form", "adam", "sgd", "optmerge")
STEPS = 120


# -- the definitions, literally -----------------------------------------------------------------------------------


def literal_loss(merged, targets, projectors, norms):
    return sum(
        ((merged - y) @ p.mT).square().sum() / norm**2 for y, p, norm in zip(targets, projectors, norms, strict=True)
    )


def literal_descent(optimizer, targets, projectors, norms, start, lr, steps):
    merged = torch.nn.Parameter(start.clone())
    optimizer = optimizer([merged], lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        literal_loss(merged, targets, projectors, norms).backward()
        optimizer.step()
    return merged.detach()


def literal_normal_equations(vectors):
    gram = sum(t.mT @ t / t.norm() ** 2 for t in vectors)
    target = sum(t @ t.mT @ t / t.norm() ** 2 for t in vectors)
    return gram, target, vectors.sum(0)


def literal_spectral(vectors, f):
    """M = S − S V diag(f) Vᵀ + D V diag(f/l) Vᵀ; `f` maps the falling eigenvalues to the filter."""
    gram, target, total = literal_normal_equations(vectors)
    values, basis = torch.linalg.eigh(gram)
    values, basis = values.flip(0).clamp_min(0), basis.flip(1)
    gain = f(values)
    used = (values > 1e-13 * values[0]) & (gain > 0)
    gain, values, basis = gain[used], values[used], basis[:, used]
    return total - total @ basis * gain @ basis.mT + target @ basis * (gain / values) @ basis.mT


def literal_adaptive_rank(values):
    values = torch.where(values > 1e-13 * values[0], values, 0.0)
    return math.ceil((values.sqrt().sum() ** 2 / values.sum()).item())


def literal_optmerge_terms(vectors):
    rank, mean = max(1, min(vectors.shape[1:]) // len(vectors)), vectors.mean(0)
    targets, projectors = [], []
    for vector in vectors:
        u, s, v = torch.linalg.svd(vector - mean, full_matrices=False)
        targets.append(u[:, :rank] @ torch.diag(s[:rank]) @ v[:rank] + mean)
        _, s, v = torch.linalg.svd(vector, full_matrices=False)
        projectors.append(torch.diag(s[:rank]) @ v[:rank])
    return targets, projectors


def oracle(vectors, solver):
    vectors = torch.stack([vector for vector in vectors if vector.norm() > 0])
    n, inp = len(vectors), vectors.shape[2]
    norms = [vector.norm() for vector in vectors]
    gram, target, total = literal_normal_equations(vectors)
    if solver == "adaptive":
        return literal_spectral(vectors, lambda values: (torch.arange(inp) < literal_adaptive_rank(values)).double())
    if solver == "spectral":
        top = torch.arange(inp) < int(0.65 * inp)
        return literal_spectral(vectors, lambda values: (1 - torch.exp(-1300 * values)) * top)
    if solver == "closed_form":
        return target @ torch.linalg.inv(gram + 1e-6 * gram.trace() / inp * torch.eye(inp, dtype=gram.dtype))
    if solver == "adam":
        return literal_descent(torch.optim.Adam, vectors, vectors, norms, total, 1e-5, STEPS)
    if solver == "sgd":
        rate = 0.5 / gram.norm().item()
        return literal_descent(torch.optim.SGD, vectors, vectors, norms, total / n, rate, STEPS)
    return literal_descent(torch.optim.Adam, *literal_optmerge_terms(vectors), norms, total, 1e-5, STEPS)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("n", [2, 8])
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_definition(shape, n, solver):
    vectors = task_matrices(n, n, **SHAPES[shape])
    merged, _ = merge(vectors, "wudi", solver=solver, num_steps=STEPS)
    assert relative(merged, oracle(vectors, solver)) < 1e-5


# -- laws ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", SOLVERS)
def test_one_expert_is_itself(solver):
    vectors = task_matrices(0, 1, 12, 20)
    merged, report = merge(vectors, "wudi", solver=solver)
    # The ridge keeps the exact minimiser slightly short of the expert.
    assert relative(merged, vectors[0]) < (1e-3 if solver == "closed_form" else 1e-5)
    assert report["wudi_loss_after"] <= 1e-6 * vectors[0].norm() ** 2


@pytest.mark.parametrize("solver", SOLVERS)
def test_order_of_experts_does_not_matter(solver):
    vectors = task_matrices(1, 4, 12, 20)
    forward, _ = merge(vectors, "wudi", solver=solver)
    backward, _ = merge(vectors.flip(0), "wudi", solver=solver)
    assert relative(forward, backward) < 1e-5


def test_identical_isotropic_experts_give_that_expert():
    """Where all singular values are equal, the effective rank is the rank and nothing keeps the sum."""
    expert = 1e-2 * torch.linalg.qr(task_matrices(2, 1, 20, 12)[0]).Q.mT
    merged, report = merge(expert.expand(3, -1, -1), "wudi")
    assert relative(merged, expert) < 1e-5
    assert report["effective_rank"] == 12
    assert report["wudi_loss_after"] < 1e-8 * report["wudi_loss_before"]


def test_orthogonal_experts_are_all_kept():
    """Experts on disjoint inputs do not interfere: the sum has no loss and every solver leaves it alone."""
    vectors = torch.zeros(2, 6, 16, dtype=torch.float64)
    vectors[0, :, :8], vectors[1, :, 8:] = task_matrices(3, 2, 6, 8)
    for solver in ("adaptive", "spectral", "adam"):
        merged, report = merge(vectors, "wudi", solver=solver)
        assert relative(merged, vectors.sum(0)) < 1e-5
        assert report["wudi_loss_after"] < 1e-10


@pytest.mark.parametrize(
    "settings", [{}, {"solver": "spectral"}, {"solver": "closed_form"}, {"solver": "sgd"}], ids=str
)
def test_scale_equivariance(settings):
    vectors = task_matrices(4, 3, 12, 20)
    small, _ = merge(vectors, "wudi", **settings)
    large, _ = merge(vectors * 1024, "wudi", **settings)
    assert relative(large, small * 1024) < 1e-6


def test_normalize_makes_adam_equivariant_to_scale():
    vectors = task_matrices(4, 3, 12, 20)
    outcomes = []
    for factor in (1 / 64, 1, 64):
        merged, report = merge(vectors * factor, "wudi", solver="adam", normalize=True)
        outcomes.append(merged / factor)
        assert report["wudi_loss_after"] < report["wudi_loss_before"]
    assert relative(outcomes[0], outcomes[1]) < 1e-5
    assert relative(outcomes[2], outcomes[1]) < 1e-5


def test_normalize_solves_at_the_reference_scale():
    vectors = task_matrices(5, 3, 12, 20)
    vectors = (vectors * (REFERENCE_RMS / vectors.square().mean().sqrt())).float().double()
    normalized, _ = merge(vectors, "wudi", solver="adam", normalize=True)
    plain, _ = merge(vectors, "wudi", solver="adam")
    assert relative(normalized, plain) < 1e-5


def test_experts_may_differ_in_norm_with_equalize_norms():
    vectors = task_matrices(6, 3, 12, 20)
    scaled = vectors * torch.tensor([1 / 16, 1.0, 16.0], dtype=torch.float64)[:, None, None]
    equal, _ = merge(scaled, "wudi", equalize_norms=True)
    norms = scaled.flatten(1).norm(dim=1)
    by_hand = scaled * (norms.log().mean().exp() / norms)[:, None, None]
    assert relative(equal, oracle(by_hand, "adaptive")) < 1e-5


# -- traps --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", SOLVERS)
def test_zero_task_vectors_are_skipped(solver):
    vectors = task_matrices(7, 3, 12, 20)
    with_zero = torch.cat([vectors[:1], torch.zeros_like(vectors[:1]), vectors[1:]])
    assert relative(merge(with_zero, "wudi", solver=solver)[0], merge(vectors, "wudi", solver=solver)[0]) < 1e-6


@pytest.mark.parametrize("solver", SOLVERS)
def test_experts_equal_to_the_base_give_the_base(solver):
    merged, report = merge(torch.zeros(3, 6, 8, dtype=torch.float64), "wudi", solver=solver, equalize_norms=True)
    assert torch.equal(merged, torch.zeros(6, 8, dtype=torch.float64))
    assert report == {}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("solver", SOLVERS)
def test_what_is_not_finite_is_left_for_the_engine_to_name(solver, value):
    vectors = task_matrices(7, 3, 12, 20)
    vectors[1, 2, 3] = value
    assert merge(vectors, "wudi", solver=solver)[0].isnan().all()


@pytest.mark.parametrize("solver", SOLVERS)
def test_conv1d_is_contracted_on_the_input_side(solver):
    vectors = task_matrices(8, 3, 10, 14)
    plain, _ = merge(vectors, "wudi", solver=solver)
    transposed, _ = merge(vectors, "wudi", ParameterKind.TRANSPOSED_LINEAR, solver=solver)
    assert relative(transposed, plain) < 1e-6


def test_experts_of_a_mixture_are_separate_layers():
    layers = [task_matrices(seed, 3, 10, 14) for seed in (9, 10)]
    stacked, report = merge(torch.stack(layers, dim=1), "wudi", ParameterKind.EXPERT_LINEAR)
    singles = [merge(layer, "wudi") for layer in layers]
    assert torch.equal(stacked, torch.stack([merged for merged, _ in singles]))
    for key, value in report.items():
        assert value == pytest.approx(sum(single[key] for _, single in singles) / 2)


@pytest.mark.parametrize("out", [6, 20], ids=["few rows", "many rows"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_both_forms_of_the_objective_equal_its_definition(dtype, out):
    vectors = task_matrices(11, 3, out, 20)
    norms = [vector.norm() for vector in vectors]
    origin, change, scale = vectors.sum(0), task_matrices(12, 1, out, 20)[0], 4.0
    point = (origin + scale * change).requires_grad_()
    loss = literal_loss(point, vectors, vectors, norms)
    loss.backward()
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    for form in (GramObjective, RowObjective):
        terms = (Term(vector, vector, vector.norm().item() ** -2) for vector in vectors)
        objective = form.build(terms, origin, dtype, scale)
        assert objective.loss(change.to(dtype)) * scale**2 == pytest.approx(loss.item(), rel=tolerance)
        assert relative(objective.half_gradient(change.to(dtype)) * 2 * scale, point.grad) < tolerance
        assert objective.constant * scale**2 == pytest.approx(literal_loss(origin, vectors, vectors, norms).item())
        assert not objective.is_minimal()


@pytest.mark.parametrize("form", [GramObjective, RowObjective])
def test_gradient_of_identical_experts_is_known_to_vanish_at_their_mean(form):
    vectors = task_matrices(13, 1, 9, 20).expand(3, -1, -1)
    terms = (Term(vector, vector, vector.norm().item() ** -2) for vector in vectors)
    assert form.build(terms, vectors.sum(0) / 3, torch.float32).is_minimal()


def test_report_gives_the_losses_and_the_rank():
    vectors = task_matrices(12, 3, 12, 20)
    merged, report = merge(vectors, "wudi")
    norms = [vector.norm() for vector in vectors]
    before = literal_loss(vectors.sum(0), vectors, vectors, norms).item()
    after = literal_loss(merged, vectors, vectors, norms).item()
    assert report["wudi_loss_before"] == pytest.approx(before, rel=1e-6)
    assert report["wudi_loss_after"] == pytest.approx(after, rel=1e-4)
    gram = literal_normal_equations(vectors)[0]
    assert report["effective_rank"] == literal_adaptive_rank(torch.linalg.eigvalsh(gram).flip(0))


def test_filter_is_stable_where_eigenvalues_vanish():
    values = torch.tensor([0.0, 1e-200, 1e-15, 1e-9, 1e-3, 1.0], dtype=torch.float64)
    phi = exponential_filter(values, 1300.0, 6)
    assert phi[:4].tolist() == pytest.approx([1300.0] * 4, rel=1e-5)
    assert phi[5] == pytest.approx(1.0)


def test_effective_rank_of_equal_eigenvalues_is_their_number():
    for count in (1, 3, 7, 10):
        assert effective_rank(torch.cat([torch.full((count,), 0.1), torch.zeros(5)]).double()) == count


# -- the check of the norms ---------------------------------------------------------------------------------------


def norm_remarks(factors: list[float], **settings) -> list[str]:
    vectors = task_matrices(13, len(factors), 12, 20) * torch.tensor(factors, dtype=torch.float64)[:, None, None]
    config, method = WudiConfig(**settings), Wudi()
    groups = [group_of(vectors, config, name=name) for name in ("a.weight", "b.weight")]
    for round in range(method.rounds(config)):
        method.conclude(iter([(group.name, method.observe(group, round)) for group in groups]), round, config)
    for group in groups:
        method(group)
    return method.remarks()


def test_remarks_once_on_mismatched_norms_and_names_both_experts():
    (remark,) = norm_remarks([1.0, 0.1, 2.0])
    assert "'expert2' has" in remark and "times the norm of that of 'expert1'" in remark


@pytest.mark.parametrize("settings", [{"check_norms": False}, {"equalize_norms": True}])
def test_no_remark_where_it_is_switched_off_or_cured(settings):
    assert not norm_remarks([1.0, 0.1], **settings)


def test_no_remark_on_norms_that_match():
    assert not norm_remarks([1.0, 0.5, 2.0])


def test_an_attempt_without_enough_memory_does_not_count(monkeypatch):
    vectors = task_matrices(13, 2, 12, 20) * torch.tensor([1.0, 0.1], dtype=torch.float64)[:, None, None]
    once, twice = Wudi(), Wudi()
    once(group_of(vectors, WudiConfig()))
    with monkeypatch.context() as patched:
        patched.setattr("hf_merge.methods.wudi.method.solve", mock.Mock(side_effect=torch.OutOfMemoryError))
        with pytest.raises(torch.OutOfMemoryError):
            twice(group_of(vectors, WudiConfig()))
    twice(group_of(vectors, WudiConfig()))
    assert twice.noticed() == once.noticed()


def test_only_equal_norms_need_a_pass_over_the_checkpoints():
    assert Wudi().rounds(WudiConfig()) == 0
    assert Wudi().rounds(WudiConfig(equalize_norms=True)) == 1


def test_descent_starts_from_another_methods_result():
    vectors = task_matrices(14, 3, 12, 20)
    start, _ = merge(vectors, "tsv_m")
    stayed, _ = merge(vectors, "wudi", solver="adam", initial="tsv_m", num_steps=1, learning_rate=1e-12)
    assert relative(stayed, start) < 1e-5
    with pytest.raises(ConfigError, match="initial"):
        WudiConfig(solver="adam", initial="wudi")


# -- low rank -----------------------------------------------------------------------------------------------------


def random_factors(seed, out, inp, ranks):
    generator = torch.Generator().manual_seed(seed)
    return [
        (1e-2 * torch.randn(out, r, generator=generator), 1e-2 * torch.randn(r, inp, generator=generator))
        for r in ranks
    ]


@pytest.mark.parametrize("solver", ["adaptive", "spectral", "closed_form", "sgd"])
@pytest.mark.parametrize("ranks", [(4, 4, 4), (1, 5), (8,), (20, 20, 20)], ids=str)
@pytest.mark.parametrize(("out", "inp"), [(30, 40), (40, 30)])
def test_low_rank_equals_the_dense_merge(solver, ranks, out, inp):
    factors = [(b.double(), a.double()) for b, a in random_factors(0, out, inp, ranks)]
    left, right = merge_low_rank(factors, WudiConfig(solver=solver, num_steps=STEPS))
    assert left.shape[1] == right.shape[0] == min(sum(ranks), inp)
    dense = oracle(torch.stack([b @ a for b, a in factors]), solver)
    assert relative(left @ right, dense) < 1e-6


def test_low_rank_skips_zero_experts_and_keeps_float32():
    factors = random_factors(1, 12, 16, (2, 2))
    zero = (torch.zeros(12, 2), factors[0][1])
    left, right = merge_low_rank([*factors, zero], WudiConfig())
    expected = oracle(torch.stack([b.double() @ a.double() for b, a in factors]), "adaptive")
    assert left.dtype == right.dtype == torch.float32
    assert relative(left @ right, expected) < 1e-5
    left, right = merge_low_rank([zero, zero], WudiConfig())
    assert not (left @ right).any()


def test_low_rank_does_not_skip_what_is_not_finite():
    factors = random_factors(1, 12, 16, (2, 2))
    factors[0][1][0, 0] = float("nan")
    left, right = merge_low_rank(factors, WudiConfig())
    assert (left @ right).isnan().all()


@pytest.mark.parametrize("solver", ["adam", "optmerge"])
def test_low_rank_refuses_solvers_that_work_entry_by_entry(solver):
    with pytest.raises(ConfigError, match=f"solver='{solver}' cannot merge low-rank factors"):
        merge_low_rank(random_factors(2, 6, 8, (2,)), WudiConfig(solver=solver))


# -- settings -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [{"solver": "newton"}, {"time": 0}, {"rank_ratio": 1.5}, {"num_steps": 0}, {"learning_rate": -1.0}, {"ridge": 0}],
    ids=str,
)
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(ConfigError, match=next(iter(settings))):
        WudiConfig(**settings)


def test_initial_and_steps_are_followed():
    vectors = task_matrices(14, 3, 12, 20)
    mean, _ = merge(vectors, "wudi", solver="adam", initial="mean", num_steps=1, learning_rate=1e-12)
    assert relative(mean, vectors.mean(0)) < 1e-5
    total, _ = merge(vectors, "wudi", solver="sgd", initial="sum", num_steps=1, learning_rate=1e-12)
    assert relative(total, vectors.sum(0)) < 1e-5
