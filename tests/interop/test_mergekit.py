"""mergekit recipes: what they are translated into, that the result is what mergekit computes, and what is refused."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import BertTokenizer, LlamaConfig, LlamaForCausalLM

from hf_merge import ConfigError, MergeConfig, Merger, PlanError
from hf_merge.interop.chat_templates import CHAT_TEMPLATES
from hf_merge.interop.mergekit.methods import METHODS, REQUIRED

from ..methods.elementwise import merge, random_models
from ..testing_utils import assert_one_line_error, load_clean, run_cli
from ..zoo import perturbed
from .recipes import RECIPES


LAYERS = 4
MODELS = ("base", "a", "b", "c")
ATTENTION = "model.layers.{}.self_attn.q_proj.weight"
MLP = "model.layers.{}.mlp.up_proj.weight"
# What stands in recipes of the wild without having an effect.
quiet = pytest.mark.filterwarnings("ignore:.*it is ignored, as in mergekit:UserWarning")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four-layer Llamas with a tokenizer: `base` and its fine-tuned copies `a`, `b` and `c`."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 2}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=32, num_hidden_layers=LAYERS, eos_token_id=1, **sizes))
    for seed, name in enumerate(MODELS):
        (perturbed(base, seed, 0.05) if seed else base).save_pretrained(folder / name)
        tokenizer = BertTokenizer(vocab={f"w{index}": index for index in range(32)})
        tokenizer.chat_template = "{{ 'b' }}" if name in "bc" else f"{{{{ '{name}' }}}}"
        tokenizer.save_pretrained(folder / name)
    return folder


@pytest.fixture
def models(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder in which the recipes' models are folders."""
    for name in MODELS:
        (tmp_path / name).symlink_to(saved / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def state(name: str) -> dict[str, Tensor]:
    return load_file(Path(name, "model.safetensors"))


def merged(recipe) -> dict[str, Tensor]:
    model = Merger.from_pretrained(config=MergeConfig.from_mergekit(recipe), dtype="float32").merge()
    return model.state_dict()


def two(method: str, a: dict | None = None, b: dict | None = None, **document) -> dict:
    """A recipe that merges `a` and `b`, with a base where the method needs one."""
    needs_base = {"base_model": "base"} if METHODS[method].base == "required" else {}
    listed = [{"model": "a", "parameters": a or {}}, {"model": "b", "parameters": b or {}}]
    return {"merge_method": method, "models": listed} | needs_base | document


def one(method: str, **parameters) -> dict:
    return {
        "merge_method": method,
        "models": [{"model": "a"}],
        "base_model": "base",
        "parameters": parameters,
    }


# -- recipes as they are found ----------------------------------------------------------------------------------------


@quiet
@pytest.mark.parametrize("title", RECIPES)
def test_example_recipes_run_from_the_command_line(title: str, models: Path):
    Path("recipe.yml").write_text(RECIPES[title], encoding="utf-8")
    assert run_cli(["run", "recipe.yml", "--out", "out"]) == 0
    load_clean(LlamaForCausalLM, Path("out"))


@quiet
@pytest.mark.parametrize("title", RECIPES)
def test_the_translation_is_a_recipe_of_its_own(title: str, models: Path):
    config = MergeConfig.from_mergekit(RECIPES[title])
    again = MergeConfig.from_dict(json.loads(config.to_json_string()))
    assert again.to_dict() == json.loads(config.to_json_string())


def test_a_file_its_text_and_what_it_says_are_one_recipe(tmp_path: Path):
    text = "merge_method: linear\nmodels: [{model: a, parameters: {weight: 1}}]\n"
    (tmp_path / "recipe.yml").write_text(text, encoding="utf-8")
    data = {"merge_method": "linear", "models": [{"model": "a", "parameters": {"weight": 1}}]}
    forms = [tmp_path / "recipe.yml", str(tmp_path / "recipe.yml"), text, json.dumps(data), data, [data]]
    configs = [MergeConfig.from_mergekit(form).to_dict() for form in forms]
    assert all(config == configs[0] for config in configs)


# -- every method, with every setting explicit ------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_every_setting_of_every_method_is_given(name: str):
    method = METHODS[name]
    required = {key: 0.5 for key, parameter in method.parameters.items() if parameter.default is REQUIRED}
    listed = [{"model": model} for model in ("a", "b", "c")[: method.most or 3]]
    recipe = {"merge_method": name, "models": listed, "parameters": required}
    config = MergeConfig.from_mergekit(recipe | ({} if method.base == "input" else {"base_model": "base"}))
    assert config.merge_type == method.merge_type
    expected = {parameter.setting for parameter in method.parameters.values() if parameter.setting}
    expected |= set(method.fixed)
    for setting in expected - {"flatten", "row_wise"}:
        assert getattr(config, setting) is not None


def test_mergekit_defaults_are_not_the_papers():
    ties = MergeConfig.from_mergekit(two("ties", parameters={"weight": 1}))
    assert (ties.density, ties.scaling, ties.merge, ties.rescale) == (1.0, 1.0, "mean", "none")
    dare = MergeConfig.from_mergekit(two("dare_ties", parameters={"weight": 1}))
    assert (dare.combination, dare.normalize, dare.rescale) == ("ties", False, "norm")
    della = MergeConfig.from_mergekit(two("della", parameters={"weight": 1}))
    assert (della.combination, della.normalize, della.rescale, della.epsilon) == ("ties", True, "norm", 0.3)
    assert MergeConfig.from_mergekit(two("karcher")).max_iter == 10


def test_dare_has_mergekits_norm_and_not_the_inverse_density(models: Path):
    recipe = one("dare_linear", weight=1.0, density=0.3)
    before, after, expert = state("base"), merged(recipe), state("a")
    for name, base in before.items():
        vector = expert[name] - base
        torch.testing.assert_close((after[name] - base).abs().sum(), vector.abs().sum(), rtol=1e-4, atol=1e-4)


def test_breadcrumbs_by_default_changes_nothing(models: Path):
    expected = merged(two("task_arithmetic", parameters={"weight": 0.5}))
    found = merged(two("breadcrumbs", parameters={"weight": 0.5}))
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)


