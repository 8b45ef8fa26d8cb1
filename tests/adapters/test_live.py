"""Live PeftModels, mixtures with full models, heads per task, and merging in place."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor

from hf_merge import (
    AutoMergedModel,
    CatConfig,
    ConfigError,
    LinearConfig,
    MergeConfig,
    MergeError,
    Merger,
    PlanError,
    ProDistillConfig,
    RegMeanConfig,
    TiesConfig,
    UnsupportedModelError,
    WudiConfig,
)
from hf_merge import peft as peft_module
from hf_merge.peft import add_merged_adapter
from tests.zoo import ZOO, perturbed, save_zoo_model

from .helpers import KINDS, AdapterBed, make_adapters, save_adapter


@pytest.fixture
def bed(tmp_path: Path) -> AdapterBed:
    return make_adapters(KINDS["lora"], tmp_path / "bed", 3)


def live(bed: AdapterBed) -> PeftModel:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = PeftModel.from_pretrained(bed.load(), bed.adapters["a"], adapter_name="a")
        for name in list(bed.adapters)[1:]:
            model.load_adapter(bed.adapters[name], adapter_name=name)
    return model.eval()


def snapshot(model: torch.nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def assert_unchanged(model: torch.nn.Module, before: dict[str, Tensor]) -> None:
    after = model.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())


# -- as experts -----------------------------------------------------------------------------------------------------------


def test_several_adapters_of_one_model(bed: AdapterBed):
    model = live(bed)
    before = snapshot(model)
    experts = {name: {"model": model, "adapter": name} for name in "abc"}
    merged = Merger.from_pretrained(experts, CatConfig()).merge()
    assert torch.allclose(bed.logits(merged), bed.logits(bed.oracle([1.0, 1.0, 1.0])), atol=1e-5)
    assert_unchanged(model, before)


def test_the_active_adapter_is_meant(bed: AdapterBed):
    model = live(bed)
    model.set_adapter("b")
    merged = Merger.from_pretrained({"x": model}, CatConfig()).merge()
    assert torch.allclose(bed.logits(merged), bed.logits(bed.oracle([0.0, 1.0, 0.0])), atol=1e-5)


def test_names_are_checked(bed: AdapterBed):
    model = live(bed)
    with pytest.raises(ConfigError, match="no adapter 'd'"):
        Merger.from_pretrained({"x": {"model": model, "adapter": "d"}}, CatConfig())
    model.base_model.set_adapter(["a", "b"])
    with pytest.raises(ConfigError, match="say which one"):
        Merger.from_pretrained({"x": model}, CatConfig())


def test_merged_adapters_are_refused(bed: AdapterBed):
    model = live(bed)
    model.merge_adapter(["a"])
    with pytest.raises(UnsupportedModelError, match="unmerge_adapter"):
        Merger.from_pretrained({"x": {"model": model, "adapter": "a"}}, CatConfig())


def test_mixture_with_a_full_model(bed: AdapterBed, tmp_path: Path):
    full = perturbed(bed.load(), 5)
    experts = {"a": bed.adapters["a"], "full": full}
    merged = Merger.from_pretrained(experts, CatConfig(), base_model=bed.base).merge()
    base, one, two = bed.load().state_dict(), bed.oracle([1.0, 0.0, 0.0]).state_dict(), full.state_dict()
    for name, value in merged.state_dict().items():
        assert torch.allclose(value, one[name] + two[name] - base[name], atol=1e-6)
    config = CatConfig(output="adapter", adapter_rank=64)
    Merger.from_pretrained(experts, config, base_model=bed.base).save_pretrained(tmp_path / "out")
    assert torch.allclose(bed.logits(bed.attached(tmp_path / "out")), bed.logits(merged), atol=2e-5)


def test_methods_with_data_on_adapters(bed: AdapterBed, tmp_path: Path):
    inputs = dict(bed.inputs)
    data = {name: [{key: value[row] for key, value in inputs.items()} for row in range(2)] for name in "abc"}
    model = Merger.from_pretrained(bed.adapters, RegMeanConfig(ridge=0.1)).merge(data)
    config = RegMeanConfig(ridge=0.1, output="adapter", adapter_rank=64)
    Merger.from_pretrained(bed.adapters, config).save_pretrained(tmp_path / "out", data=data)
    assert torch.allclose(bed.logits(bed.attached(tmp_path / "out")), bed.logits(model), atol=1e-4)


# -- classifiers ------------------------------------------------------------------------------------------------------------


def test_heads_of_different_tasks(tmp_path: Path):
    """SEQ_CLS adapters of a headless base: PEFT saves neither the number of labels nor the class."""
    from transformers import BertForSequenceClassification

    classifier = ZOO["bert"].build()
    base = save_zoo_model(classifier.bert, tmp_path / "base")
    adapters, models = {}, {}
    for index, task in enumerate(("two", "five")):
        labels = (2, 5)[index]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.manual_seed(index)
            model = BertForSequenceClassification.from_pretrained(base, num_labels=labels)
            config = LoraConfig(task_type="SEQ_CLS", r=3, target_modules=["query", "value"], init_lora_weights=False)
            peft_model = get_peft_model(model, config)
            peft_model.peft_config["default"].base_model_name_or_path = str(base)
            peft_model.save_pretrained(tmp_path / task)
            models[task] = peft_model.merge_and_unload().eval()
        adapters[task] = tmp_path / task
    merger = Merger.from_pretrained(adapters, CatConfig(output="adapter", heads="per_task"))
    merger.save_pretrained(tmp_path / "out")
    as_model = Merger.from_pretrained(adapters, CatConfig(heads="per_task"))
    inputs = ZOO["bert"].inputs()
    for task, labels in (("two", 2), ("five", 5)):
        plain = BertForSequenceClassification.from_pretrained(base, num_labels=labels).eval()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loaded = PeftModel.from_pretrained(plain, tmp_path / "out" / "heads" / task).eval()
        expected = as_model.model_for(task)
        assert torch.equal(expected.classifier.weight, models[task].classifier.weight)
        with torch.no_grad():
            assert torch.allclose(loaded(**inputs).logits, expected(**inputs).logits, atol=1e-5)


# -- in place -----------------------------------------------------------------------------------------------------------------


def test_add_merged_adapter(bed: AdapterBed):
    model = live(bed)
    before = snapshot(model)
    report = add_merged_adapter(model, ["a", "b", "c"], CatConfig(weights=[1.0, 0.5, -1.0]), "sum")
    assert_unchanged(model, before)
    assert model.active_adapters == ["a"] and report.parameters
    model.set_adapter("sum")
    assert torch.allclose(bed.logits(model), bed.logits(bed.oracle([1.0, 0.5, -1.0])), atol=1e-5)


def test_every_method_in_place(bed: AdapterBed):
    model = live(bed)
    for config in (WudiConfig(), TiesConfig(adapter_rank=16), MergeConfig.from_merge_type("knots")):
        add_merged_adapter(model, ["a", "b"], config, config.merge_type)
    assert set(model.peft_config) == {"a", "b", "c", "wudi", "ties", "knots"}


BAD_CALLS = {
    "unknown adapter": (["a", "z"], CatConfig(), "m", "no adapter 'z'"),
    "name taken": (["a", "b"], CatConfig(), "c", "already"),
    "weights too short": (["a", "b"], CatConfig(weights=[1.0]), "m", "1 values for 2"),
    "one twice": (["a", "a"], CatConfig(), "m", "twice"),
    "no adapters": ([], CatConfig(), "m", "at least one"),
    "needs data": (["a", "b"], RegMeanConfig(), "m", "needs calibration samples"),
    "no config": (["a", "b"], "ties", "m", "MergeConfig"),
    "name with a dot": (["a", "b"], CatConfig(), "m.n", "Invalid adapter name"),
}


@pytest.mark.parametrize("call", BAD_CALLS)
def test_a_refused_merge_leaves_the_model_alone(call: str, bed: AdapterBed):
    adapters, config, name, fragment = BAD_CALLS[call]
    model = live(bed)
    before = snapshot(model)
    with pytest.raises(MergeError, match=fragment):
        add_merged_adapter(model, adapters, config, name)
    assert list(model.peft_config) == ["a", "b", "c"]
    assert set(model.state_dict()) == set(before)


# -- what add_weighted_adapter does ---------------------------------------------------------------------------------------------


def test_linear_is_the_mean_of_the_changes(bed: AdapterBed, tmp_path: Path):
    """PEFT's 'linear' adds the factors, and so products of one adapter's B with another's A."""
    adapters = {}
    for index, name in enumerate("ab"):
        config = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
        adapters[name] = save_adapter(bed, config, tmp_path / name, seed=index)
    same_rank = AdapterBed(bed.base, adapters, bed.model_class, bed.inputs)
    model = live(same_rank)
    add_merged_adapter(model, ["a", "b"], LinearConfig(), "ours")
    model.add_weighted_adapter(["a", "b"], [0.5, 0.5], "theirs", "linear")
    layer = next(module for module in model.modules() if hasattr(module, "get_delta_weight"))
    exact = (layer.get_delta_weight("a") + layer.get_delta_weight("b")) / 2
    assert torch.allclose(layer.get_delta_weight("ours"), exact, atol=1e-6)
    assert (layer.get_delta_weight("theirs") - exact).norm() > 0.5 * exact.norm()


