"""Methods that decide entry by entry which experts count: Consensus TA, PCB, MagMax, SCE, Arcee Fusion, NearSwap, RAM,
Localize-and-Stitch; and Passthrough, which decides nothing."""

from __future__ import annotations

import pytest
import torch

from hf_merge import (
    ArceeFusionConfig,
    ConsensusTaConfig,
    LocalizeAndStitchConfig,
    MagMaxConfig,
    NearSwapConfig,
    PassthroughConfig,
    PcbConfig,
    RamConfig,
    SceConfig,
    TaskArithmeticConfig,
)
from hf_merge.methods.arcee_fusion.method import importance
from hf_merge.methods.pcb.method import clip_outliers
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


# -- Consensus TA -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 2, 3])
def test_consensus_ta_keeps_what_k_tasks_use(k: int):
    base, experts = random_models((20, 30), 4)
    weights, thresholds = [1.0, 0.5, 2.0, 1.0], [0.4, 0.2, 0.6, 1.0]
    vectors = dense_task_vectors(base, experts)
    total = sum(weight * vector for weight, vector in zip(weights, vectors, strict=True))
    masks = [vector.abs() >= (total - vector).abs() * t for vector, t in zip(vectors, thresholds, strict=True)]
    expected = base.double() + 0.3 * total * (sum(mask.int() for mask in masks) >= k)
    merged = merge(ConsensusTaConfig(k=k, t=thresholds, weights=weights), base, experts)
    torch.testing.assert_close(merged, expected.float())


def test_consensus_ta_of_no_task_is_task_arithmetic_and_of_too_many_the_base():
    base, experts = random_models((20, 30), 3)
    everything = merge(ConsensusTaConfig(k=0), base, experts)
    torch.testing.assert_close(everything, merge(TaskArithmeticConfig(), base, experts))
    assert torch.equal(merge(ConsensusTaConfig(k=4), base, experts), base)


# -- PCB --------------------------------------------------------------------------------------------------------------


def pcb_oracle(base, experts, density):
    """The authors' computation on stacked vectors."""
    vectors = dense_task_vectors(base, experts).flatten(1)
    magnitudes = vectors.abs()
    low, high = magnitudes.amin(dim=1, keepdim=True), magnitudes.amax(dim=1, keepdim=True)
    scores = (len(experts) * ((magnitudes - low) / (high - low)) ** 2).exp() * (vectors * vectors.sum(dim=0)).tanh()
    kept = count_kept(density, vectors.shape[1])
    lowest = scores.sort(dim=1, descending=True).values[:, kept - 1 : kept]
    scores = (scores.clamp(min=lowest) - lowest) / (scores.amax(dim=1, keepdim=True) - lowest)
    mass = scores.sum(dim=0)
    merged = (vectors * scores).sum(dim=0) / torch.where(mass > 0, mass, torch.ones_like(mass))
    return (base.double() + merged.view(base.shape)).float()


@pytest.mark.parametrize("density", [0.05, 0.2, 0.8, 1.0])
def test_pcb_agrees_with_the_dense_formula(density: float):
    base, experts = random_models((20, 30), 3)
    torch.testing.assert_close(merge(PcbConfig(density=density), base, experts), pcb_oracle(base, experts, density))


def test_pcb_of_density_zero_is_the_base_and_small_parameters_are_merged():
    base, experts = random_models((20, 30), 3)
    assert torch.equal(merge(PcbConfig(density=0.0), base, experts), base)
    one = merge(PcbConfig(), torch.tensor([1.0]), [torch.tensor([2.0]), torch.tensor([4.0])])
    assert one.item() == 3.0


def test_pcb_ignores_an_expert_equal_to_the_base():
    base, experts = random_models((1,), 1)
    torch.testing.assert_close(merge(PcbConfig(), base, [*experts, base]), experts[0])


def test_pcb_clips_the_largest_entries_of_large_parameters_only():
    vector = torch.randn(40_000, generator=torch.Generator().manual_seed(0))
    clipped = clip_outliers(vector)
    assert int((clipped != vector).sum()) == 4
    assert clipped.abs().max() == vector.abs().sort(descending=True).values[4]
    assert torch.equal(clip_outliers(vector[:9999]), vector[:9999])


# -- MagMax -----------------------------------------------------------------------------------------------------------