@pytest.mark.parametrize(
    ("flags", "granularity"),
    [
        ({}, "tensor"),
        ({"nuslerp_row_wise": True}, "tensor"),
        ({"nuslerp_flatten": False}, "row"),
        ({"nuslerp_flatten": False, "nuslerp_row_wise": True}, "column"),
    ],
)
def test_nuslerp_switches(flags: dict, granularity: str):
    assert MergeConfig.from_mergekit(two("nuslerp", parameters={"weight": 1, **flags})).granularity == granularity


def test_numbers_that_yaml_reads_as_text():
    text = "merge_method: ram\nbase_model: base\nmodels: [{model: a}]\nparameters: {epsilon: 1e-4}\n"
    assert MergeConfig.from_mergekit(text).epsilon == 1e-4


def test_the_base_model_of_a_method_without_task_vectors_is_one_of_the_models():
    config = MergeConfig.from_mergekit(two("karcher", base_model="base"))
    assert list(config.experts) == ["a", "b", "base_2"]
    assert config.base_model is None


# -- where mergekit is wrong ------------------------------------------------------------------------------------------


def test_small_task_vectors_keep_their_sce_weights_and_their_model_stock_ratio(saved: Path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base = LlamaForCausalLM.from_pretrained(saved / "base")
    base.save_pretrained("base")
    direction = perturbed(base, 1, 1e-5).state_dict()
    tuned = base.state_dict()
    for name, factor in (("a", 1.0), ("b", 3.0)):
        model = LlamaForCausalLM.from_pretrained(saved / "base")
        model.load_state_dict({key: value + factor * (direction[key] - value) for key, value in tuned.items()})
        model.save_pretrained(name)
    before, small, large = state("base"), state("a"), state("b")
    sce, stock = merged(two("sce")), merged(two("model_stock"))
    name = "model.embed_tokens.weight"
    first, second = small[name] - before[name], large[name] - before[name]
    expected = (first * first.square().sum() + second * second.square().sum()) / (
        first.square().sum() + second.square().sum()
    )
    torch.testing.assert_close(sce[name] - before[name], expected, rtol=1e-2, atol=1e-7)
    torch.testing.assert_close(stock[name] - before[name], (first + second) / 2, rtol=1e-2, atol=1e-7)


@pytest.mark.parametrize("shape", [(30, 1), (1, 1, 8), (1,)])
def test_della_takes_parameters_of_width_one(shape: tuple[int, ...]):
    base, experts = random_models(shape, 1)
    config = MergeConfig.from_mergekit(one("della", weight=1.0, density=0.5, epsilon=0.1))
    assert torch.isfinite(merge(config, base, experts)).all()


# -- values: scopes, gradients, filters -------------------------------------------------------------------------------


def test_the_most_specific_value_wins():
    source = {"model": "a", "layer_range": [0, 2], "parameters": {"weight": 4}}
    sources = [source, {"model": "b", "layer_range": [0, 2]}]
    module = {"slices": [{"sources": sources, "parameters": {"weight": 3}}], "parameters": {"weight": 2}}
    recipe = {"merge_method": "linear", "modules": {"default": module}, "parameters": {"weight": 1}}
    assert MergeConfig.from_mergekit(recipe).weights == {"a": 4, "b": 3}
    del module["slices"][0]["parameters"]
    assert MergeConfig.from_mergekit(recipe).weights == {"a": 4, "b": 2}
    del module["parameters"]
    assert MergeConfig.from_mergekit(recipe).weights == {"a": 4, "b": 1}


def test_a_filter_without_a_match_falls_through_to_the_next_place(models: Path):
    only_attention = [{"filter": "self_attn", "value": 3.0}]
    recipe = two("linear", {"weight": only_attention}, {"weight": 1.0}, parameters={"weight": 0.5})
    found, a, b = merged(recipe), state("a"), state("b")
    for name, weight in ((ATTENTION.format(1), 3.0), (MLP.format(1), 0.5)):
        torch.testing.assert_close(found[name], (weight * a[name] + b[name]) / (weight + 1.0))


def test_models_with_different_filters_each_follow_their_own(models: Path):
    first = [{"filter": "self_attn", "value": 0.2}, {"filter": "q_proj", "value": 9.0}, {"value": 0.6}]
    second = [{"filter": "q_proj", "value": 0.3}, {"filter": "self_attn", "value": 0.9}, {"value": 0.5}]
    found, a, b = merged(two("linear", {"weight": first}, {"weight": second})), state("a"), state("b")
    values = {ATTENTION.format(0): (0.2, 0.3), "model.layers.0.self_attn.k_proj.weight": (0.2, 0.9)}
    for name, (left, right) in (values | {MLP.format(0): (0.6, 0.5)}).items():
        torch.testing.assert_close(found[name], (left * a[name] + right * b[name]) / (left + right))


def test_a_filter_is_a_part_of_the_name_and_no_pattern():
    weight = [{"filter": "layers.1.", "value": 1}, {"value": 0}]
    assert MergeConfig.from_mergekit(two("linear", parameters={"weight": weight})).rules[0]["match"] == r"layers\.1\."


def test_a_gradient_runs_over_the_layers(models: Path):
    found, base, a = merged(one("slerp", t=[0.0, 0.2, 1.0])), state("base"), state("a")
    torch.testing.assert_close(found["model.embed_tokens.weight"], base["model.embed_tokens.weight"])
    torch.testing.assert_close(found[ATTENTION.format(0)], base[ATTENTION.format(0)])
    torch.testing.assert_close(found[ATTENTION.format(3)], a[ATTENTION.format(3)])
    # After the layers it has its last value, where mergekit goes back to the first.
    torch.testing.assert_close(found["lm_head.weight"], a["lm_head.weight"])


def test_a_gradient_starts_again_in_every_slice():
    sources = [[{"model": model, "layer_range": [first, first + 3]} for model in "ab"] for first in (0, 1)]
    slices = [
        {"sources": sources[0], "parameters": {"t": [0, 1]}},
        {"sources": sources[1], "parameters": {"t": [{"filter": "mlp", "value": 0.2}, {"value": [1, 0]}]}},
    ]
    config = MergeConfig.from_mergekit({"merge_method": "slerp", "base_model": "a", "slices": slices})
    assert config.t == {"gradient": [0, 0.5, 1, 1, 0.5, 0]}
    assert config.rules == [{"match": "mlp", "t": {"gradient": [0, 0.5, 1, 0.2, 0.2, 0.2]}}]


def test_a_slice_of_one_layer_has_the_last_value_of_a_gradient():
    slices = [{"sources": [{"model": model, "layer_range": [0, 1]} for model in "ab"]}]
    recipe = {"merge_method": "slerp", "base_model": "a", "slices": slices, "parameters": {"t": [0.1, 0.9]}}
    assert MergeConfig.from_mergekit(recipe).t == 0.9


def test_a_conversion_reaches_the_points_of_gradients_and_the_values_of_filters():
    epsilon = [{"filter": "mlp", "value": [0.1, 0.2]}, {"value": 0.05}]
    config = MergeConfig.from_mergekit(two("della", parameters={"weight": 1, "density": 0.5, "epsilon": epsilon}))
    assert config.rules == [{"match": "mlp", "epsilon": {"gradient": [0.2, 0.4]}}]
    assert config.epsilon == 0.1


# -- slices -----------------------------------------------------------------------------------------------------------


def test_a_frankenmerge_has_the_layers_of_its_slices(models: Path):
    config = MergeConfig.from_mergekit(RECIPES["frankenmerge"])
    merger = Merger.from_pretrained(config=config, dtype="float32")
    found, a, b = merger.merge().state_dict(), state("a"), state("b")
    assert merger.model.config.num_hidden_layers == 6
    for layer, (source, index) in enumerate([(a, 0), (a, 1), (a, 2), (b, 1), (b, 2), (b, 3)]):
        torch.testing.assert_close(found[MLP.format(layer)], source[MLP.format(index)])
    torch.testing.assert_close(found["model.embed_tokens.weight"], a["model.embed_tokens.weight"])
    torch.testing.assert_close(found["lm_head.weight"], b["lm_head.weight"])


def test_a_scale_reaches_only_the_layers_of_its_slice(models: Path):
    found, a = merged(RECIPES["zeroed duplicates"]), state("a")
    for layer, index in enumerate([0, 1, 2, 1, 2, 3]):
        factor = 0.0 if layer in (3, 4) else 1.0
        for name in ("model.layers.{}.self_attn.o_proj.weight", "model.layers.{}.mlp.down_proj.weight"):
            torch.testing.assert_close(found[name.format(layer)], factor * a[name.format(index)])
        torch.testing.assert_close(found[MLP.format(layer)], a[MLP.format(index)])


def test_slices_may_have_bases_of_their_own(models: Path):
    slices = [
        {"sources": [{"model": "base", "layer_range": [0, 2]}, {"model": "a", "layer_range": [0, 2]}]},
        {
            "sources": [{"model": "b", "layer_range": [2, 4]}, {"model": "c", "layer_range": [1, 3]}],
            "base_model": "c",
        },
    ]
    recipe = {"merge_method": "task_arithmetic", "base_model": "base", "slices": slices, "parameters": {"weight": 0.5}}
    found = merged(recipe)
    for layer, (base, expert, base_index, index) in {0: ("base", "a", 0, 0), 3: ("c", "b", 2, 3)}.items():
        expected = (state(base)[MLP.format(base_index)] + state(expert)[MLP.format(index)]) / 2
        torch.testing.assert_close(found[MLP.format(layer)], expected)


def test_modules_that_say_the_same_are_one():
    part = {"models": [{"model": "a"}, {"model": "b"}], "parameters": {"weight": 0.5}}
    recipe = {"merge_method": "linear", "modules": {"encoder": part, "decoder": dict(part)}}
    assert MergeConfig.from_mergekit(recipe).weights == 0.5
    recipe["modules"]["decoder"]["parameters"] = {"weight": 0.6}
    with pytest.raises(ConfigError, match="modules encoder, decoder are merged differently"):
        MergeConfig.from_mergekit(recipe)


# -- several documents ------------------------------------------------------------------------------------------------


def test_documents_are_models_of_other_documents(models: Path):
    documents = [
        two("linear", {"weight": 1}, {"weight": 1}, name="half", dtype="float32"),
        {
            "merge_method": "task_arithmetic",
            "base_model": "base",
            "models": [{"model": "half"}],
            "parameters": {"weight": 0.5},
        },
    ]
    found, base, a, b = merged(documents), state("base"), state("a"), state("b")
    for name, value in base.items():
        torch.testing.assert_close(found[name], (value + (a[name] + b[name]) / 2) / 2)


def test_when_all_documents_have_names_the_last_one_is_the_result():
    documents = [two("karcher", name="x"), {"merge_method": "karcher", "name": "y", "models": [{"model": "x"}]}]
    assert list(MergeConfig.from_mergekit(documents).experts) == ["x"]


@pytest.mark.parametrize(
    ("documents", "message"),
    [
        ([two("karcher"), two("karcher")], "several documents without a name"),
        ([two("karcher", name="x"), two("karcher", name="x")], "'x' .* is there twice"),
        ([two("karcher", name="x"), two("karcher")], "document 'x' is not used"),
        (
            [
                {"merge_method": "karcher", "name": "x", "models": [{"model": "y"}]},
                {"merge_method": "karcher", "name": "y", "models": [{"model": "x"}]},
                {"merge_method": "karcher", "models": [{"model": "x"}]},
            ],
            "x -> y -> x",
        ),
    ],
)
def test_documents_that_do_not_fit_together(documents: list, message: str):
    with pytest.raises(ConfigError, match=message):
        MergeConfig.from_mergekit(documents)


# -- dtype, tokenizer and chat template -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "dtype"),
    [
        ({}, None),
        ({"dtype": "bfloat16"}, "bfloat16"),
        ({"out_dtype": "float16"}, "float16"),
        ({"dtype": "float32", "out_dtype": "torch.bfloat16"}, "bfloat16"),
    ],
)
def test_dtype_is_that_of_the_result(keys: dict, dtype: str | None):
    assert MergeConfig.from_mergekit(two("karcher", **keys)).dtype == dtype