@pytest.mark.parametrize("kind", ["rslora", "rank_pattern", "lora_bias", "dora"])
def test_options_that_add_weighted_adapter_gets_wrong(kind: str, tmp_path: Path):
    bed = make_adapters(KINDS[kind], tmp_path / "bed", 2)
    merged = Merger.from_pretrained(bed.adapters, CatConfig(weights=[0.5, 0.5])).merge()
    assert torch.allclose(bed.logits(merged), bed.logits(bed.oracle([0.5, 0.5])), atol=1e-5)


def test_a_rank_pattern_is_loaded_again(tmp_path: Path):
    """Ranks that differ between modules survive merging, saving, loading and merging again."""
    bed = make_adapters(KINDS["rank_pattern"], tmp_path / "bed", 2)
    Merger.from_pretrained(bed.adapters, CatConfig(output="adapter")).save_pretrained(tmp_path / "once")
    again = {"once": tmp_path / "once", "b": bed.adapters["b"]}
    Merger.from_pretrained(again, CatConfig(output="adapter", weights=[1.0, -1.0])).save_pretrained(tmp_path / "twice")
    expected = bed.logits(bed.oracle([1.0, 0.0]))
    assert torch.allclose(bed.logits(bed.attached(tmp_path / "twice")), expected, atol=1e-5)


