"""Mixtures of experts: what they compute, what their routers are, their layout on disk, and what is refused."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_merge import AutoMergedModelForCausalLM, LinearConfig, Merger, MoeConfig, TiesConfig
from hf_merge.data.calibration import CalibrationData
from hf_merge.engines import streaming
from hf_merge.errors import ConfigError, NonFiniteError, PlanError

from ..testing_utils import llama_bed, load_clean, run_cli
from ..vocabularies import save_llama, train_bpe
from ..zoo import ZOO, perturbed, save_zoo_model, tensors_on_disk


FAMILIES = {"llama": "MixtralForCausalLM", "mistral": "MixtralForCausalLM", "qwen3": "Qwen3MoeForCausalLM"}
every_family = pytest.mark.parametrize("family", FAMILIES)


def experts_of(family: str, count: int = 3) -> dict[str, PreTrainedModel]:
    base = ZOO[family].build()
    return {name: perturbed(base, seed) for seed, name in enumerate("abcd"[:count], start=1)}


def saved(models: dict[str, PreTrainedModel], folder: Path) -> dict[str, Path]:
    return {name: save_zoo_model(model, folder / name) for name, model in models.items()}


def mean_of(models: dict[str, PreTrainedModel]) -> PreTrainedModel:
    return Merger.from_pretrained(dict(models), LinearConfig()).merge()


def samples(names: str = "abc") -> dict[str, list[dict[str, Tensor]]]:
    """Sequences of uneven length, so that batches are padded."""
    generator = torch.Generator().manual_seed(3)
    return {
        name: [{"input_ids": torch.randint(5, 99, (length,), generator=generator)} for length in (3, 7, 4, 5)]
        for name in names
    }


@every_family
@pytest.mark.parametrize("chosen", [1, 2, 3])
def test_identical_experts_give_the_dense_model(family: str, chosen: int, tmp_path: Path) -> None:
    dense = ZOO[family].build()
    folders = saved(dict.fromkeys("abc", dense), tmp_path)
    Merger.from_pretrained(folders, MoeConfig(experts_per_token=chosen, router_init_std=1.0)).save_pretrained(
        tmp_path / "out"
    )
    mixture = load_clean(getattr(transformers, FAMILIES[family]), tmp_path / "out")
    inputs = ZOO[family].inputs()
    torch.testing.assert_close(mixture(**inputs).logits, dense(**inputs).logits, rtol=0, atol=1e-5)


class Always(nn.Module):
    """A router that sends every token to one expert."""

    def __init__(self, expert: int):
        super().__init__()
        self.expert = expert

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        tokens = hidden.reshape(-1, hidden.shape[-1]).shape[0]
        return torch.zeros(tokens, 3), torch.ones(tokens, 1), torch.full((tokens, 1), self.expert)


@every_family
def test_a_token_sent_to_one_expert_runs_through_its_mlps(family: str) -> None:
    models = experts_of(family)
    mixture = Merger.from_pretrained(dict(models), MoeConfig(experts_per_token=1)).merge()
    inputs = ZOO[family].inputs()
    for index, expert in enumerate(models.values()):
        dense = copy.deepcopy(mean_of(models))
        for ours, theirs, mixed in zip(dense.model.layers, expert.model.layers, mixture.model.layers, strict=True):
            ours.mlp.load_state_dict(theirs.mlp.state_dict())
            mixed.mlp.gate = Always(index)
        torch.testing.assert_close(mixture(**inputs).logits, dense(**inputs).logits, rtol=0, atol=1e-5)


def literal_means(model: PreTrainedModel, rows: list[dict[str, Tensor]]) -> Tensor:
    """(layers, hidden): the mean over samples of the mean over tokens of what each MLP reads, one sample at a time."""
    seen: list[Tensor] = []
    handles = [
        layer.mlp.register_forward_pre_hook(lambda module, args: seen.append(args[0][0].mean(0)))
        for layer in model.model.layers
    ]
    with torch.no_grad():
        for row in rows:
            model(input_ids=row["input_ids"][None])
    for handle in handles:
        handle.remove()
    return torch.stack(seen).unflatten(0, (len(rows), -1)).mean(0)


def routers(mixture: PreTrainedModel) -> Tensor:
    """(layers, experts, hidden)."""
    return torch.stack([layer.mlp.gate.weight.detach() for layer in mixture.model.layers])


@every_family
@pytest.mark.parametrize("negatives", [None, "others"])
def test_hidden_routers_equal_the_formula(family: str, negatives: str | None) -> None:
    models, data = experts_of(family), samples()
    config = MoeConfig(gate_mode="hidden", negative_prompts=negatives, batch_size=3)
    mixture = Merger.from_pretrained(dict(models), config).merge(data)
    dense = mean_of(models)
    means = torch.stack([literal_means(dense, rows) for rows in data.values()], dim=1)
    if negatives == "others":
        means = torch.stack([means[:, e] - means[:, [o for o in range(3) if o != e]].mean(1) for e in range(3)], 1)
    expected = means / means.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(routers(mixture), expected, rtol=1e-4, atol=1e-5)


class Letters:
    """A tokenizer of texts over a small alphabet."""

    def __call__(self, texts: list[str], **kwargs) -> dict[str, list[list[int]]]:
        return {"input_ids": [[ord(letter) % 64 + 5 for letter in text] for text in texts]}


def test_negative_prompts_concern_the_experts_that_they_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_merge.data.samples._load", lambda model, auto_class: Letters())
    models = experts_of("llama")
    texts = {"a": ["abc", "hello"], "b": ["some text"], "c": ["other words", "x"]}
    config = MoeConfig(gate_mode="hidden", negative_prompts={"b": ["abc", "dim"]})
    found = routers(Merger.from_pretrained(dict(models), config).merge(texts))
    dense = mean_of(models)

    def means(lines: list[str]) -> Tensor:
        return literal_means(dense, [{"input_ids": torch.tensor(ids)} for ids in Letters()(lines)["input_ids"]])

    expected = {name: means(lines) for name, lines in texts.items()}
    expected["b"] = expected["b"] - means(["abc", "dim"])
    stacked = torch.stack(list(expected.values()), dim=1)
    torch.testing.assert_close(found, stacked / stacked.norm(dim=-1, keepdim=True), rtol=1e-4, atol=1e-5)


def test_experts_with_the_same_samples_are_remarked() -> None:
    rows = samples("a")["a"]
    merger = Merger.from_pretrained(experts_of("llama"), MoeConfig(gate_mode="hidden"))
    merger.merge({"a": rows, "b": rows, "c": samples()["c"]})
    remarks = [note for note in merger.report.notes if "hardly tell 'a' and 'b' apart in 3 layer(s)" in note]
    assert len(remarks) == 1
    assert merger.report.parameters["model.layers.0.mlp.gate.weight"]["largest_cosine"] == pytest.approx(1.0)


def test_random_routers_depend_on_seed_layer_and_expert_only() -> None:
    models = experts_of("llama")
    found = routers(Merger.from_pretrained(dict(models), MoeConfig(router_init_std=0.5)).merge())
    turned = dict(reversed(models.items()))
    again = routers(Merger.from_pretrained(turned, MoeConfig(router_init_std=0.5)).merge())
    assert torch.equal(found.flip(1), again)
    other = routers(Merger.from_pretrained(dict(models), MoeConfig(router_init_std=0.5, seed=1)).merge())
    assert not torch.isclose(found, other).any()
    assert found.flatten(0, 1).unique(dim=0).shape[0] == 9
    assert float(found.std()) == pytest.approx(0.5, rel=0.1)


def test_everything_but_the_mlps_is_merged_by_the_recipe_of_shared(tmp_path: Path) -> None:
    bed = llama_bed(tmp_path / "bed")
    recipe = {"merge_type": "ties", "density": 0.4}
    mixture = load_clean(
        transformers.MixtralForCausalLM, bed.merge(MoeConfig(shared=recipe, exclude=["lm_head"]), tmp_path / "moe")
    )
    dense = load_clean(
        bed.model_class, bed.merge(TiesConfig(density=0.4, exclude=["lm_head"]), tmp_path / "ties")
    ).state_dict()
    shared = {name: value for name, value in mixture.state_dict().items() if ".mlp." not in name}
    assert len(shared) == len([name for name in dense if ".mlp." not in name])
    assert all(torch.equal(value, dense[name]) for name, value in shared.items())
    experts = [load_clean(bed.model_class, folder).state_dict() for folder in bed.experts.values()]
    for layer in range(3):
        prefix = f"model.layers.{layer}.mlp."
        for index, expert in enumerate(experts):
            rows = [expert[f"{prefix}gate_proj.weight"], expert[f"{prefix}up_proj.weight"]]
            assert torch.equal(mixture.state_dict()[f"{prefix}experts.gate_up_proj"][index], torch.cat(rows))
            down = expert[f"{prefix}down_proj.weight"]
            assert torch.equal(mixture.state_dict()[f"{prefix}experts.down_proj"][index], down)


def test_shared_base_copies_the_base_model(tmp_path: Path) -> None:
    bed = llama_bed(tmp_path)
    mixture = load_clean(transformers.MixtralForCausalLM, bed.merge(MoeConfig(shared="base"))).state_dict()
    base = load_clean(bed.model_class, bed.base).state_dict()
    assert all(torch.equal(value, base[name]) for name, value in mixture.items() if ".mlp." not in name)


def test_shards_have_the_names_of_the_hub(tmp_path: Path) -> None:
    bed = llama_bed(tmp_path)
    out = bed.merge(MoeConfig(dtype="bfloat16", experts_per_token=3), max_shard_size="20KB")
    mixture = load_clean(transformers.MixtralForCausalLM, out, dtype="auto")
    assert mixture.dtype == torch.bfloat16
    assert mixture.config.num_local_experts == mixture.config.num_experts_per_tok == 3
    assert len(list(out.glob("model-*.safetensors"))) > 3
    mixture.save_pretrained(tmp_path / "again")
    ours, theirs = tensors_on_disk(out), tensors_on_disk(tmp_path / "again")
    assert "model.layers.0.block_sparse_moe.experts.2.w1.weight" in ours
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


def test_tied_embeddings_stay_tied(tmp_path: Path) -> None:
    config = ZOO["qwen3"].config()
    config.tie_word_embeddings = True
    dense = transformers.Qwen3ForCausalLM(config).eval()
    folders = saved({"a": dense, "b": dense}, tmp_path)
    Merger.from_pretrained(folders, MoeConfig()).save_pretrained(tmp_path / "out")
    mixture = load_clean(transformers.Qwen3MoeForCausalLM, tmp_path / "out")
    assert "lm_head.weight" not in tensors_on_disk(tmp_path / "out")
    inputs = ZOO["qwen3"].inputs()
    torch.testing.assert_close(mixture(**inputs).logits, dense(**inputs).logits, rtol=0, atol=1e-5)


def test_a_recipe_is_loaded_and_the_command_line_runs_it(tmp_path: Path) -> None:
    bed = llama_bed(tmp_path)
    assert run_cli(bed.command("--set", "experts_per_token=1", method="moe", base=False)) == 0
    written = load_clean(transformers.MixtralForCausalLM, bed.out).state_dict()
    recipe = MoeConfig.from_pretrained(bed.out)
    loaded = AutoMergedModelForCausalLM.from_pretrained(recipe).state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in written.items())


def test_adapters_are_experts(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    base = ZOO["llama"].build()
    save_zoo_model(base, tmp_path / "base")
    expected = {}
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        config = peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
        model = peft.get_peft_model(copy.deepcopy(base), config)
        model.save_pretrained(tmp_path / name)
        expected[name] = model.merge_and_unload().model.layers[1].mlp.up_proj.weight.detach()
    folders = {name: tmp_path / name for name in "ab"}
    mixture = Merger.from_pretrained(folders, MoeConfig(), base_model=tmp_path / "base").merge()
    found = mixture.model.layers[1].mlp.experts.gate_up_proj[:, 64:]
    torch.testing.assert_close(found, torch.stack(list(expected.values())), rtol=0, atol=1e-6)


def test_vocabularies_are_united_like_those_of_a_dense_merge(tmp_path: Path) -> None:
    texts = {"a": ["der Hund und die Katze"] * 3, "b": ["def hund(katze): return katze"] * 3}
    folders = {name: tmp_path / name for name in texts}
    for seed, (name, lines) in enumerate(texts.items()):
        save_llama(folders[name], train_bpe(lines, [f"<{name}>"]), seed)
    for config, out in (
        (MoeConfig(tokenizer="union", gate_mode="hidden"), "moe"),
        (LinearConfig(tokenizer="union"), "dense"),
    ):
        data = texts if out == "moe" else None
        Merger.from_pretrained(folders, config).save_pretrained(tmp_path / out, data=data)
    mixture = load_clean(transformers.MixtralForCausalLM, tmp_path / "moe")
    dense = load_clean(transformers.LlamaForCausalLM, tmp_path / "dense")
    assert torch.equal(mixture.model.embed_tokens.weight, dense.model.embed_tokens.weight)
    assert (tmp_path / "moe/tokenizer.json").read_bytes() == (tmp_path / "dense/tokenizer.json").read_bytes()


def test_a_killed_merge_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders, config = saved(experts_of("llama"), tmp_path), MoeConfig(gate_mode="hidden")

    def write(out: str) -> Path:
        merger = Merger.from_pretrained(folders, config)
        merger.save_pretrained(tmp_path / out, data=samples(), max_shard_size="20KB")
        return tmp_path / out

    whole, calls, on_disk = write("whole"), [], streaming.on_disk

    def dying(*args):
        calls.append(args)
        if len(calls) == 12:
            raise KeyboardInterrupt
        return on_disk(*args)

    monkeypatch.setattr(streaming, "on_disk", dying)
    with pytest.raises(KeyboardInterrupt):
        write("out")
    assert not (tmp_path / "out").exists() and list((tmp_path / "out.partial").glob("*.safetensors"))
    monkeypatch.setattr(streaming, "on_disk", on_disk)
    found, expected = tensors_on_disk(write("out")), tensors_on_disk(whole)
    assert found.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in found.items())


def test_hidden_routers_are_streamed_like_the_rest(tmp_path: Path) -> None:
    models = experts_of("llama")
    folders, config = saved(models, tmp_path), MoeConfig(gate_mode="hidden")
    data = CalibrationData(samples())
    Merger.from_pretrained(folders, config).save_pretrained(tmp_path / "out", data=data)
    written = load_clean(transformers.MixtralForCausalLM, tmp_path / "out").state_dict()
    merged = Merger.from_pretrained(dict(models), config).merge(data).state_dict()
    assert all(torch.equal(value, merged[name]) for name, value in written.items())


# -- refusals ---------------------------------------------------------------------------------------------------------


def problems(models: dict[str, PreTrainedModel], config: MoeConfig | None = None, **kwargs) -> str:
    return "\n".join(Merger.from_pretrained(dict(models), config or MoeConfig(), **kwargs).problems())


def altered(family: str, **changes) -> dict[str, PreTrainedModel]:
    config = ZOO[family].config()
    for key, value in changes.items():
        setattr(config, key, value)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return {name: getattr(transformers, ZOO[family].model_class)(config).eval() for name in "ab"}


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("llama", {"mlp_bias": True}, "no place for, such as 'model.layers.0.mlp.gate_proj.bias'"),
        ("llama", {"attention_bias": True}, "no place for, such as 'model.layers.0.self_attn.q_proj.bias'"),
        ("llama", {"hidden_act": "gelu"}, "its hidden_act is 'gelu'"),
        ("qwen3", {"layer_types": ["full_attention", "sliding_attention", "full_attention"]}, "sliding window"),
        ("gpt2", {}, "a GPT2LMHeadModel has no mixture of experts that computes the same; experts can be LlamaFor"),
        ("qwen2", {}, "a Qwen2ForCausalLM has no mixture"),
    ],
)
def test_what_a_mixture_has_no_place_for_is_refused(family: str, changes: dict, message: str) -> None:
    assert message in problems(altered(family, **changes))


def test_attention_biases_of_qwen3_are_kept() -> None:
    models = altered("qwen3", attention_bias=True)
    mixture = Merger.from_pretrained(dict(models), MoeConfig()).merge()
    assert "model.layers.0.self_attn.q_proj.bias" in mixture.state_dict()


def test_models_that_do_not_fit_each_other_are_refused() -> None:
    wide = {"a": altered("llama")["a"], "b": altered("llama", intermediate_size=48)["b"]}
    assert "The shapes of 'model.layers.0.mlp.gate_proj.weight' differ" in problems(wide)
    mixed = {"a": altered("llama")["a"], "b": altered("mistral")["b"]}
    assert "only models of one architecture" in problems(mixed)


def test_recipes_that_do_not_fit_the_experts_are_refused() -> None:
    models = experts_of("llama", 2)
    assert "experts_per_token=3 is more than the 2 experts" in problems(models, MoeConfig(experts_per_token=3))
    assert "shared='base'" in problems(models, MoeConfig(shared="base"))
    assert "needs at least 2 experts" in problems({"a": models["a"]}, MoeConfig(experts_per_token=1))
    misnamed = MoeConfig(gate_mode="hidden", negative_prompts={"aa": ["x"]})
    assert "negative_prompts names 'aa'" in problems(models, misnamed)
    assert "works on task vectors" in problems(models, MoeConfig(shared="ties"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rules": [{"match": "x", "merge_type": "ties"}]}, "MoeConfig.rules belongs into the recipe of 'shared'"),
        ({"then": [{"merge_type": "wise_ft"}]}, "MoeConfig.then belongs into"),
        ({"output": "adapter"}, "MoeConfig.output cannot be 'adapter'"),
        ({"shared": "regmean"}, "without data"),
        ({"shared": {"merge_type": "linear", "output": "adapter"}}, "leave 'output' out"),
        ({"shared": 3}, "MoeConfig.shared must be"),
        ({"shared": "no_such"}, "Unknown merge method 'no_such'"),
        ({"negative_prompts": "others"}, "is for gate_mode='hidden'"),
        ({"gate_mode": "hidden", "negative_prompts": {"a": []}}, "MoeConfig.negative_prompts must be"),
        ({"gate_mode": "hidden", "negative_prompts": "some"}, "MoeConfig.negative_prompts must be"),
    ],
)
def test_config_refuses(settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MoeConfig(**settings)


def test_samples_are_asked_for_where_they_are_needed() -> None:
    models = experts_of("llama", 2)
    with pytest.raises(PlanError, match="needs calibration samples"):
        Merger.from_pretrained(dict(models), MoeConfig(gate_mode="hidden")).merge()
    with pytest.raises(PlanError, match="needs no data"):
        Merger.from_pretrained(dict(models), MoeConfig()).merge(samples("ab"))


def test_a_mixture_is_no_expert_of_another_recipe(tmp_path: Path) -> None:
    folders = saved(experts_of("llama", 2), tmp_path)
    inner = MoeConfig(experts={name: str(folder) for name, folder in folders.items()})
    with pytest.raises(ConfigError, match="must merge parameter by parameter, without data; 'moe' does not"):
        Merger.from_pretrained({"x": {"merge": inner}, "a": folders["a"]}, LinearConfig())


def test_infinite_weights_leave_nothing_behind(tmp_path: Path) -> None:
    models = experts_of("llama", 2)
    models["b"].model.layers[1].mlp.up_proj.weight.data[0, 0] = float("inf")
    folders = saved(models, tmp_path)
    with pytest.raises(NonFiniteError, match=r"model.layers.1.mlp.up_proj.weight' of 'b'"):
        Merger.from_pretrained(folders, MoeConfig()).save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()
