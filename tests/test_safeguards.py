"""What a merge must never do quietly: lose an expert, average where a base is missing, share memory, write NaN."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_merge import (
    AutoMergeConfig,
    ConfigError,
    LinearConfig,
    MergeConfig,
    MergeError,
    Merger,
    NonFiniteError,
    OutputError,
    PlanError,
    TaskArithmeticConfig,
    WiseFtConfig,
    WudiConfig,
)
from hf_merge.engines.opening import infer_base, name_experts

from .zoo import ZOO, perturbed


UP_PROJ = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def models():
    base = ZOO["llama"].build()
    return base, {name: perturbed(base, seed=seed) for seed, name in enumerate("ab", start=1)}


@pytest.fixture
def folders(models, tmp_path: Path):
    base, experts = models
    base.save_pretrained(tmp_path / "base")
    for name, model in experts.items():
        model.save_pretrained(tmp_path / name)
    return tmp_path


def edit_tensors(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def experts_of(folders: Path) -> dict[str, str]:
    return {name: str(folders / name) for name in "ab"}


# -- the base model -----------------------------------------------------------------------------------------------


def write_cards(folders: Path, base: str) -> None:
    for name in "ab":
        (folders / name / "README.md").write_text(f"---\nbase_model: {base}\n---\n# x\n")


def test_base_is_found_in_the_model_cards(folders: Path):
    write_cards(folders, str(folders / "base"))
    merger = Merger.from_pretrained(experts_of(folders))
    assert merger.config.merge_type == "wudi"
    assert merger.base.reference.model == str(folders / "base")


def test_base_is_not_looked_up_for_a_method_without_one(folders: Path):
    write_cards(folders, "nobody/nowhere")
    assert Merger.from_pretrained(experts_of(folders), LinearConfig()).base is None


@pytest.mark.parametrize("text", ["---\nbase_model: [\n---\n", "---\nbase_model: [x, y]\n---\n", "# no metadata\n"])
def test_cards_that_do_not_name_one_base(text: str, folders: Path):
    for name in "ab":
        (folders / name / "README.md").write_text(text)
    assert infer_base(Merger.from_pretrained(experts_of(folders), LinearConfig()).experts) is None


def test_base_that_lacks_a_weight_is_refused(folders: Path):
    edit_tensors(folders / "base", lambda tensors: tensors.pop(UP_PROJ))
    with pytest.raises(PlanError, match=rf"'base'.* lacks 1 parameter.*{UP_PROJ}"):
        Merger.from_pretrained(experts_of(folders), TaskArithmeticConfig(), base_model=folders / "base").check()


def test_integer_weight_in_the_base_is_refused(folders: Path):
    edit_tensors(folders / "base", lambda tensors: tensors.update({UP_PROJ: tensors[UP_PROJ].to(torch.int8)}))
    with pytest.raises(PlanError, match="'base'.*int8"):
        Merger.from_pretrained(experts_of(folders), TaskArithmeticConfig(), base_model=folders / "base").check()


def test_empty_base_is_refused(folders: Path):
    with pytest.raises(ConfigError, match="empty"):
        Merger.from_pretrained(experts_of(folders), TaskArithmeticConfig(), base_model={})


def test_recipe_with_a_model_in_memory_cannot_be_repeated_by_accident(models, folders: Path):
    out = folders / "out"
    Merger.from_pretrained(experts_of(folders), TaskArithmeticConfig(), base_model=models[0]).save_pretrained(out)
    with pytest.raises(ConfigError, match="in memory"):
        Merger.from_pretrained(config=AutoMergeConfig.from_pretrained(out))


def test_weight_that_no_model_stores_is_refused(folders: Path):
    for name in ("base", "a", "b"):
        edit_tensors(folders / name, lambda tensors: tensors.pop(UP_PROJ))
    with pytest.raises(PlanError, match=UP_PROJ):
        Merger.from_pretrained(experts_of(folders), LinearConfig()).check()


# -- experts ------------------------------------------------------------------------------------------------------


def test_no_expert_is_lost_to_a_name():
    assert list(name_experts(["p/x_2", "a/x", "b/x"]).values()) == ["p/x_2", "a/x", "b/x"]
    assert list(name_experts(["me/base", "you/base"]).values()) == ["me/base", "you/base"]


def test_result_shares_no_memory_with_the_models(models):
    base, experts = models
    merger = Merger.from_pretrained(experts, LinearConfig(exclude=["mlp"]), base_model=base)
    before = copy.deepcopy(base.state_dict())
    merged = merger.merge()
    for parameter in merged.parameters():
        parameter.data.add_(1.0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items())


def test_first_head_is_not_handed_out_for_another_task(models):
    merger = Merger.from_pretrained(models[1], LinearConfig(heads="first"))
    merger.model_for("a")
    with pytest.raises(ConfigError, match="heads='first'"):
        merger.model_for("b")


@pytest.mark.parametrize("spec", [5, "x", ["a"]])
def test_nested_recipe_must_be_a_recipe(spec, models):
    with pytest.raises(ConfigError, match="recipe"):
        Merger.from_pretrained({"a": {"merge": spec}}, LinearConfig())


# -- values -------------------------------------------------------------------------------------------------------


def test_copied_parameters_are_checked_too(folders: Path):
    edit_tensors(folders / "base", lambda tensors: tensors[UP_PROJ].fill_(float("nan")))
    merger = Merger.from_pretrained(
        experts_of(folders), TaskArithmeticConfig(exclude=["up_proj"]), base_model=folders / "base"
    )
    with pytest.raises(NonFiniteError, match=UP_PROJ):
        merger.save_pretrained(folders / "out")
    assert not (folders / "out").exists()


def test_steps_of_then_select_parameters(models):
    base, experts = models
    step = {"merge_type": "wise_ft", "alpha": 0.0, "include": ["mlp"]}
    merged = Merger.from_pretrained(experts, TaskArithmeticConfig(then=[step]), base_model=base).merge().state_dict()
    plain = Merger.from_pretrained(experts, TaskArithmeticConfig(), base_model=base).merge().state_dict()
    for name, tensor in merged.items():
        expected = base.state_dict()[name] if "mlp" in name else plain[name]
        assert torch.equal(tensor, expected), name


@pytest.mark.parametrize(
    "step",
    [{"merge_type": "wise_ft", "include": ["nothing_like_this"]}, {"merge_type": "slerp"}, {"merge_type": "ram"}],
)
def test_steps_of_then_are_checked(step: dict, models):
    base, experts = models
    config = TaskArithmeticConfig(then=[{**step, "rules": [{"match": "no_such_name"}]}])
    with pytest.raises(MergeError, match="then"):
        Merger.from_pretrained(experts, config, base_model=base).check()


def test_recipe_fields_do_not_belong_into_steps():
    with pytest.raises(ConfigError, match="'dtype'"):
        TaskArithmeticConfig(then=[{"merge_type": "wise_ft", "dtype": "bfloat16"}])


def test_rule_cannot_choose_a_method_that_needs_data(models):
    config = LinearConfig(rules=[{"match": "mlp", "merge_type": "regmean"}])
    with pytest.raises(PlanError, match="needs data"):
        Merger.from_pretrained(models[1], config, base_model=models[0]).check()


def test_methods_inside_methods_say_what_they_cannot_merge(models):
    base, experts = models
    three = {**experts, "c": perturbed(base, seed=7)}
    for config in (
        MergeConfig.from_merge_type("svc", inner="slerp"),
        WudiConfig(solver="adam", initial="slerp"),
    ):
        with pytest.raises(PlanError, match="'slerp' merges at most 2"):
            Merger.from_pretrained(three, config, base_model=base).check()


def test_integers_may_come_as_whole_floats():
    assert WudiConfig(num_steps=3e2).num_steps == 300
    with pytest.raises(ConfigError, match="num_steps"):
        WudiConfig(num_steps=2.5)


def test_start_belongs_to_iterative_solvers():
    with pytest.raises(ConfigError, match="iterative"):
        WudiConfig(initial="tsv_m")


# -- the output folder --------------------------------------------------------------------------------------------


def test_links_and_the_current_folder_are_refused(models, tmp_path: Path, monkeypatch):
    merger = Merger.from_pretrained({"a": models[1]["a"]}, WiseFtConfig(), base_model=models[0])
    (tmp_path / "target").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "target")
    monkeypatch.chdir(tmp_path / "target")
    for folder in (tmp_path / "link", Path()):
        with pytest.raises(PlanError, match="link, a mount point or the current folder"):
            merger.save_pretrained(folder)


def test_folder_of_somebody_else_is_left_alone(models, tmp_path: Path):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "thesis.txt").write_text("my life's work")
    with pytest.raises(OutputError, match="not made by a merge"):
        Merger.from_pretrained(models[1], LinearConfig()).save_pretrained(tmp_path / "out")
    assert (tmp_path / "out.partial" / "thesis.txt").read_text() == "my life's work"


def test_unknown_arguments_of_save_are_refused(models, tmp_path: Path):
    with pytest.raises(ConfigError, match="Did you mean 'max_shard_size'"):
        Merger.from_pretrained(models[1], LinearConfig()).save_pretrained(tmp_path / "out", max_shard_sise="1KB")


# -- slices -------------------------------------------------------------------------------------------------------


def sliced(path: Path, layers: list[list[int]]) -> dict:
    return {"slices": [{"model": str(path), "layers": bounds} for bounds in layers]}


@pytest.mark.parametrize("family", ["mixtral", "vit", "qwen2"])
def test_slices_keep_the_layout_of_their_files(family: str, tmp_path: Path):
    model = ZOO[family].build()
    model.save_pretrained(tmp_path / "model")
    merger = Merger.from_pretrained({"x": sliced(tmp_path / "model", [[0, 2], [1, 3]])}, LinearConfig())
    merger.save_pretrained(tmp_path / "out")
    loaded, info = type(model).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert loaded.config.num_hidden_layers == 4
    stack = merger.experts[0].stack
    state, original = loaded.state_dict(), model.state_dict()
    for name, tensor in state.items():
        if name.startswith(f"{stack}."):
            index, rest = name[len(stack) + 1 :].split(".", 1)
            assert torch.equal(tensor, original[f"{stack}.{[0, 1, 1, 2][int(index)]}.{rest}"]), name
    ours, theirs = (
        set(load_file(tmp_path / "out/model.safetensors")),
        set(load_file(tmp_path / "model/model.safetensors")),
    )
    assert theirs <= ours, "the files name their tensors in another way than the input's"


def test_layers_that_do_not_fit_their_place_are_refused(tmp_path: Path):
    config = ZOO["qwen3-moe"].config()
    config.mlp_only_layers = [0]
    torch.manual_seed(0)
    type(ZOO["qwen3-moe"].build())(config).save_pretrained(tmp_path / "model")
    with pytest.raises(ConfigError, match="would come from"):
        Merger.from_pretrained({"x": sliced(tmp_path / "model", [[1, 3]])}, LinearConfig())


@pytest.mark.parametrize("bounds", [[2, 2], [0, 9], [-1, 2], [0.0, 2], [1]])
def test_bad_layer_ranges(bounds: list, tmp_path: Path):
    ZOO["llama"].build().save_pretrained(tmp_path / "model")
    with pytest.raises(ConfigError, match="layers"):
        Merger.from_pretrained({"x": sliced(tmp_path / "model", [bounds])}, LinearConfig())


# -- nested -------------------------------------------------------------------------------------------------------


def test_nested_merge_equals_two_merges(folders: Path):
    inner = {"merge_type": "linear", "experts": experts_of(folders)}
    nested = Merger.from_pretrained(
        {"soup": {"merge": inner}, "a": str(folders / "a")}, LinearConfig(weights=[0.75, 0.25])
    )
    nested.save_pretrained(folders / "nested")
    Merger.from_pretrained(experts_of(folders), LinearConfig()).save_pretrained(folders / "soup")
    two = {"soup": str(folders / "soup"), "a": str(folders / "a")}
    Merger.from_pretrained(two, LinearConfig(weights=[0.75, 0.25])).save_pretrained(folders / "two")
    ours, theirs = (load_file(folders / name / "model.safetensors") for name in ("nested", "two"))
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor)
    recipe = json.loads((folders / "nested" / "merge_config.json").read_text())
    assert set(recipe["experts"]["soup"]["merge"]["experts"]) == {"a", "b"}
    again = Merger.from_pretrained(config=AutoMergeConfig.from_pretrained(folders / "nested"))
    again.save_pretrained(folders / "again")
    assert (folders / "again/model.safetensors").read_bytes() == (folders / "nested/model.safetensors").read_bytes()
