"""Adapters that do not fit: one clear error each, by name, before anything is written."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import HTTPError
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig
from safetensors.torch import load_file, save_file

from hf_merge import CatConfig, MergeError, Merger, PlanError, UnsupportedModelError
from hf_merge.adapters.detection import is_adapter_repository
from hf_merge.adapters.source import ConfigOnlySource, dequantized
from hf_merge.errors import NonFiniteError
from tests.vocabularies import ENGLISH, GERMAN, save_llama, train_bpe
from tests.zoo import ZOO, save_zoo_model

from .helpers import KINDS, AdapterBed, make_adapters, save_adapter


QUANTISATION = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}


@pytest.fixture
def bed(tmp_path: Path) -> AdapterBed:
    return make_adapters(KINDS["lora"], tmp_path / "bed", 2)


def edit_config(folder: Path, **changes) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(folder: Path, change: Callable[[dict], dict]) -> None:
    path = folder / "adapter_model.safetensors"
    save_file(change(load_file(path)), path)


def refused(bed: AdapterBed, *fragments: str, output: str = "adapter", **kwargs) -> None:
    out = bed.base.parent / "out"
    with pytest.raises(MergeError) as caught:
        Merger.from_pretrained(bed.adapters, CatConfig(output=output), **kwargs).save_pretrained(out)
    for fragment in fragments:
        assert fragment in str(caught.value), str(caught.value)
    assert not out.exists()


def test_different_bases_by_name(bed: AdapterBed):
    edit_config(bed.adapters["b"], base_model_name_or_path="someone/another-model")
    refused(bed, "different base models", "'b' on 'someone/another-model'", "base_model=")
    merger = Merger.from_pretrained(bed.adapters, CatConfig(), base_model=bed.base)
    assert any("another-model" in note for note in merger.check().notes)


def test_different_bases_by_shape(bed: AdapterBed):
    edit_tensors(
        bed.adapters["b"],
        lambda tensors: {
            key: value[..., : value.shape[-1] // 2 * 2 - 2].contiguous() for key, value in tensors.items()
        },
    )
    refused(bed, "'b'", "does not fit")


def test_another_vocabulary(bed: AdapterBed):
    key = "base_model.model.model.embed_tokens.weight"
    edit_tensors(bed.adapters["b"], lambda tensors: tensors | {key: torch.zeros(120, 32)})
    refused(bed, "'b'", "embeddings of shape (120, 32)", "resized")


def test_no_base_is_named(bed: AdapterBed):
    for folder in bed.adapters.values():
        edit_config(folder, base_model_name_or_path=None)
    refused(bed, "do not name their base model", "base_model=")


def test_a_base_that_is_gone(bed: AdapterBed):
    shutil.move(bed.base, bed.base.parent / "moved")
    refused(bed, "cannot be opened", "base_model=")
    Merger.from_pretrained(bed.adapters, CatConfig(), base_model=bed.base.parent / "moved").check()


def test_unknown_tensors(bed: AdapterBed):
    edit_tensors(
        bed.adapters["b"],
        lambda tensors: tensors | {"base_model.model.model.layers.9.x.lora_A.weight": torch.zeros(2, 2)},
    )
    refused(bed, "'b'", "layers.9.x")


def test_missing_tensors(bed: AdapterBed):
    edit_tensors(bed.adapters["b"], lambda tensors: dict(list(tensors.items())[1:]))
    refused(bed, "'b'", "lacks 1 tensor")


def test_missing_weights(bed: AdapterBed):
    (bed.adapters["b"] / "adapter_model.safetensors").unlink()
    refused(bed, "'b'", "adapter_model.safetensors")


def test_nan(bed: AdapterBed):
    edit_tensors(bed.adapters["b"], lambda tensors: {key: value * float("nan") for key, value in tensors.items()})
    for output in ("adapter", "model"):
        refused(bed, "NaN", output=output)


def test_config_of_a_newer_peft(bed: AdapterBed):
    edit_config(bed.adapters["b"], a_key_of_the_future=True, peft_version="9.9.9")
    merger = Merger.from_pretrained(bed.adapters, CatConfig())
    assert any("9.9.9" in note and "a_key_of_the_future" in note for note in merger.check().notes)


@pytest.mark.parametrize(
    "changes, fragment",
    [
        ({"init_lora_weights": "pissa"}, "path_initial_model_for_weight_conversion"),
        ({"init_lora_weights": "olora"}, "replaces the base weights"),
        ({"layer_replication": [[0, 2], [1, 3]]}, "repeats layers"),
        ({"alora_invocation_tokens": [1, 2]}, "some tokens only"),
        ({"peft_type": "OSF"}, "decomposition of the base weights"),
        ({"peft_type": "FROD"}, "decomposition of the base weights"),
        ({"peft_type": "LILY"}, "not known"),
        ({"peft_type": "XLORA"}, "routes among adapters"),
        ({"peft_type": "NEW_KIND"}, "adapter_config.json"),
    ],
)
def test_configs_that_are_no_change_of_weights(changes: dict, fragment: str, bed: AdapterBed):
    edit_config(bed.adapters["b"], **changes)
    refused(bed, "'b'", fragment)


@pytest.mark.parametrize("config_cls", [PromptTuningConfig, PrefixTuningConfig])
def test_prompts_are_refused_by_name(config_cls: type, bed: AdapterBed, tmp_path: Path):
    config = config_cls(task_type="CAUSAL_LM", num_virtual_tokens=3)
    bed.adapters["p"] = save_adapter(bed, config, tmp_path / "p", seed=1)
    refused(bed, "'p'", "changes no weights")


def test_the_cache_is_asked_before_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def unreachable(*args, **kwargs):
        asked.append(args)
        raise HTTPError("no network")

    asked, cache = [], tmp_path / "cache"
    monkeypatch.setattr(huggingface_hub, "file_exists", unreachable)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    assert not is_adapter_repository("me/model", {"cache_dir": cache})
    assert len(asked) == 1
    assert not is_adapter_repository("me/model", {"cache_dir": cache, "local_files_only": True})
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert not is_adapter_repository("me/model", {"cache_dir": cache})
    repository = cache / "models--me--model"
    for path, text in (("refs/main", "c0ffee"), ("snapshots/c0ffee/adapter_config.json", "{}")):
        (repository / path).parent.mkdir(parents=True)
        (repository / path).write_text(text)
    assert is_adapter_repository("me/model", {"cache_dir": cache})
    assert len(asked) == 1


def test_every_spoilt_adapter_is_reported(bed: AdapterBed):
    for name in "ab":
        edit_config(bed.adapters[name], init_lora_weights="pissa")
    refused(bed, "'a'", "'b'")


def test_grouped_convolutions_are_refused(tmp_path: Path):
    bed = make_adapters(KINDS["lora"], tmp_path / "bed", 1)
    from transformers import MobileNetV2Config, MobileNetV2Model

    torch.manual_seed(0)
    model = MobileNetV2Model(MobileNetV2Config(image_size=32, depth_multiplier=0.25, num_hidden_layers=1))
    model.save_pretrained(tmp_path / "mobile")
    grouped = AdapterBed(tmp_path / "mobile", model_class=MobileNetV2Model)
    names = [name for name, module in model.named_modules() if getattr(module, "groups", 1) > 1][:1]
    rank = model.get_submodule(names[0]).groups
    config = LoraConfig(r=rank, target_modules=names, init_lora_weights=False)
    grouped.adapters = {name: save_adapter(grouped, config, tmp_path / name, seed=1) for name in "ab"}
    refused(grouped, "groups=")
    assert bed.adapters


# -- quantised base models ----------------------------------------------------------------------------------------------


def quantise(bed: AdapterBed) -> None:
    path = bed.base / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": QUANTISATION}))


def test_an_adapter_does_not_depend_on_how_the_base_is_stored(bed: AdapterBed, tmp_path: Path):
    expected = bed.logits(bed.oracle([1.0, 1.0]))
    quantise(bed)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        merger = Merger.from_pretrained(bed.adapters, CatConfig(output="adapter"))
    assert isinstance(merger.base, ConfigOnlySource)
    merger.save_pretrained(tmp_path / "out")
    config = json.loads((bed.base / "config.json").read_text())
    config.pop("quantization_config")
    (bed.base / "config.json").write_text(json.dumps(config))
    assert torch.allclose(bed.logits(bed.attached(tmp_path / "out")), expected, atol=1e-5)


def test_a_model_dequantises_its_base_with_a_warning(bed: AdapterBed, monkeypatch):
    expected = bed.logits(bed.oracle([1.0, 1.0]))
    plain = bed.load()
    quantise(bed)
    monkeypatch.setattr(bed.model_class, "from_pretrained", classmethod(lambda cls, *args, **kwargs: plain))
    monkeypatch.setattr(bed.model_class, "dequantize", lambda self: self, raising=False)
    with pytest.warns(UserWarning, match="dequantised.*not quantised again"):
        merger = Merger.from_pretrained(bed.adapters, CatConfig())
    assert any("dequantised" in note for note in merger.check().notes)
    monkeypatch.undo()
    model = merger.merge()
    assert getattr(model.config, "quantization_config", None) is None
    assert torch.allclose(bed.logits(model), expected, atol=1e-5)


def test_a_base_that_cannot_be_dequantised_is_refused(bed: AdapterBed):
    quantise(bed)
    refused(bed, "bitsandbytes", "output='adapter'", output="model")


def test_a_quantised_model_in_memory_is_not_changed(bed: AdapterBed):
    merger = Merger.from_pretrained(bed.adapters, CatConfig(), base_model=bed.load())
    merger.base.config.quantization_config = QUANTISATION
    with pytest.raises(UnsupportedModelError, match="in memory"):
        dequantized(merger.base)


def test_an_adapter_is_no_base_model(bed: AdapterBed):
    with pytest.raises(UnsupportedModelError, match="pass it as an expert"):
        Merger.from_pretrained([bed.base], CatConfig(), base_model=bed.adapters["a"])


def test_different_folders_of_one_name(bed: AdapterBed, tmp_path: Path):
    other = tmp_path / "other" / "base"
    shutil.copytree(bed.base, other)
    edit_config(bed.adapters["b"], base_model_name_or_path=str(other))
    refused(bed, "different base models", f"'b' on '{other}'")
    (tmp_path / "linked").symlink_to(bed.base.parent)
    edit_config(bed.adapters["b"], base_model_name_or_path=str(tmp_path / "linked" / "base"))
    assert not Merger.from_pretrained(bed.adapters, CatConfig()).check().notes
    edit_config(bed.adapters["b"], base_model_name_or_path="someone/base")
    assert any("'someone/base'" in note for note in Merger.from_pretrained(bed.adapters, CatConfig()).check().notes)


def test_what_half_precision_cannot_hold(bed: AdapterBed):
    edit_tensors(bed.adapters["b"], lambda tensors: {key: value * 1e6 for key, value in tensors.items()})
    out = bed.base.parent / "out"
    config = CatConfig(output="adapter", dtype="float16")
    with pytest.raises(NonFiniteError, match="_proj.weight' has NaN or infinity as float16.*float32"):
        Merger.from_pretrained(bed.adapters, config).save_pretrained(out)
    assert not out.exists()


def test_another_vocabulary_of_a_model(tmp_path: Path):
    for seed, (name, texts) in enumerate({"base": ENGLISH, "a": GERMAN}.items()):
        save_llama(tmp_path / name, train_bpe(texts, ["</s>"]), seed)
    config = CatConfig(output="adapter", adapter_rank=2, tokenizer="union")
    with pytest.raises(PlanError, match="vocabularies of the models differ.*output='model'"):
        Merger.from_pretrained({"a": tmp_path / "a"}, config, base_model=tmp_path / "base").check()


@pytest.mark.parametrize("output", ["model", "adapter"])
def test_a_base_of_another_architecture(output: str, bed: AdapterBed, tmp_path: Path):
    vit = save_zoo_model(ZOO["vit"].build(), tmp_path / "vit")
    for folder in bed.adapters.values():
        edit_config(folder, auto_mapping={"base_model_class": "LlamaForCausalLM", "parent_library": "x"})
    refused(bed, "'a'", "trained on a LlamaForCausalLM", "base_model", output=output, base_model=vit)
    for folder in bed.adapters.values():
        edit_config(folder, auto_mapping=None, task_type=None)
    refused(bed, "'a'", output=output, base_model=vit)
