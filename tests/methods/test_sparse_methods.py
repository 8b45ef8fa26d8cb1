"""DARE, DELLA and Breadcrumbs: which entries stay. How they combine is tested with TIES."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from peft.utils import merge_utils
from safetensors.torch import load_file

from hf_merge import BreadcrumbsConfig, DareConfig, DellaConfig, Merger
from hf_merge.methods.base import ParameterKind
from hf_merge.methods.breadcrumbs import Breadcrumbs
from hf_merge.methods.dare import Dare
from hf_merge.methods.della import Della
from hf_merge.methods.della.method import keep_larger, keep_probabilities, rising_order
from hf_merge.methods.rows import as_rows, from_rows

from ..testing_utils import llama_bed
from .elementwise import dense_elect_and_merge, dense_task_vectors, dense_trim, make_group, merge, random_models


METHODS = {DareConfig: Dare, DellaConfig: Della, BreadcrumbsConfig: Breadcrumbs}
every_config = pytest.mark.parametrize("config_cls", METHODS, ids=lambda cls: cls.merge_type)
every_combination = pytest.mark.parametrize("combination", ["linear", "ties"])


def sparse_vectors(config, base, experts, **kwargs):
    group = make_group(config, base, experts, **kwargs)
    method = METHODS[type(config)]()
    return torch.stack(method.sparse_vectors(group, method.prepare(group)))


def probabilities(vector, kind, density, epsilon):
    """The probability with which DELLA keeps each entry."""
    rows = as_rows(vector, kind)
    by_rank = keep_probabilities(rows.shape[1], density, epsilon).float().expand(rows.shape)
    return from_rows(torch.empty_like(rows).scatter_(1, rising_order(rows), by_rank), vector, kind)


# -- laws -------------------------------------------------------------------------------------------------------------


@every_combination
@every_config
def test_merges_what_sparsify_leaves(config_cls, combination: str):
    base, experts = random_models((20, 30), 3)
    weights = [0.5, 1.0, 2.0]
    config = config_cls(density=0.6, combination=combination, weights=weights, scaling=0.8)
    sparse = sparse_vectors(config, base, experts).double()
    if combination == "ties":
        expected = dense_elect_and_merge(sparse, weights)
    else:
        expected = torch.einsum("n,nij->ij", torch.tensor(weights, dtype=torch.float64), sparse) / 3.5
    torch.testing.assert_close(merge(config, base, experts), (base.double() + 0.8 * expected).float())


@pytest.mark.parametrize("weight", [1.0, 0.4, -0.4])
@every_combination
@every_config
def test_without_normalize_the_sparse_vectors_are_added(config_cls, combination: str, weight: float):
    base, experts = random_models((20, 30), 3)
    config = config_cls(combination=combination, normalize=False, weights=weight)
    sparse = sparse_vectors(config, base, experts).double()
    by_sign = combination == "ties"
    expected = dense_elect_and_merge(sparse, [weight] * 3, mean=False) if by_sign else weight * sparse.sum(dim=0)
    torch.testing.assert_close(merge(config, base, experts), (base.double() + expected).float())


@pytest.mark.parametrize("shape", [(1,), (1, 1, 8), (8, 1), (4, 3, 2, 2), ()])
@every_combination
@every_config
def test_density_zero_gives_the_base_and_density_one_the_expert(config_cls, combination: str, shape):
    base, experts = random_models(shape, 1)
    nothing = merge(config_cls(density=0.0, combination=combination), base, experts)
    everything = merge(config_cls(density=1.0, combination=combination), base, experts)
    assert torch.equal(nothing, base)
    torch.testing.assert_close(everything, experts[0])


@every_config
def test_each_expert_may_have_its_own_density(config_cls):
    base, experts = random_models((40, 50), 2)
    sparse = sparse_vectors(config_cls(density=[0.1, 0.8]), base, experts)
    kept = sparse.ne(0).double().mean(dim=(1, 2))
    assert kept[0] == pytest.approx(0.1, abs=0.03)
    assert kept[1] == pytest.approx(0.8, abs=0.03)


@pytest.mark.parametrize("config_cls", [DareConfig, DellaConfig], ids=["dare", "della"])
def test_masks_depend_on_seed_name_and_expert_only(config_cls):
    base, (expert,) = random_models((40, 50), 1)
    first = sparse_vectors(config_cls(), base, [expert, expert])
    assert not torch.equal(first[0], first[1])
    assert torch.equal(first, sparse_vectors(config_cls(), base, [expert, expert]))
    assert torch.equal(first[1], sparse_vectors(config_cls(), base, [expert], names=["expert1"])[0])
    assert not torch.equal(first, sparse_vectors(config_cls(), base, [expert, expert], name="other.weight"))
    assert not torch.equal(first, sparse_vectors(config_cls(seed=1), base, [expert, expert]))


@pytest.mark.parametrize("config_cls", [DareConfig, DellaConfig], ids=["dare", "della"])
def test_the_expected_task_vector_is_the_original(config_cls):
    base, experts = random_models((6, 8), 1)
    config = config_cls(density=0.5)
    mean = torch.stack(
        [sparse_vectors(dataclasses.replace(config, seed=seed), base, experts)[0] for seed in range(2000)]
    ).mean(dim=0)
    torch.testing.assert_close(mean, experts[0] - base, rtol=0.15, atol=1e-4)


NORM = [
    DareConfig(density=0.3, rescale="norm"),
    DellaConfig(density=0.3, rescale="norm"),
    BreadcrumbsConfig(density=0.3, rescale="norm"),
]


@pytest.mark.parametrize("config", NORM, ids=lambda config: config.merge_type)
@pytest.mark.parametrize("shape", [(40, 50), (30, 1), (1,), (4, 3, 2, 2)])
def test_rescaling_to_the_norm_keeps_the_l1_norm_of_each_parameter(config, shape):
    base, experts = random_models(shape, 2)
    plain = sparse_vectors(dataclasses.replace(config, rescale="none"), base, experts)
    for index, sparse in enumerate(sparse_vectors(config, base, experts)):
        vector = dense_task_vectors(base, experts)[index]
        kept = plain[index].double()
        factor = vector.abs().sum() / kept.abs().sum() if kept.any() else 1.0
        torch.testing.assert_close(sparse, (kept * factor).float())


@pytest.mark.parametrize("config", NORM, ids=lambda config: config.merge_type)
def test_rescaling_a_parameter_that_did_not_change_gives_the_base(config):
    base, _ = random_models((5, 6), 1)
    assert torch.equal(merge(config, base, [base, base]), base)


# -- DARE -------------------------------------------------------------------------------------------------------------


def test_dare_divides_by_the_density_and_not_by_the_share_of_the_norm_that_is_left():
    base, experts = random_models((40, 50), 1)
    sparse = sparse_vectors(DareConfig(density=0.1), base, experts)[0]
    kept = sparse != 0
    torch.testing.assert_close(sparse[kept], ((experts[0] - base) / 0.1)[kept])
    plain = sparse_vectors(DareConfig(density=0.1, rescale="none"), base, experts)[0]
    torch.testing.assert_close(plain[kept], (experts[0] - base)[kept])


@pytest.mark.parametrize(("combination", "peft_merge"), [("linear", "dare_linear"), ("ties", "dare_ties")])
def test_dare_agrees_with_peft_on_the_same_masks(monkeypatch, combination: str, peft_merge: str):
    base, experts = random_models((32, 50), 3)
    config = DareConfig(density=0.4, combination=combination, normalize=combination == "ties")
    masks = iter(sparse_vectors(config, base, experts) != 0)
    monkeypatch.setattr(torch, "bernoulli", lambda probabilities: next(masks).float())
    expected = getattr(merge_utils, peft_merge)([expert - base for expert in experts], torch.ones(3), 0.4)
    torch.testing.assert_close(merge(config, base, experts), base + expected)


# -- DELLA ------------------------------------------------------------------------------------------------------------


def test_della_probabilities_rise_linearly_with_the_rank_in_the_row():
    vector = torch.tensor([[0.1, -0.4, 0.2, -0.3], [5.0, 6.0, -8.0, 7.0]])
    found = probabilities(vector, ParameterKind.LINEAR, 0.5, 0.3)
    torch.testing.assert_close(found, torch.tensor([[0.35, 0.65, 0.45, 0.55], [0.35, 0.45, 0.65, 0.55]]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("density", "epsilon"), [(0.5, 1.0), (0.3, 0.2), (0.7, 0.5), (0.5, 0.0)])
def test_della_keeps_an_entry_as_often_as_its_rank_says(dtype, density: float, epsilon: float):
    # Equal magnitudes rank in the order of their places, zeros too, whether something is kept of them or not.
    row = torch.tensor([0.3, -0.1, 0.0, 0.1, 5.0, 0.0, -0.3, 1e-42, -0.2], dtype=dtype)
    rows = row.expand(40_000, 9).contiguous()
    expected = probabilities(row.view(1, -1).float(), ParameterKind.LINEAR, density, epsilon).double()
    group = make_group(DellaConfig(), torch.zeros_like(rows), [rows])
    kept = keep_larger(rows, group, 0, float(expected.min()), float(expected.max())).double()
    deviation = (expected * (1 - expected) / len(rows)).sqrt()
    assert ((kept.mean(dim=0) - expected).abs() <= 4.5 * deviation).all()
    dependence = torch.corrcoef(kept.T).nan_to_num() * (1 - torch.eye(9))  # NaN of what is always or never kept
    assert dependence.abs().max() < 4.5 / len(rows) ** 0.5


@pytest.mark.parametrize("width", [1, 2])
def test_della_keeps_entries_of_narrow_rows(width: int):
    rows = torch.arange(1.0, 1 + width).expand(40_000, width).contiguous()
    group = make_group(DellaConfig(), torch.zeros_like(rows), [rows])
    least, most = (0.4, 0.6) if width == 2 else (0.5, 0.5)
    found = keep_larger(rows, group, 0, least, most).double().mean(dim=0)
    assert found.tolist() == pytest.approx([least, most][:width], abs=0.012)


@pytest.mark.parametrize("rescale", ["probability", "norm", "none"])
def test_della_keeps_the_same_whatever_rescales_it(rescale: str):
    base, experts = random_models((40, 50), 2)
    expected = sparse_vectors(DellaConfig(epsilon=0.6, rescale="none"), base, experts) != 0
    assert torch.equal(sparse_vectors(DellaConfig(epsilon=0.6, rescale=rescale), base, experts) != 0, expected)


def test_della_ranks_are_not_rounded():
    vector = torch.arange(4096.0).view(1, -1)
    assert probabilities(vector, ParameterKind.LINEAR, 0.5, 0.1).unique().numel() == 4096


def differences(rows: int, width: int, dtype: torch.dtype) -> torch.Tensor:
    """Of a model and its fine-tune that are stored in a dtype."""
    generator = torch.Generator().manual_seed(width)
    base = torch.randn(rows, width, generator=generator) * 0.02
    return (base + torch.randn(rows, width, generator=generator) * 1e-3).to(dtype).float() - base.to(dtype).float()


@pytest.mark.parametrize("width", [1, 2, 3, 1000, 1023, 1024, 1025, 65_537])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_della_ranks_are_those_of_a_stable_sort(width: int, dtype: torch.dtype):
    rows = differences(6, width, dtype)
    rows[1] = 0
    rows[2, ::2] = 0
    rows[3] = rows[3, :1]
    rows[4, 0] = 1e-42
    for some in (rows, rows[:1], rows[:4], rows.double(), -rows.abs()):
        assert torch.equal(rising_order(some), some.abs().argsort(dim=1, stable=True))


def test_della_ranks_at_the_edge_of_short_keys():
    rows = torch.zeros(2, 1024)
    bits = rows.view(torch.int32)
    bits[0] = 0x3F800002 + 2 * torch.arange(1024, dtype=torch.int32)
    bits[0, 5] = 0x40000000
    for least in (0x3F800002, 0x3F800004, 0x3E000000, 0x00000001):
        bits[1] = least
        assert torch.equal(rising_order(rows), rows.abs().argsort(dim=1, stable=True))
        assert torch.equal(rising_order(rows[:1]), rows[:1].abs().argsort(dim=1, stable=True))


@pytest.mark.parametrize("config_cls", [DareConfig, DellaConfig], ids=["dare", "della"])
def test_a_step_on_the_result_draws_numbers_of_its_own(tmp_path, config_cls):
    settings = {"density": 0.5, "rescale": "none"}
    bed = llama_bed(tmp_path)
    left = {}
    for name, then in (("one", []), ("two", [{"merge_type": config_cls.merge_type, **settings}])):
        merger = Merger.from_pretrained([bed.experts["a"]], config_cls(**settings, then=then), base_model=bed.base)
        merger.save_pretrained(tmp_path / name)
        merged, start = (load_file(folder / "model.safetensors") for folder in (tmp_path / name, bed.base))
        key = max(start, key=lambda key: start[key].numel())
        left[name] = merged[key] != start[key]
    assert not (left["two"] & ~left["one"]).any()
    assert 0.4 < float(left["two"].sum() / left["one"].sum()) < 0.6


def test_della_ranks_a_whole_filter_of_a_convolution():
    vector = torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    found = probabilities(vector, ParameterKind.CONVOLUTION, 0.5, 0.1)
    assert torch.equal(found.view(4, 12), probabilities(vector.view(4, 12), ParameterKind.LINEAR, 0.5, 0.1))


def test_della_ranks_what_one_output_unit_reads_in_every_stored_form():
    matrix = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    expected = probabilities(matrix, ParameterKind.LINEAR, 0.5, 0.1)
    assert torch.equal(probabilities(matrix.T, ParameterKind.TRANSPOSED_LINEAR, 0.5, 0.1), expected.T)
    stacked = torch.stack([matrix, matrix])
    found = probabilities(stacked, ParameterKind.EXPERT_LINEAR, 0.5, 0.1)
    assert torch.equal(found, torch.stack([expected, expected]))
    found = probabilities(stacked.mT, ParameterKind.TRANSPOSED_EXPERT_LINEAR, 0.5, 0.1)
    assert torch.equal(found, torch.stack([expected, expected]).mT)


@pytest.mark.parametrize("shape", [(1,), (8, 1), (1, 1), ()])
def test_della_keeps_rows_of_one_entry_with_the_density(shape):
    assert (probabilities(torch.ones(shape), ParameterKind.OTHER, 0.3, 0.1) == torch.tensor(0.3)).all()


@pytest.mark.parametrize("density", [0.02, 0.5, 0.98])
def test_della_range_stays_inside_probabilities_and_around_the_density(density: float):
    vector = torch.randn(3, 101, generator=torch.Generator().manual_seed(0))
    found = probabilities(vector, ParameterKind.LINEAR, density, 1.0)
    assert 0.0 <= found.min()
    assert found.max() <= 1.0
    assert found.mean().item() == pytest.approx(density, abs=1e-6)


def test_della_divides_each_entry_by_its_own_probability():
    base, experts = random_models((4, 50), 1)
    sparse = sparse_vectors(DellaConfig(density=0.5, epsilon=0.6), base, experts)[0]
    vector = experts[0] - base
    expected = vector / probabilities(vector, ParameterKind.LINEAR, 0.5, 0.6)
    torch.testing.assert_close(sparse[sparse != 0], expected[sparse != 0])


def test_della_without_a_range_is_dare():
    base, experts = random_models((4, 50), 2)
    della = merge(DellaConfig(epsilon=0.0, combination="ties"), base, experts)
    torch.testing.assert_close(della, merge(DareConfig(combination="ties"), base, experts))


# -- Breadcrumbs ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("density", "gamma"), [(0.9, 0.01), (0.5, 0.1), (0.95, 0.2), (1.0, 0.05), (0.3, 0.0)])
def test_breadcrumbs_leaves_out_outliers_and_small_entries(density: float, gamma: float):
    base, experts = random_models((20, 50), 1)
    vector = dense_task_vectors(base, experts)[0]
    kept = round(density * 1000)
    outliers = min(round(gamma * 1000), 1000 - kept)
    expected = dense_trim(vector, outliers + kept) - dense_trim(vector, outliers)
    found = sparse_vectors(BreadcrumbsConfig(density=density, gamma=gamma), base, experts)[0]
    torch.testing.assert_close(found, expected.float())


@pytest.mark.parametrize("size", [1, 2, 5, 50, 99])
def test_breadcrumbs_keeps_something_of_a_small_parameter(size: int):
    base, experts = random_models((size,), 1)
    found = sparse_vectors(BreadcrumbsConfig(), base, experts)[0]
    assert int((found != 0).sum()) == max(1, int(0.9 * size))
    assert found.abs().max() == (experts[0] - base).abs().max()  # too few entries to have an outlier


def test_breadcrumbs_without_outliers_is_magnitude_pruning():
    base, experts = random_models((32, 50), 3)
    expected = merge_utils.magnitude_prune([expert - base for expert in experts], torch.tensor([1.0, 0.5, 2.0]), 0.25)
    config = BreadcrumbsConfig(density=0.25, gamma=0.0, weights=[1.0, 0.5, 2.0], normalize=False)
    torch.testing.assert_close(merge(config, base, experts), base + expected)