def test_magmax_takes_the_largest_change_of_every_entry():
    base, experts = random_models((20, 30), 4)
    vectors = dense_task_vectors(base, experts)
    largest = vectors.gather(0, vectors.abs().argmax(dim=0, keepdim=True)).squeeze(0)
    torch.testing.assert_close(merge(MagMaxConfig(), base, experts), (base.double() + 0.5 * largest).float())
    torch.testing.assert_close(merge(MagMaxConfig(scaling=1.0), base, experts[:1] * 3), experts[0])


def test_magmax_of_opposite_changes_does_not_depend_on_the_order():
    base = torch.zeros(2)
    up, down = torch.tensor([1.0, -2.0]), torch.tensor([-1.0, 2.0])
    found = [merge(MagMaxConfig(scaling=1.0), base, experts).tolist() for experts in ([up, down], [down, up])]
    assert found == [[1.0, 2.0], [1.0, 2.0]]


# -- SCE --------------------------------------------------------------------------------------------------------------


def sce_oracle(base, experts, density):
    vectors = dense_task_vectors(base, experts)
    variance = torch.stack([expert.double() for expert in experts]).var(dim=0, unbiased=False)
    if density < 1:
        chosen = dense_trim(variance, count_kept(density, int((variance > 0).sum()))) != 0
        vectors = vectors * chosen
    energies = vectors.square().flatten(1).sum(dim=1)
    merged = dense_elect_and_merge(vectors, [1.0] * len(experts))  # the signs
    agrees = vectors.sign() == merged.sign()
    weights = (energies / energies.sum()).view(-1, *[1] * base.dim()) * agrees
    mass = weights.sum(dim=0)
    total = (weights * vectors).sum(dim=0) / torch.where(mass > 0, mass, torch.ones_like(mass))
    return (base.double() + total).float()


