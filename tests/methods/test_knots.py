"""KnOTS, Core Space, concatenation and truncation against their formulas on dense float64 matrices."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hf_merge import CatConfig, ConfigError, CoreSpaceConfig, KnotsConfig, SvdConfig
from hf_merge.config import MergeConfig
from hf_merge.low_rank import Factors
from hf_merge.methods.base import LowRankGroup, ParameterKind, TensorGroup
from hf_merge.registry import get_merge_method


NAMES = ("a", "b", "c")
SHAPES = {"tall": (11, 6), "wide": (6, 11), "square": (8, 8)}
every_shape = pytest.mark.parametrize("shape", SHAPES)


def random_experts(shape: tuple[int, int], ranks: tuple[int, ...] = (1, 2, 3)) -> list[Factors]:
    generator = torch.Generator().manual_seed(sum(shape))
    draw = lambda *size: torch.randn(*size, generator=generator, dtype=torch.float64)  # noqa: E731
    return [Factors(draw(shape[0], rank), draw(rank, shape[1])) for rank in ranks]


def merge_factors(config: MergeConfig, experts: list[Factors]) -> Tensor:
    settings = config.resolve("layer", 0.0, NAMES)
    group = LowRankGroup("layer", ParameterKind.LINEAR, experts, NAMES, settings)
    merged = get_merge_method(config.merge_type).method_cls().merge_low_rank(group)
    return merged.dense()


def merge_dense(config: MergeConfig, matrices: list[Tensor]) -> Tensor:
    """The same method on models: a base model of zeros, and the task vectors as its experts."""
    settings = config.resolve("layer", 0.0, NAMES)
    group = TensorGroup("layer", ParameterKind.LINEAR, torch.zeros_like(matrices[0]), matrices, NAMES, settings)
    return get_merge_method(config.merge_type).method_cls()(group)


@every_shape
def test_knots_by_its_formula(shape: str):
    """[T_1 … T_n] = U Σ [V_1ᵀ … V_nᵀ], TIES on the V_iᵀ."""
    experts = random_experts(SHAPES[shape])
    matrices = [expert.dense() for expert in experts]
    left, values, right = torch.linalg.svd(torch.cat(matrices, dim=1), full_matrices=False)
    rank = int((values > 1e-10).sum())
    parts = [part[:rank] for part in right.split(matrices[0].shape[1], dim=1)]
    config = KnotsConfig(inner="ties", inner_settings={"density": 0.4}, scaling=0.7)
    ties = get_merge_method("ties").config_cls(density=0.4)
    expected = 0.7 * (left[:, :rank] * values[:rank]) @ merge_dense(ties, parts)
    assert torch.allclose(merge_factors(config, experts), expected, atol=1e-9)
    assert torch.allclose(merge_dense(config, matrices), expected, atol=1e-9)


@every_shape
def test_core_space_by_its_formula(shape: str):
    """M_i = Uᵀ T_i V in the bases of all columns and all rows, Iso-C on the M_i."""
    experts = random_experts(SHAPES[shape])
    matrices = [expert.dense() for expert in experts]
    left, values, right = torch.linalg.svd(sum(matrices), full_matrices=False)
    rank = int((values > 1e-10).sum())
    expected = 0.7 * values[:rank].mean() * left[:, :rank] @ right[:rank]
    config = CoreSpaceConfig(inner="iso_c", scaling=0.7)
    assert torch.allclose(merge_factors(config, experts), expected, atol=1e-9)
    assert torch.allclose(merge_dense(config, matrices), expected, atol=1e-9)


@every_shape
@pytest.mark.parametrize("config_cls", [KnotsConfig, CoreSpaceConfig])
def test_linear_inner_methods_do_not_notice_the_bases(config_cls: type, shape: str):
    experts = random_experts(SHAPES[shape])
    config = config_cls(inner="task_arithmetic", inner_settings={"scaling": 0.3, "weights": [1.0, 2.0, -1.0]})
    expected = 0.3 * sum(w * expert.dense() for w, expert in zip((1.0, 2.0, -1.0), experts, strict=True))
    assert torch.allclose(merge_factors(config, experts), expected, atol=1e-9)


@every_shape
def test_core_space_does_not_depend_on_how_factors_share_their_size(shape: str):
    experts = random_experts(SHAPES[shape])
    other = [Factors(expert.left * 100, expert.right / 100) for expert in experts]
    config = CoreSpaceConfig(inner="ties")
    assert torch.allclose(merge_factors(config, experts), merge_factors(config, other), atol=1e-9)


@every_shape
def test_cat_and_svd(shape: str):
    experts = random_experts(SHAPES[shape])
    weights = [0.5, -1.0, 2.0]
    total = sum(w * expert.dense() for w, expert in zip(weights, experts, strict=True))
    assert torch.allclose(merge_factors(CatConfig(weights=weights), experts), total)
    left, values, right = torch.linalg.svd(total)
    for rank, kept in ((None, 3), (2, 2), (20, 6)):
        size = min(kept, len(values))
        best = (left[:, :size] * values[:size]) @ right[:size]
        assert torch.allclose(merge_factors(SvdConfig(weights=weights, rank=rank), experts), best, atol=1e-9)
        if rank is not None:
            assert torch.allclose(
                merge_dense(SvdConfig(weights=weights, rank=rank), [e.dense() for e in experts]), best
            )


@pytest.mark.parametrize("config_cls", [KnotsConfig, CoreSpaceConfig])
def test_zero_experts(config_cls: type):
    experts = [expert.scaled(0.0) for expert in random_experts((5, 4))]
    assert not merge_factors(config_cls(), experts).any()
    one = [*experts[:2], random_experts((5, 4))[2]]
    assert merge_factors(config_cls(), one).isfinite().all()


@pytest.mark.parametrize(
    "config_cls, settings, fragment",
    [
        (KnotsConfig, {"inner": "wudi"}, "must be one of 'ties'"),
        (KnotsConfig, {"inner_settings": {"densty": 0.2}}, "Did you mean 'density'"),
        (CoreSpaceConfig, {"inner": "regmean"}, "must be one of"),
        (SvdConfig, {"rank": 0}, "rank"),
    ],
)
def test_settings_are_checked(config_cls: type, settings: dict, fragment: str):
    with pytest.raises(ConfigError, match=fragment):
        config_cls(**settings)
