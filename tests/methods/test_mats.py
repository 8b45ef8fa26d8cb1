"""MaTS: conjugate gradients against the dense solution, and what becomes of directions that no token has."""

from __future__ import annotations

import pytest
import torch

from hf_merge import MatsConfig, RegMeanConfig, TaskArithmeticConfig
from hf_merge.methods.mats.method import conjugate_gradients

from .helpers_models import backbone, merger, models, samples


LAYER = "bert.encoder.layer.0.attention.self.query.weight"


def inputs_of(model, rows) -> torch.Tensor:
    """What a linear layer reads, (tokens, in), float64, each sample alone."""
    seen: list[torch.Tensor] = []
    hook = model.get_submodule(LAYER.rpartition(".")[0]).register_forward_pre_hook(
        lambda _, args: seen.append(args[0][0])
    )
    for row in rows:
        model(input_ids=row["input_ids"][None])
    hook.remove()
    return torch.cat(seen).detach().double()


def system(data, normalize: bool = True):
    """A = Σ G_i and Σ W_i G_i on dense float64 matrices."""
    _, experts = models()
    total, right = 0.0, 0.0
    for task, expert in experts.items():
        rows = inputs_of(expert, data[task])
        gram = rows.T @ rows / (len(rows) if normalize else 1)
        total, right = total + gram, right + backbone(expert)[LAYER] @ gram
    return total, right


@pytest.mark.parametrize("shape", [(3, 5), (5, 3), (1, 1)])
def test_conjugate_gradients_solve(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    factor = torch.randn(shape[1], 2 * shape[1], generator=generator, dtype=torch.float64)
    matrix = factor @ factor.T
    expected = torch.randn(shape, generator=generator, dtype=torch.float64)
    found, steps, residual = conjugate_gradients(matrix, expected @ matrix, 200, 1e-12)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)
    assert residual <= 1e-12
    assert steps < 200


def test_zero_right_side_needs_no_step() -> None:
    found, steps, _ = conjugate_gradients(torch.eye(3), torch.zeros(2, 3), 10, 0.0)
    assert steps == 0
    assert not found.any()


@pytest.mark.parametrize("normalize", [True, False])
def test_equals_the_dense_solution(normalize: bool) -> None:
    data = samples(40)
    total, right = system(data, normalize)
    made = merger(MatsConfig(iterations=2000, tolerance=1e-12, normalize=normalize))
    found = backbone(made.merge(data))[LAYER]
    torch.testing.assert_close(found, right @ torch.linalg.inv(total), rtol=0, atol=2e-4)
    row = made.report.parameters[LAYER]
    assert 0 < row["mats_steps"] < 2000
    assert row["mats_residual"] <= 1e-12


def test_equals_regmean_where_that_has_no_ridge() -> None:
    data = samples(40)
    regmean = merger(RegMeanConfig(alpha=1.0, ridge=0.0)).merge(data)
    mats = merger(MatsConfig(iterations=2000, tolerance=1e-13, init="linear")).merge(data)
    torch.testing.assert_close(backbone(mats)[LAYER], backbone(regmean)[LAYER], rtol=0, atol=2e-4)


def test_no_iteration_is_the_start() -> None:
    found = backbone(merger(MatsConfig(iterations=0)).merge(samples()))
    expected = backbone(merger(TaskArithmeticConfig(scaling=0.3)).merge())
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name])


def test_residual_falls_with_the_iterations() -> None:
    data = samples(40)

    def residual(iterations: int) -> float:
        made = merger(MatsConfig(iterations=iterations))
        made.merge(data)
        return made.report.parameters[LAYER]["mats_residual"]

    assert residual(0) > residual(5) > residual(50)


def test_directions_without_tokens_keep_the_start() -> None:
    data = {task: rows[:1] for task, rows in samples().items()}
    total, _ = system(data)
    values, vectors = torch.linalg.eigh(total)
    unseen = vectors[:, values < 1e-10 * values.max()]
    assert unseen.shape[1] > 0
    start = backbone(merger(TaskArithmeticConfig(scaling=0.3)).merge())[LAYER]
    found = backbone(merger(MatsConfig(iterations=300)).merge(data))[LAYER]
    torch.testing.assert_close(found @ unseen, start @ unseen, rtol=0, atol=1e-5)
    assert (found - start).abs().max() > 1e-3