@pytest.mark.parametrize("density", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("scale", [1.0, 1e-4])
def test_sce_agrees_with_the_dense_formula_at_every_size(scale: float, density: float):
    # The mean squares of 1e-4 sum to 1e-8: mergekit weighs all experts alike there.
    base, (first, second, third) = random_models((20, 30), 3, scale)
    experts = [first, base + 3 * (second - base), base + 0.5 * (third - base)]
    base, experts = base * 0, [expert - base for expert in experts]
    merged, expected = merge(SceConfig(density=density), base, experts), sce_oracle(base, experts, density)
    torch.testing.assert_close(merged, expected, rtol=1e-5, atol=1e-6 * scale)


def test_sce_selects_nothing_where_experts_are_equal():
    base, (expert,) = random_models((20, 30), 1)
    torch.testing.assert_close(merge(SceConfig(), base, [expert] * 3), expert)
    assert torch.equal(merge(SceConfig(density=0.5), base, [expert] * 3), base)


# -- Arcee Fusion -----------------------------------------------------------------------------------------------------


def test_arcee_fusion_takes_the_outliers_of_importance():
    base, (expert,) = random_models((50, 60), 1)
    p, q = expert.double().softmax(dim=-1), base.double().softmax(dim=-1)
    scores = (expert - base).abs().double() * (p * (p / q).log()).sum(dim=-1, keepdim=True)
    first, median, third = (scores.flatten().sort().values[int(f * 2999)] for f in (0.25, 0.5, 0.75))
    expected = torch.where(scores >= median + 1.5 * (third - first), expert, base)
    merged = merge(ArceeFusionConfig(), base, [expert])
    torch.testing.assert_close(merged, expected)
    assert 0.01 < (merged != base).float().mean() < 0.2


def test_arcee_fusion_importance_of_a_tiny_change_is_not_noise():
    base, (expert,) = random_models((50, 60), 1, scale=1e-5)
    exact = importance(expert.double(), base.double())
    torch.testing.assert_close(importance(expert, base).double(), exact, rtol=1e-4, atol=0.0)
    assert (exact > 0).float().mean() > 0.95


# -- NearSwap, Passthrough --------------------------------------------------------------------------------------------


def test_nearswap_is_the_usual_interpolation():
    base, (expert,) = random_models((20, 30), 1)
    q = (0.03 / (expert - base).abs().double()).clamp(max=1.0)
    expected = q * expert.double() + (1 - q) * base.double()
    torch.testing.assert_close(merge(NearSwapConfig(t=0.03), base, [expert]), expected.float())
    assert torch.equal(merge(NearSwapConfig(t=0.0), base, [expert]), base)
    torch.testing.assert_close(merge(NearSwapConfig(t=10.0), base, [expert]), expert)


def test_nearswap_holds_its_limit_below_1e_6():
    vector = torch.tensor([5e-7, 1e-8])
    torch.testing.assert_close(merge(NearSwapConfig(t=1e-7), torch.zeros(2), [vector]), torch.tensor([1e-7, 1e-8]))


def test_passthrough_is_the_expert_times_the_scale():
    base, (expert,) = random_models((20, 30), 1)
    assert torch.equal(merge(PassthroughConfig(), base, [expert]), expert)
    assert torch.equal(merge(PassthroughConfig(scaling=-2.0), None, [expert]), -2 * expert)


# -- RAM --------------------------------------------------------------------------------------------------------------


def sparse_experts(shapes, count=3):
    """Experts that changed a third of the entries each, as reinforcement learning does."""
    models = []
    for seed, shape in enumerate(shapes):
        base, experts = random_models(shape, count, seed=seed)
        generator = torch.Generator().manual_seed(100 + seed)
        models.append(
            (base, [torch.where(torch.rand(shape, generator=generator) < 0.33, expert, base) for expert in experts])
        )
    return models


def ram_oracle(models, rescale, r=0.1, alpha=0.2):
    vectors = [dense_task_vectors(base, experts) for base, experts in models]
    changed = [vector.abs() > 1e-5 for vector in vectors]
    shared = torch.stack([(c & (c.sum(0) > 1)).flatten(1).sum(1) for c in changed])
    unique = torch.stack([(c & (c.sum(0) == 1)).flatten(1).sum(1) for c in changed])
    if rescale == "model":
        shared, unique = shared.sum(0, keepdim=True).expand_as(shared), unique.sum(0, keepdim=True).expand_as(unique)
    factors = 1 + (r if rescale != "none" else 0) * (shared / unique).clamp(max=alpha)
    merged = []
    for (base, _), vector, change, factor in zip(models, vectors, changed, factors, strict=True):
        count = change.sum(0)
        lone = (vector * change * factor.view(-1, 1, 1)).sum(0)
        mean = (vector * change).sum(0) / count.clamp(min=1)
        merged.append((base.double() + torch.where(count == 1, lone, mean)).float())
    return merged


@pytest.mark.parametrize("rescale", ["none", "tensor", "model"])
def test_ram_averages_what_is_shared_and_keeps_what_is_unique(rescale: str):
    models = sparse_experts([(20, 30), (8, 5)])
    config = RamConfig(rescale=rescale, alpha=1.5)
    groups = [make_group(config, base, experts, name=f"layer.{index}") for index, (base, experts) in enumerate(models)]
    for found, expected in zip(merge_groups(config, groups), ram_oracle(models, rescale, alpha=1.5), strict=True):
        torch.testing.assert_close(found, expected)


def test_ram_of_one_expert_is_the_expert():
    ((base, experts),) = sparse_experts([(20, 30)], count=1)
    torch.testing.assert_close(merge(RamConfig(), base, experts), experts[0])


# -- Localize-and-Stitch ----------------------------------------------------------------------------------------------


def test_localize_and_stitch_averages_where_regions_overlap():
    base, experts = random_models((20, 30), 3)
    trimmed = torch.stack([dense_trim(vector, 120) for vector in dense_task_vectors(base, experts)])
    expected = base.double() + 0.9 * trimmed.sum(dim=0) / (trimmed != 0).sum(dim=0).clamp(min=1)
    config = LocalizeAndStitchConfig(density=0.2, scope="tensor", scaling=0.9)
    torch.testing.assert_close(merge(config, base, experts), expected.float())


def test_localize_and_stitch_looks_at_the_whole_model_by_default():
    config = LocalizeAndStitchConfig(density=0.5)
    large, small = random_models((10, 10), 2, scale=1.0), random_models((10, 10), 2, scale=1e-4, seed=1)
    groups = [make_group(config, *model, name=name) for name, model in (("large", large), ("small", small))]
    found = merge_groups(config, groups)
    torch.testing.assert_close(found[0], torch.stack(large[1]).mean(dim=0), rtol=1e-2, atol=1e-2)
    assert torch.equal(found[1], small[0])


def test_localize_and_stitch_of_density_one_is_the_mean():
    base, experts = random_models((20, 30), 3)
    merged = merge(LocalizeAndStitchConfig(density=1.0), base, experts)
    torch.testing.assert_close(merged, torch.stack(experts).mean(dim=0))