@pytest.mark.parametrize(
    ("keys", "tokenizer"),
    [
        ({}, None),
        ({"tokenizer_source": "base"}, "base"),
        ({"tokenizer_source": "b"}, "b"),
        ({"tokenizer": {"source": "base"}}, "base"),
        ({"tokenizer": {"source": {"model": {"path": "a"}}}}, "a"),
        ({"tokenizer_source": "union"}, "union"),
        ({"tokenizer": {}}, "union"),
    ],
)
def test_tokenizer_source_names_a_model_of_the_merge(keys: dict, tokenizer: str | None):
    assert MergeConfig.from_mergekit(two("sce", **keys)).tokenizer == tokenizer


def test_token_sources_are_translated():
    tokens = {
        "x": {"source": "a", "force": True},
        "y": {"source": {"kind": "model_token", "model": "b", "token_id": 3}},
        "z": {"source": {"kind": "zero"}},
        "u": {"source": {"kind": "model_token", "model": "base", "token": "x"}},
    }
    recipe = two("sce", tokenizer={"source": "base", "tokens": tokens, "pad_to_multiple_of": 8})
    config = MergeConfig.from_mergekit(recipe)
    assert config.pad_to_multiple_of == 8
    assert config.tokens == {
        "x": {"source": "a", "force": True},
        "y": {"source": {"model": "b", "token_id": 3}},
        "z": {"source": "zero"},
        "u": {"source": {"model": "base", "token": "x"}},
    }


