"""Parameters are merged in pieces: their size changes nothing, and what needs the whole parameter sees it."""

from __future__ import annotations

import math
import threading

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hf_merge import (
    BreadcrumbsConfig,
    ConsensusTaConfig,
    DareConfig,
    DellaConfig,
    LinearConfig,
    LocalizeAndStitchConfig,
    MagMaxConfig,
    MergeConfig,
    Merger,
    ModelStockConfig,
    NearSwapConfig,
    PassthroughConfig,
    SceConfig,
    SlerpConfig,
    TaskArithmeticConfig,
    TiesConfig,
    WiseFtConfig,
)
from hf_merge.engines.pieces import all_finite, squared_norm
from hf_merge.errors import NonFiniteError
from hf_merge.methods import groups
from hf_merge.methods.base import ElementwiseMethod, ParameterKind
from hf_merge.registry import available_merge_methods, get_merge_method
from hf_merge.threads import one_thread

from .elementwise import make_group, merge, random_models


CONFIGS = {
    "breadcrumbs": BreadcrumbsConfig(density=0.6, gamma=0.05, combination="ties"),
    "consensus_ta": ConsensusTaConfig(),
    "dare": DareConfig(combination="ties", rescale="norm"),
    "della": DellaConfig(combination="ties", rescale="norm"),
    "linear": LinearConfig(),
    "localize_and_stitch": LocalizeAndStitchConfig(density=0.3),
    "magmax": MagMaxConfig(),
    "model_stock": ModelStockConfig(filter_wise=True),
    "nearswap": NearSwapConfig(t=0.01),
    "passthrough": PassthroughConfig(),
    "sce": SceConfig(density=0.5),
    "slerp": SlerpConfig(),
    "task_arithmetic": TaskArithmeticConfig(),
    "ties": TiesConfig(density=0.4, majority_sign="frequency"),
    "wise_ft": WiseFtConfig(),
}


def test_every_element_wise_method_is_here():
    methods = {
        name for name in available_merge_methods() if issubclass(get_merge_method(name).method_cls, ElementwiseMethod)
    }
    assert methods == set(CONFIGS)


def coarse_models(shape: tuple[int, ...], count: int):
    """Models whose task vectors have many equal and opposite entries, as those of checkpoints in bfloat16 have."""
    base, experts = random_models(shape, count)
    return base.bfloat16().float(), [base.bfloat16().float() + ((one - base) * 64).round() / 64 for one in experts]


@pytest.mark.parametrize("models", [random_models, coarse_models], ids=["fine", "coarse"])
@pytest.mark.parametrize("kind", [ParameterKind.LINEAR, ParameterKind.TRANSPOSED_LINEAR], ids=lambda kind: kind.value)
@pytest.mark.parametrize("name", CONFIGS)
def test_the_size_of_pieces_changes_nothing(monkeypatch, name: str, kind: ParameterKind, models):
    method = get_merge_method(name).method_cls
    base, experts = models((30, 40), min(method.max_experts or 4, 4))
    whole = merge(CONFIGS[name], base, experts, kind=kind)
    for size in (1, 37, 64, 500):
        monkeypatch.setattr(groups, "PIECE", size)
        torch.testing.assert_close(merge(CONFIGS[name], base, experts, kind=kind), whole, rtol=1e-6, atol=1e-7)


def test_the_majority_is_that_of_the_whole_parameter(monkeypatch):
    monkeypatch.setattr(groups, "PIECE", 2)
    base = torch.zeros(6)
    experts = [torch.tensor([1.0, 4.0, -3.0, -3.0, -3.0, 0.0]), torch.tensor([1.0, -4.0, -1.0, -1.0, -1.0, 0.0])]
    assert merge(TiesConfig(density=1.0), base, experts).tolist() == [1.0, -4.0, -2.0, -2.0, -2.0, 0.0]
    assert merge(TiesConfig(density=1.0), base, [-one for one in experts]).tolist() == [-1.0, 4.0, 2.0, 2.0, 2.0, 0.0]


def test_random_numbers_belong_to_places():
    base, experts = random_models((1000,), 2)
    group = make_group(DareConfig(), base, experts)
    whole = group.draws(1)
    parts = [piece.draws(1) for piece in group.pieces(unit=61)]
    assert whole.dtype == np.uint8
    assert np.array_equal(np.concatenate(parts), whole)
    for start in (1, 7, 8, 9, 15, 16, 17, 500):
        part = next(iter(group.pieces(unit=1000)))
        part.offset, part.stored_experts = start, [one[start:] for one in experts]
        assert np.array_equal(part.draws(1), whole[start:])


@pytest.mark.parametrize("probability", [0.0, 2**-32, 1 / 700, 0.3, 0.5, 0.5 + 1 / 700, 1 - 1 / 700, 1.0])
def test_masks_keep_with_their_probability(probability: float):
    """To far less than the 8 bits that most entries are decided by."""
    base, experts = random_models((1000, 1000), 2)
    group = make_group(DareConfig(), base, experts)
    first, second = (group.keep_mask(index, probability).double() for index in range(2))
    deviation = math.sqrt(probability * (1 - probability) / first.numel())
    assert abs(first.mean() - probability) <= 4.5 * deviation
    assert abs(((first - probability) * (second - probability)).mean()) <= 4.5 * probability * (1 - probability) / 1000
    pieces = [piece.keep_mask(0, probability) for piece in group.pieces(unit=77)]
    assert len(pieces) > 1
    assert torch.equal(torch.cat(pieces), first.bool().view(-1))


