"""Adam on coefficients of every element is torch's Adam, without their states."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hf_merge.methods.prodistill import optimizer as module
from hf_merge.methods.prodistill.optimizer import CoefficientAdam


def problem(shape: tuple[int, ...], experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(shape, generator=generator, dtype=torch.float64)
    vectors = 0.1 * torch.randn((experts, *shape), generator=generator, dtype=torch.float64)
    vectors[0].view(-1)[::3] = 0
    return start, vectors


def literal(start, vectors, losses, **adam) -> tuple[torch.Tensor, torch.Tensor]:
    """torch's Adam on every coefficient, autograd through the merge."""
    delta = torch.zeros_like(vectors, requires_grad=True)
    optimizer = torch.optim.Adam([delta], **adam)
    for loss in losses:
        optimizer.zero_grad()
        loss(start + (delta * vectors).sum(0)).backward()
        optimizer.step()
    return (start + (delta * vectors).sum(0)).detach(), delta.detach()


def shared(start, vectors, losses, **adam) -> tuple[torch.Tensor, list[torch.Tensor]]:
    weight = nn.Parameter(start.clone())
    optimizer = CoefficientAdam([weight], [vectors], **adam)
    for loss in losses:
        optimizer.zero_grad()
        loss(weight).backward()
        optimizer.step()
    return weight.detach(), list(optimizer.coefficients(weight, start))


def losses(shape: tuple[int, ...], steps: int, scale: float = 1.0) -> list:
    targets = torch.randn((steps, *shape), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return [lambda w, t=target: scale * (w - t).square().sum() for target in targets]


@pytest.mark.parametrize("chunk", [7, 2**18])
@pytest.mark.parametrize("shape", [(12,), (6, 5), (3, 4, 5)])
@pytest.mark.parametrize("experts", [1, 2, 5])
@pytest.mark.parametrize("eps", [1e-8, 1e-2])
def test_weights_are_those_of_adam_on_every_coefficient(shape, experts, eps, chunk, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", chunk)
    start, vectors = problem(shape, experts)
    adam = {"lr": 0.05, "betas": (0.8, 0.99), "eps": eps}
    expected, _ = literal(start, vectors, losses(shape, 30), **adam)
    found, _ = shared(start, vectors, losses(shape, 30), **adam)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    assert float((found - start).abs().max()) > 0.01


def test_coefficients_are_recovered_where_epsilon_does_not_matter():
    start, vectors = problem((6, 5), 3)
    adam = {"lr": 0.01, "betas": (0.9, 0.999), "eps": 1e-12}
    _, expected = literal(start, vectors, losses((6, 5), 20), **adam)
    _, found = shared(start, vectors, losses((6, 5), 20), **adam)
    for one, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(one, wanted.flatten(), rtol=0, atol=1e-8)


def test_weights_without_a_gradient_stay():
    start, vectors = problem((4,), 2)
    weight = nn.Parameter(start.clone())
    optimizer = CoefficientAdam([weight], [vectors], lr=0.1)
    optimizer.step()
    assert torch.equal(weight, start)
    assert not any(bool(one.any()) for one in optimizer.coefficients(weight, start))
