"""Loading by name: a recipe that is merged while loading gives the model that its folder would give."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

import hf_merge
from hf_merge import (
    AutoMergedModel,
    AutoMergedModelForCausalLM,
    AutoMergedModelForSequenceClassification,
    ConfigError,
    GitRebasinConfig,
    LinearConfig,
    MergeConfig,
    NonFiniteError,
    PlanError,
    TiesConfig,
)

from .testing_utils import Bed, llama_bed, load_clean, make_bed
from .zoo import ZOO


# On disk several of these have other names or shapes than in memory; others are tied, or keep parameters in float32.
FAMILIES = (
    "bert",
    "roberta",
    "deberta-v2",
    "vit",
    "swin",
    "gpt2",
    "llama",
    "gemma3",
    "mixtral",
    "t5",
    "mamba",
    "clip",
)


def write_recipe(bed: Bed, config: MergeConfig, base: bool = True) -> Path:
    """A folder that holds only `merge_config.json`."""
    config.experts = {name: {"model": str(path)} for name, path in bed.experts.items()}
    config.base_model = {"model": str(bed.base)} if base else None
    config.save_pretrained(bed.folder / "recipe")
    return bed.folder / "recipe"


def assert_same(model: PreTrainedModel, other: PreTrainedModel) -> None:
    ours, theirs = model.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype and torch.equal(ours[name], tensor), name


@pytest.mark.parametrize("family", FAMILIES)
def test_a_recipe_loads_as_its_folder(tmp_path, family):
    bed = make_bed(ZOO[family], tmp_path, names=("a", "b"))
    config = TiesConfig(density=0.5)
    recipe = write_recipe(bed, config)
    before = sorted(path.name for path in bed.folder.rglob("*"))
    lazy = AutoMergedModel.from_pretrained(recipe)
    assert sorted(path.name for path in bed.folder.rglob("*")) == before
    folder = load_clean(bed.model_class, bed.merge(config))
    assert type(lazy) is type(folder)
    assert_same(lazy, folder)
    with torch.no_grad():
        ours, theirs = (model(**ZOO[family].inputs())[0] for model in (lazy, folder))
    assert torch.equal(ours, theirs)


def offload_map(model: PreTrainedModel) -> dict[str, str]:
    """All but the first block on disk, the rest on the CPU."""
    blocks = next(name for name, module in model.named_modules() if isinstance(module, torch.nn.ModuleList))
    device_map = {}
    for name, module in model.named_modules():
        inside = f"{name}." in f"{blocks}." or not name
        if not inside and name.rpartition(".")[0] not in device_map:
            device_map[name] = "disk" if name.startswith(f"{blocks}.") and name != f"{blocks}.0" else "cpu"
    return {name: device for name, device in device_map.items() if not _covered(name, device_map)}


def _covered(name: str, device_map: dict[str, str]) -> bool:
    return any(name.startswith(f"{other}.") for other in device_map)


@pytest.mark.parametrize("family", ["llama", "mixtral", "gpt2", "bert", "vit"])
def test_device_map_with_disk_offload(tmp_path, family):
    bed = make_bed(ZOO[family], tmp_path, names=("a", "b"))
    recipe = write_recipe(bed, LinearConfig())
    folder = load_clean(bed.model_class, bed.merge(LinearConfig()))
    device_map = offload_map(folder)
    offloaded = AutoMergedModel.from_pretrained(recipe, device_map=device_map, offload_folder=tmp_path / "offload")
    on_disk = [name for name, device in device_map.items() if device == "disk"]
    assert len(on_disk) >= 2
    assert all(next(offloaded.get_submodule(name).parameters()).device.type == "meta" for name in on_disk)
    inputs = ZOO[family].inputs()
    with torch.no_grad():
        torch.testing.assert_close(offloaded(**inputs)[0], folder(**inputs)[0])


@pytest.mark.parametrize("dtype", ["bfloat16", torch.float16, "auto"])
def test_dtype_of_loading(tmp_path, dtype):
    bed = llama_bed(tmp_path)
    config = LinearConfig(dtype="bfloat16")
    recipe, folder = write_recipe(bed, config), bed.merge(config)
    assert_same(
        AutoMergedModelForCausalLM.from_pretrained(recipe, dtype=dtype),
        AutoModelForCausalLM.from_pretrained(folder, dtype=dtype),
    )


def heads_bed(tmp_path: Path) -> Bed:
    """Two classifiers with other labels."""
    bed = make_bed(ZOO["bert"], tmp_path, names=("two",))
    wide = ZOO["bert"].config()
    wide.num_labels = 3
    model = getattr(__import__("transformers"), ZOO["bert"].model_class)(wide)
    model.save_pretrained(tmp_path / "three")
    bed.experts["three"] = tmp_path / "three"
    return bed


@pytest.mark.parametrize("task", ["two", "three", None])
def test_heads_of_a_recipe(tmp_path, task):
    bed = heads_bed(tmp_path)
    recipe, folder = write_recipe(bed, LinearConfig()), bed.merge(LinearConfig())
    lazy = AutoMergedModelForSequenceClassification.from_pretrained(recipe, task=task)
    assert lazy.config.num_labels == (3 if task == "three" else 2)
    assert_same(lazy, AutoMergedModelForSequenceClassification.from_pretrained(folder, task=task))


def test_a_head_of_a_folder_can_be_offloaded(tmp_path):
    bed = heads_bed(tmp_path)
    folder = bed.merge(LinearConfig())
    plain = AutoMergedModel.from_pretrained(folder, task="three")
    device_map = offload_map(plain)
    offloaded = AutoMergedModel.from_pretrained(
        folder, task="three", device_map=device_map, offload_folder=tmp_path / "offload"
    )
    inputs = ZOO["bert"].inputs()
    with torch.no_grad():
        torch.testing.assert_close(offloaded(**inputs).logits, plain(**inputs).logits)


def test_a_recipe_in_memory(tmp_path):
    bed = llama_bed(tmp_path)
    config = LinearConfig(experts={name: {"model": str(path)} for name, path in bed.experts.items()})
    assert_same(AutoMergedModel.from_pretrained(config), load_clean(bed.model_class, bed.merge(config, base=False)))


def test_a_method_that_is_not_defined_by_parameters(tmp_path):
    bed = llama_bed(tmp_path)
    model = AutoMergedModel.from_pretrained(write_recipe(bed, GitRebasinConfig(), base=False), dtype="bfloat16")
    assert model.dtype is torch.bfloat16


def test_refusals(tmp_path):
    bed = llama_bed(tmp_path)
    recipe = write_recipe(bed, LinearConfig())
    with pytest.raises(ConfigError, match="AutoMergedModelForSequenceClassification does not load"):
        AutoMergedModelForSequenceClassification.from_pretrained(recipe)
    with pytest.raises(ConfigError, match="No expert is called 'z'"):
        AutoMergedModel.from_pretrained(recipe, task="z")
    with pytest.raises(ConfigError, match="output_loading_info"):
        AutoMergedModel.from_pretrained(recipe, output_loading_info=True)
    with pytest.raises(PlanError, match="calibration samples"):
        AutoMergedModel.from_pretrained(write_recipe(bed, hf_merge.ProDistillConfig()))


def test_errors_of_a_parameter_keep_their_type(tmp_path):
    bed = llama_bed(tmp_path)
    broken = AutoModelForCausalLM.from_pretrained(bed.experts["a"])
    broken.model.layers[0].mlp.up_proj.weight.data[0, 0] = float("nan")
    broken.save_pretrained(bed.experts["a"])
    with pytest.raises(NonFiniteError, match="up_proj"):
        AutoMergedModel.from_pretrained(write_recipe(bed, LinearConfig()))


def test_every_class_names_one_of_transformers():
    import transformers

    for name in hf_merge.__all__:
        if name.startswith("AutoMergedModelFor"):
            assert hasattr(transformers, getattr(hf_merge, name).auto_class), name