# -- what does not fit ----------------------------------------------------------------------------------------------------------


def test_live_adapters_of_different_bases(bed: AdapterBed):
    model = live(bed)
    model.peft_config["b"].base_model_name_or_path = "someone/another-model"
    experts = {name: {"model": model, "adapter": name} for name in "ab"}
    with pytest.raises(ConfigError, match="different base models"):
        Merger.from_pretrained(experts, CatConfig())


@pytest.mark.parametrize("spoilt", ["error", "missing"])
def test_a_half_added_adapter_is_removed(spoilt: str, bed: AdapterBed, monkeypatch):
    load = peft_module.set_peft_model_state_dict

    def spoil(model, tensors, adapter_name):
        if spoilt == "error":
            raise RuntimeError("spoilt")
        return load(model, dict(list(tensors.items())[1:]), adapter_name=adapter_name)

    monkeypatch.setattr(peft_module, "set_peft_model_state_dict", spoil)
    model = live(bed)
    before = snapshot(model)
    with pytest.raises((RuntimeError, PlanError), match="spoilt|lacks"):
        add_merged_adapter(model, ["a", "b"], CatConfig(), "m")
    assert list(model.peft_config) == ["a", "b", "c"]
    assert set(model.state_dict()) == set(before)
    assert_unchanged(model, before)


def test_a_nested_recipe_of_adapters(bed: AdapterBed, tmp_path: Path):
    recipe = {"merge_type": "cat", "experts": {name: str(bed.adapters[name]) for name in "ab"}}
    config = CatConfig(output="adapter", adapter_rank=64)
    experts = {"x": {"merge": recipe}, "c": bed.adapters["c"]}
    Merger.from_pretrained(experts, config, base_model=bed.base).save_pretrained(tmp_path / "out")
    expected = bed.logits(bed.oracle([1.0, 1.0, 1.0]))
    assert torch.allclose(bed.logits(bed.attached(tmp_path / "out")), expected, atol=1e-4)
    recipe["output"] = "adapter"
    with pytest.raises(ConfigError, match="nested recipe"):
        Merger.from_pretrained(experts, config, base_model=bed.base)


def test_blocks_are_distilled_from_adapters(tmp_path: Path):
    bed = make_adapters(KINDS["lora"], tmp_path / "bed", 2)
    generator = torch.Generator().manual_seed(0)
    data = {task: {"input_ids": torch.randint(5, 60, (6, 7), generator=generator)} for task in bed.adapters}
    merger = Merger.from_pretrained(bed.adapters, ProDistillConfig(epochs=3))
    merger.merge(data)
    assert merger.report.blocks
    assert all(block["last_loss"] < block["first_loss"] for block in merger.report.blocks.values())


def test_an_adapter_folder_is_not_a_merged_model(tmp_path: Path):
    bed = make_adapters(KINDS["lora"], tmp_path / "bed", 1)
    with pytest.raises(ConfigError, match="holds a PEFT adapter: load it with peft.AutoPeftModel"):
        AutoMergedModel.from_pretrained(bed.adapters["a"])