@pytest.mark.parametrize("name", CHAT_TEMPLATES)
def test_built_in_chat_templates_render(name: str):
    tokenizer = BertTokenizer(vocab={"[PAD]": 0})
    tokenizer.chat_template = MergeConfig.from_mergekit(two("karcher", chat_template=name)).chat_template
    messages = [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}]
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert prompt.index("S") < prompt.index("U")
    answer = [*messages, {"role": "assistant", "content": "A"}]
    assert tokenizer.apply_chat_template(answer, tokenize=False).startswith(prompt.rstrip())


@pytest.mark.parametrize(
    ("given", "expected"), [("{{ 'own' }}", "{{ 'own' }}"), ("auto", "{{ 'b' }}"), (None, "{{ 'a' }}")]
)
def test_the_chat_template_is_written_for_the_tokenizer(models: Path, given: str | None, expected: str):
    recipe = two("karcher", chat_template=given) | {"models": [{"model": name} for name in "abc"]}
    Merger.from_pretrained(config=MergeConfig.from_mergekit(recipe)).save_pretrained("out")
    assert BertTokenizer.from_pretrained("out").chat_template == expected


# -- what is refused --------------------------------------------------------------------------------------------------


SLICE = {"sources": [{"model": "a", "layer_range": [0, 2]}]}
PAIR = {"sources": [{"model": model, "layer_range": [0, 2]} for model in "ab"]}
BAD = {
    "misspelt section": (two("karcher", paramters={"tol": 1}), "unknown key 'paramters'. Did you mean 'parameters'"),
    "misspelt dtype": (two("karcher", dtypee="float32"), "unknown key 'dtypee'. Did you mean 'dtype'"),
    "misspelt parameter": (
        two("ties", {"weight": 1, "densty": 0.5}),
        "unknown parameter 'densty'. Did you mean 'density'",
    ),
    "misspelt method": (two("karcher") | {"merge_method": "tyes"}, "no method of mergekit. Did you mean 'ties'"),
    "misspelt filter": (two("linear", {"weight": [{"fliter": "x", "value": 1}]}), "'fliter'. Did you mean 'filter'"),
    "misspelt range": (
        {"merge_method": "passthrough", "slices": [{"sources": [{"model": "a", "layers_range": [0, 1]}]}]},
        "'layers_range'. Did you mean 'layer_range'",
    ),
    "missing method": ({"models": [{"model": "a"}]}, "merge_method is None"),
    "no models": ({"merge_method": "linear"}, "exactly one of 'models', 'slices' and 'modules'"),
    "two lists": (two("karcher", slices=[SLICE]), "it has models and slices"),
    "required parameter": (two("linear", {"weight": 1}), "'weight' is required"),
    "no fallback": (
        one("slerp", t=[{"filter": "mlp", "value": 1}]),
        "'t' is required, and there is no value for parameters that match none of the filters",
    ),
    "no base": ({"merge_method": "ties", "models": [{"model": "a"}]}, "'ties' needs a base model: set base_model"),
    "base missing in a slice": (
        {"merge_method": "slerp", "base_model": "base", "slices": [PAIR], "parameters": {"t": 0}},
        "add the base model to the sources of the slice",
    ),
    "too many models": (two("slerp", parameters={"t": 0.5}), "'slerp' merges 1 model(s) beside the base model, got 2"),
    "too few models": (one("model_stock"), "merges at least 2 model(s) beside the base model, got 1"),
    "same model twice": (two("karcher") | {"models": [{"model": "a"}] * 2}, "'a' is listed twice"),
    "different numbers of sources": (
        {"merge_method": "linear", "slices": [SLICE, PAIR], "parameters": {"weight": 1}},
        "the slices have 1 and 2 sources",
    ),
    "different lengths": (
        {
            "merge_method": "linear",
            "slices": [{"sources": [{"model": "a", "layer_range": [0, 2]}, {"model": "b", "layer_range": [0, 3]}]}],
        },
        "the same number of layers",
    ),
    "different filters": (
        {
            "merge_method": "passthrough",
            "slices": [
                SLICE | {"parameters": {"scale": [{"filter": "mlp", "value": 0}, {"value": 1}]}},
                SLICE | {"parameters": {"scale": [{"filter": "self_attn", "value": 0}, {"value": 1}]}},
            ],
        },
        "the slices use different filters",
    ),
    "no number": (one("slerp", t="half"), "t must be a number"),
    "out of range": (two("ties", {"weight": 1, "density": -3}, {"weight": 1}), "density"),
    "switch over depth": (two("ties", parameters={"weight": 1, "normalize": [True, False]}), "cannot change over"),
    "nuslerp by name": (
        two("nuslerp", parameters={"weight": 1, "nuslerp_flatten": [{"filter": "mlp", "value": False}]}),
        "one value for the whole model",
    ),
    "dtype": (two("karcher", dtype="bf16"), "dtype"),
    "adapter": (two("karcher") | {"models": [{"model": "a+lora"}]}, "merge the adapter"),
    "architecture": (
        two("karcher") | {"models": [{"model": {"model": "a", "override_architecture": "X"}}]},
        "'override_architecture' is not supported",
    ),
    "token of no model": (
        two("karcher", tokenizer={"source": "a", "tokens": {"x": {"source": "z"}}}),
        "tokens['x'].source is 'z', which is none of the models",
    ),
    "token of a kind": (
        two("karcher", tokenizer={"tokens": {"x": {"source": {"kind": "random"}}}}),
        "must be 'model_token' or 'zero'",
    ),
    "padding": (two("karcher", tokenizer={"source": "a", "pad_to_multiple_of": -8}), "pad_to_multiple_of"),
    "tokenizer of another model": (two("karcher", tokenizer_source="z"), "none of the models whose first layers"),
    "tokenizer twice": (two("karcher", tokenizer_source="a", tokenizer={"source": "a"}), "keep one"),
    "chat template": (two("karcher", chat_template="chatlm"), "Did you mean 'chatml'"),
    "not a recipe": ("just text", "cannot be read"),
    "not a mapping": ([1, 2], "A mergekit recipe is"),
}