def test_random_numbers_are_uniform():
    base, (expert,) = random_models((400, 500), 1)
    draws = make_group(DareConfig(), base, [expert]).draws(0)
    assert np.histogram(draws, 256, (0, 256))[0].std() < 3 * math.sqrt(200_000 / 256)
    draws = (draws + 0.5) / 2**8
    assert abs(draws.mean() - 0.5) < 0.003
    assert abs(np.corrcoef(draws[:-1], draws[1:])[0, 1]) < 0.01
    assert np.histogram(draws, 16, (0, 1))[0].std() < 3 * math.sqrt(200_000 / 16)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_what_is_not_finite_is_found(bad: float, dtype: torch.dtype):
    values = torch.full((300_000,), torch.finfo(dtype).max, dtype=dtype)
    assert all_finite(values)
    values[299_999] = bad
    assert not all_finite(values)


def test_norms_of_pieces_add_up():
    values = torch.randn(3, 100_000, generator=torch.Generator().manual_seed(0))
    assert squared_norm(values) == pytest.approx(values.double().square().sum().item(), rel=1e-6)


def merged_norm(base: list[float], vectors: list[list[float]], dtype: str) -> torch.Tensor:
    """The final norm's weight of Llamas merged by TIES."""
    config = LlamaConfig(
        vocab_size=16,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
    )

    def model(values: torch.Tensor) -> LlamaForCausalLM:
        made = LlamaForCausalLM(config)
        made.load_state_dict(start | {"model.norm.weight": values})
        return made

    start = LlamaForCausalLM(config).state_dict()
    origin = torch.tensor(base + [0.0] * (8 - len(base)))
    experts = [origin + torch.tensor(one + [0.0] * (8 - len(one))) for one in vectors]
    merger = Merger.from_pretrained(
        {f"e{index}": model(one) for index, one in enumerate(experts)},
        TiesConfig(density=1.0),
        base_model=model(origin),
        dtype=dtype,
    )
    return merger.merge().model.norm.weight.detach()


def test_a_corrected_entry_that_is_too_large_is_noticed():
    with pytest.raises(NonFiniteError, match="too large for float16"):
        merged_norm(
            [0, 0, 0, 30000.0, -60000.0], [[-1, -1, -1, 30000.0, 10000.0], [-1, -1, -1, -30000.0, -10000.0]], "float16"
        )


def test_an_entry_that_was_too_large_until_it_was_corrected_is_no_error():
    found = merged_norm([0, 0, 0, 60000.0], [[-1, -1, -1, 10000.0], [-1, -1, -1, -10000.0]], "float16")
    assert torch.equal(found[:4], torch.tensor([-1.0, -1.0, -1.0, 50000.0], dtype=torch.float16))


def test_an_expert_of_nan_is_named():
    with pytest.raises(NonFiniteError, match=r"e1.*holds NaN"):
        merged_norm([1.0] * 8, [[1.0] * 8, [math.nan] * 8], "float32")


def test_small_densities_of_della_are_finite():
    base, experts = random_models((8, 64), 2)
    assert torch.isfinite(merge(DellaConfig(density=0.05), base, experts)).all()


def test_norms_are_summed_in_float64_whatever_the_default_dtype():
    base, experts = random_models((512, 600), 2)
    expected = merge(DareConfig(rescale="norm"), base, experts)
    torch.set_default_dtype(torch.float16)
    try:
        assert torch.equal(merge(DareConfig(rescale="norm"), base, experts), expected)
    finally:
        torch.set_default_dtype(torch.float32)


def test_model_stock_of_tiny_task_vectors():
    experts = [torch.tensor([1e-24, 0.0]), torch.tensor([1e-24, 1e-25])]
    torch.testing.assert_close(
        merge(ModelStockConfig(), torch.zeros(2), experts) * 1e24,
        merge(ModelStockConfig(), torch.zeros(2), [one * 1e24 for one in experts]),
    )


def test_threads_that_overlap_leave_the_number_of_threads_as_it_was():
    threads, found = torch.get_num_threads(), []
    torch.set_num_threads(3)
    inside, go_on = threading.Event(), threading.Event()

    def first() -> None:
        with one_thread():
            inside.set()
            go_on.wait()

    other = threading.Thread(target=first)
    other.start()
    inside.wait()
    with one_thread():
        go_on.set()
        other.join()
    later = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    later.start()
    later.join()
    found.append(torch.get_num_threads())
    torch.set_num_threads(threads)
    assert found == [3, 3]


def test_one_thread_leaves_the_number_of_threads_as_it_was():
    threads = torch.get_num_threads()
    with pytest.raises(KeyError), one_thread():
        assert torch.get_num_threads() == 1
        raise KeyError
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize(
    "config", [ModelStockConfig(), SlerpConfig(t=0.3), DareConfig(rescale="norm")], ids=lambda one: one.merge_type
)
def test_methods_give_the_same_bits_on_any_number_of_threads(config: MergeConfig):
    base, experts = random_models((700, 700), 2)
    group = make_group(config, base, experts)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 4):
            torch.set_num_threads(count)
            found.append(get_merge_method(config.merge_type).method_cls()(group))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*found)
