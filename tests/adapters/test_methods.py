"""Methods on adapters: factors give what dense models give, without the base model where the method allows."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file, save_file

from hf_merge import AutoMergedModel, CatConfig, MergeConfig, Merger, PlanError
from hf_merge.adapters.source import ConfigOnlySource
from hf_merge.methods.base import TensorMethod
from hf_merge.registry import available_merge_methods

from .helpers import KINDS, AdapterBed, make_adapters, save_adapter


EXACT = {
    "linear": {},
    "task_arithmetic": {"scaling": 0.4, "weights": [1.0, -0.5, 2.0]},
    "cat": {},
    "knots": {},
    "core_space": {},
    "tsv_m": {},
    "iso_c": {},
    "iso_cts": {},
    "wudi": {},
}
VARIANTS = {
    "wudi spectral": ("wudi", {"solver": "spectral"}),
    "wudi closed form": ("wudi", {"solver": "closed_form", "ridge": 1e-3}),
    "wudi sgd": ("wudi", {"solver": "sgd", "num_steps": 30}),
    "wudi, equal norms": ("wudi", {"equalize_norms": True}),
    "wudi, others by task arithmetic": ("wudi", {"other_parameters": "task_arithmetic"}),
    "wudi, others from the base": ("wudi", {"other_parameters": "base"}),
    "knots, dare": ("knots", {"inner": "dare"}),
    "knots, linear": ("knots", {"inner": "linear"}),
    "core_space, ties": ("core_space", {"inner": "ties", "inner_settings": {"density": 0.5}}),
    "core_space, tsv_m": ("core_space", {"inner": "tsv_m"}),
}
DENSE = sorted(
    name
    for name, entry in available_merge_methods().items()
    if issubclass(entry.method_cls, TensorMethod) and name not in EXACT and name not in ("svd", "localize_and_stitch")
)


@pytest.fixture(scope="module")
def bed(tmp_path_factory) -> AdapterBed:
    """Adapters of different ranks and targets, an embedding among them."""
    bed = make_adapters(KINDS["lora"], tmp_path_factory.mktemp("adapters"), 2)
    folder = tmp_path_factory.mktemp("embedding") / "a"
    bed.adapters["c"] = save_adapter(bed, KINDS["embedding"].config(0), folder, seed=1)
    return bed


@pytest.fixture(scope="module")
def mixtures(tmp_path_factory) -> AdapterBed:
    return make_adapters(KINDS["transposed_mixture"], tmp_path_factory.mktemp("mixtures"), 2)


def dense_merge(bed: AdapterBed, config: MergeConfig, names: list[str]) -> torch.nn.Module:
    """The same method on dense models."""
    models = {name: bed.attached(bed.adapters[name]).merge_and_unload() for name in names}
    return Merger.from_pretrained(models, config, base_model=bed.base).merge()


def check(bed: AdapterBed, method: str, settings: dict, out: Path, rank: int | None = None) -> Merger:
    entry = available_merge_methods()[method].method_cls
    names = list(bed.adapters)[: max(entry.min_experts, min(3, entry.max_experts or 3))]
    settings = {key: value[: len(names)] if isinstance(value, list) else value for key, value in settings.items()}
    expected = bed.logits(dense_merge(bed, MergeConfig.from_merge_type(method, **settings), names))
    experts = {name: bed.adapters[name] for name in names}
    model = Merger.from_pretrained(
        experts, MergeConfig.from_merge_type(method, **settings), base_model=bed.base
    ).merge()
    assert torch.allclose(bed.logits(model), expected, atol=2e-5), (bed.logits(model) - expected).abs().max()
    config = MergeConfig.from_merge_type(method, output="adapter", adapter_rank=rank, **settings)
    merger = Merger.from_pretrained(experts, config, base_model=bed.base)
    merger.save_pretrained(out)
    logits = bed.logits(bed.attached(out))
    assert torch.allclose(logits, expected, atol=2e-5), (logits - expected).abs().max()
    return merger


@pytest.mark.parametrize("method", EXACT)
def test_low_rank_methods_equal_their_dense_form(method: str, bed: AdapterBed, tmp_path: Path):
    merger = check(bed, method, EXACT[method], tmp_path / "out")
    assert isinstance(merger.base, ConfigOnlySource), "the base model was opened"
    ranks = [2, 3, 2]
    for name, rank in merger.plan.adapter.planned.ranks.items():
        touching = [r for r, source in zip(ranks, merger.experts, strict=True) if name in source.deltas]
        assert rank <= sum(touching)


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_equal_their_dense_form(name: str, bed: AdapterBed, tmp_path: Path):
    method, settings = VARIANTS[name]
    check(bed, method, settings, tmp_path / "out")


@pytest.mark.parametrize("method", ["linear", "wudi", "tsv_m", "knots", "iso_c"])
def test_mixtures_of_experts(method: str, mixtures: AdapterBed, tmp_path: Path):
    check(mixtures, method, {}, tmp_path / "out")


@pytest.mark.parametrize("method", DENSE)
def test_other_methods_merge_one_dense_change_at_a_time(method: str, bed: AdapterBed, tmp_path: Path):
    merger = check(bed, method, {}, tmp_path / "out", rank=64)
    method_cls = available_merge_methods()[method].method_cls
    assert isinstance(merger.base, ConfigOnlySource) == method_cls.works_on_changes(merger.config)


def test_a_smaller_rank_is_the_best_approximation(bed: AdapterBed, tmp_path: Path):
    experts = {name: bed.adapters[name] for name in "ab"}
    config = MergeConfig.from_merge_type("cat", output="adapter", adapter_rank=2)
    merger = Merger.from_pretrained(experts, config)
    merger.save_pretrained(tmp_path / "out")
    base = bed.load().state_dict()
    merged = bed.attached(tmp_path / "out").merge_and_unload().state_dict()
    for name, row in merger.report.parameters.items():
        total = sum(bed.change(one)[name] for one in "ab")
        left, values, right = torch.linalg.svd(total)
        best = (left[:, :2] * values[:2]) @ right[:2]
        assert torch.allclose((merged[name] - base[name]).double(), best, atol=1e-6)
        lost = (values[2:].square().sum() / values.square().sum()).item()
        assert row["discarded_energy"] == pytest.approx(lost, abs=1e-6)
    assert any("discards" in note for note in merger.report.notes)


def test_svd_takes_the_largest_rank(bed: AdapterBed, tmp_path: Path):
    experts = {name: bed.adapters[name] for name in "ab"}
    merger = Merger.from_pretrained(experts, MergeConfig.from_merge_type("svd", output="adapter"))
    merger.save_pretrained(tmp_path / "out")
    assert set(merger.plan.adapter.planned.ranks.values()) == {3}


def test_svd_without_a_rank_needs_factors(bed: AdapterBed, tmp_path: Path):
    dense = save_adapter(bed, KINDS["dora"].config(0), tmp_path / "dense", seed=5)
    for other in (dense, bed.base):
        experts = {"a": bed.adapters["a"], "other": other}
        with pytest.raises(PlanError, match="'svd' has no rank to take.*set rank="):
            Merger.from_pretrained(experts, MergeConfig.from_merge_type("svd"), base_model=bed.base).check()
        Merger.from_pretrained(experts, MergeConfig.from_merge_type("svd", rank=2), base_model=bed.base).check()


def test_auto_classes_load_the_result(bed: AdapterBed, tmp_path: Path):
    config = MergeConfig.from_merge_type("wudi", output="adapter", dtype="bfloat16")
    experts = {name: bed.adapters[name] for name in "ab"}
    Merger.from_pretrained(experts, config).save_pretrained(tmp_path / "out")
    assert isinstance(AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out"), PeftModel)
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    recipe = MergeConfig.from_pretrained(tmp_path / "out")
    assert recipe.output == "adapter" and list(recipe.experts) == ["a", "b"]


def test_the_base_is_never_read(bed: AdapterBed, tmp_path: Path):
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_bytes((bed.base / "config.json").read_bytes())
    config = MergeConfig.from_merge_type("wudi", output="adapter")
    experts = {name: bed.adapters[name] for name in "ab"}
    Merger.from_pretrained(experts, config, base_model=tmp_path / "base").save_pretrained(tmp_path / "out")


@pytest.mark.parametrize("method, settings", [("localize_and_stitch", {}), ("ties", {"scope": "model"})])
def test_thresholds_over_the_model_count_what_adapters_touch(
    method: str, settings: dict, bed: AdapterBed, tmp_path: Path
):
    experts = {name: bed.adapters[name] for name in "ab"}
    model = Merger.from_pretrained(experts, MergeConfig.from_merge_type(method, **settings)).merge()
    config = MergeConfig.from_merge_type(method, output="adapter", adapter_rank=64, **settings)
    Merger.from_pretrained(experts, config).save_pretrained(tmp_path / "out")
    assert torch.allclose(bed.logits(bed.attached(tmp_path / "out")), bed.logits(model), atol=2e-5)
    sizes = {name: value.numel() for name, value in bed.change("a").items() if value.any()}
    base = bed.load().state_dict()
    kept = sum(int(((model.state_dict()[name] - base[name]).abs() > 1e-7).sum()) for name in sizes)
    assert kept <= 2 * sum(sizes.values()) * 0.2 + 2


def test_include_and_rules(bed: AdapterBed, tmp_path: Path):
    config = MergeConfig.from_merge_type(
        "cat", output="adapter", include=["q_proj"], rules=[{"match": r"layers\.1\.", "weights": 0.0}]
    )
    experts = {name: bed.adapters[name] for name in "ab"}
    Merger.from_pretrained(experts, config).save_pretrained(tmp_path / "out")
    base, merged = bed.load().state_dict(), bed.attached(tmp_path / "out").merge_and_unload().state_dict()
    changed = {name for name, value in merged.items() if not torch.allclose(value, base[name])}
    assert changed == {f"model.layers.{layer}.self_attn.q_proj.weight" for layer in (0, 2)}


def test_weights_of_linear_that_scale_the_base_are_no_adapter(bed: AdapterBed):
    config = MergeConfig.from_merge_type("linear", normalize=False, weights=[0.5, 0.7], output="adapter")
    experts = {name: bed.adapters[name] for name in "ab"}
    with pytest.raises(PlanError, match="cat"):
        Merger.from_pretrained(experts, config).check()


def test_auto_classes_merge_by_factors_too(bed: AdapterBed, tmp_path: Path):
    """`svd` keeps the largest rank of the adapters' factors, which dense changes do not have."""
    experts = {name: str(bed.adapters[name]) for name in "ab"}
    config = MergeConfig.from_merge_type("svd", experts=experts)
    config.save_pretrained(tmp_path / "recipe")
    lazy = AutoMergedModel.from_pretrained(tmp_path / "recipe").state_dict()
    Merger.from_pretrained(config=config).save_pretrained(tmp_path / "out")
    saved = bed.model_class.from_pretrained(tmp_path / "out").state_dict()
    assert all(torch.equal(lazy[name], value) for name, value in saved.items())


def test_the_dtype_does_not_depend_on_the_order(bed: AdapterBed, tmp_path: Path):
    shutil.copytree(bed.adapters["a"], tmp_path / "half")
    path = tmp_path / "half" / "adapter_model.safetensors"
    save_file({key: value.half() for key, value in load_file(path).items()}, path)
    experts = {"half": tmp_path / "half", "b": bed.adapters["b"]}
    for names in (["half", "b"], ["b", "half"]):
        plan = Merger.from_pretrained({name: experts[name] for name in names}, CatConfig(output="adapter")).check()
        assert {info.dtype for info in plan.adapter.infos.values()} == {torch.float32}