@pytest.mark.parametrize("title", BAD)
def test_bad_recipes_are_refused_with_the_remedy(title: str):
    recipe, message = BAD[title]
    with pytest.raises(ConfigError) as caught:
        MergeConfig.from_mergekit(recipe)
    assert message in str(caught.value)


def test_the_command_line_refuses_in_one_line(models: Path, capsys: pytest.CaptureFixture[str]):
    Path("recipe.yml").write_text("merge_method: linear\nmodelss: []\n", encoding="utf-8")
    code = run_cli(["run", "recipe.yml", "--out", "out"])
    assert_one_line_error(capsys, code, "unknown key 'modelss'", "did you mean 'models'")
    assert not Path("out").exists()


def test_a_filter_that_matches_no_parameter_is_refused_by_the_plan(models: Path):
    weight = [{"filter": "self_atn", "value": 1}, {"value": 0.5}]
    config = MergeConfig.from_mergekit(two("linear", parameters={"weight": weight}))
    with pytest.raises(PlanError, match="'self_atn' matches no parameter"):
        Merger.from_pretrained(config=config).check()


@pytest.mark.parametrize(
    ("recipe", "name"),
    [
        (two("ties", parameters={"weight": 1, "int8_mask": True}), "int8_mask"),
        (two("karcher", parameters={"weight": 1}), "weight"),
        (two("karcher", {"tol": 1e-3}), "tol"),
        (
            one("ties", weight=1) | {"models": [{"model": "a"}, {"model": "base", "parameters": {"weight": 1}}]},
            "weight",
        ),
        ({"merge_method": "passthrough", "slices": [SLICE | {"residual_weight": 0.5}]}, "residual_weight"),
    ],
)
def test_what_mergekit_ignores_is_accepted_with_a_warning(recipe: dict, name: str):
    with pytest.warns(UserWarning, match=f"'{name}' .* it is ignored, as in mergekit"):
        MergeConfig.from_mergekit(recipe)


def test_negative_weights_that_are_normalised_are_pointed_out():
    with pytest.warns(UserWarning, match="negative weights are normalised by the sum of"):
        MergeConfig.from_mergekit(two("ties", {"weight": 1}, {"weight": -0.5}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        MergeConfig.from_mergekit(two("dare_ties", {"weight": 1}, {"weight": -0.5}))
