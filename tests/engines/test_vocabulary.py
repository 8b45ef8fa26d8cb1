"""Models whose tokenizers differ: every row of the result comes from where the rules say."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaForMaskedLM,
)

from hf_merge import (
    GitRebasinConfig,
    LinearConfig,
    MergeConfig,
    Merger,
    PlanError,
    RegMeanConfig,
    TaskArithmeticConfig,
)
from hf_merge.checkpoints.tokenizers import ids_of, read_definition, unite
from hf_merge.modeling.vocabulary import map_token_ids

from ..testing_utils import load_clean
from ..vocabularies import (
    CODE,
    ENGLISH,
    GERMAN,
    SIZE,
    filled,
    rows_by_token,
    save_bert,
    save_llama,
    save_t5,
    train_bpe,
    unigram,
    word_piece,
)


TABLES = ("model.embed_tokens.weight", "lm_head.weight")
BERT_TABLES = ("bert.embeddings.word_embeddings.weight", "cls.predictions.bias")


@pytest.fixture(scope="module")
def llamas(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A base, a German and a code model over three BPE vocabularies that overlap."""
    folder = tmp_path_factory.mktemp("llamas")
    specials = {"base": ["<eos>"], "german": ["<eos>", "<de>"], "code": ["<eos>", "<fim>"]}
    texts = {"base": ENGLISH, "german": GERMAN, "code": CODE}
    for seed, name in enumerate(specials):
        save_llama(folder / name, train_bpe(texts[name], specials[name]), seed)
    return {name: folder / name for name in specials}


@pytest.fixture(scope="module")
def berts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A base and two masked language models over WordPiece vocabularies, one of them in another order."""
    folder = tmp_path_factory.mktemp("berts")
    words = ["the", "film", "##s", "was", "great", "free", "money"]
    vocabularies = {
        "base": words,
        "movies": [*words[::-1], "actor", "##ing"],
        "spam": [*words, "win", "actor", "cash"],
    }
    for seed, (name, vocabulary) in enumerate(vocabularies.items()):
        save_bert(folder / name, word_piece(vocabulary), seed)
    return {name: folder / name for name in vocabularies}


def state_of(folder: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def expected_rows(models: dict[str, Path], name: str, base: str | None, tokens: list[str]):
    rows = {model: rows_by_token(folder, state_of(folder)[name]) for model, folder in models.items()}
    return filled(rows, base, tokens)


def merge(models: dict[str, Path], config: MergeConfig, out: Path, base: str | None = "base", **kwargs) -> Path:
    experts = {name: path for name, path in models.items() if name != base}
    merger = Merger.from_pretrained(experts, config, base_model=models[base] if base else None, **kwargs)
    merger.save_pretrained(out)
    return out


def assert_rows(out: Path, name: str, expected: dict[str, Tensor]) -> None:
    found = rows_by_token(out, state_of(out)[name])
    assert found.keys() >= expected.keys()
    for token, row in expected.items():
        torch.testing.assert_close(found[token], row, atol=1e-5, rtol=1e-5, msg=lambda text, t=token: f"{t!r}: {text}")


# -- unions -----------------------------------------------------------------------------------------------------------


def test_union_of_bpe_without_a_base_is_the_mean_of_those_that_have_a_token(llamas, tmp_path):
    models = {name: llamas[name] for name in ("german", "code")}
    out = merge(models, LinearConfig(tokenizer="union"), tmp_path / "out", base=None)
    tokens = list(AutoTokenizer.from_pretrained(out).get_vocab())
    assert set(tokens) == set().union(*(AutoTokenizer.from_pretrained(path).get_vocab() for path in models.values()))
    for name in TABLES:
        rows = expected_rows(models, name, None, tokens)
        assert_rows(out, name, {token: (rows["german"][token] + rows["code"][token]) / 2 for token in tokens})


def test_union_of_bpe_by_task_vectors(llamas, tmp_path):
    out = merge(llamas, TaskArithmeticConfig(scaling=0.5, tokenizer="union"), tmp_path / "out")
    tokens = list(AutoTokenizer.from_pretrained(out).get_vocab())
    for name in TABLES:
        rows = expected_rows(llamas, name, "base", tokens)
        base, others = rows["base"], (rows["german"], rows["code"])
        assert_rows(out, name, {t: base[t] + 0.5 * sum(rows[t] - base[t] for rows in others) for t in tokens})


def test_union_of_word_piece(berts, tmp_path):
    out = merge(berts, TaskArithmeticConfig(scaling=0.5, tokenizer="union"), tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(out)
    tokens = list(tokenizer.get_vocab())
    assert len(tokens) == 16
    for name in BERT_TABLES:
        rows = expected_rows(berts, name, "base", tokens)
        base, others = rows["base"], (rows["movies"], rows["spam"])
        assert_rows(out, name, {t: base[t] + 0.5 * sum(rows[t] - base[t] for rows in others) for t in tokens})
    assert tokenizer.tokenize("win films filming") == ["win", "film", "##s", "film", "##ing"]


def test_union_of_unigram(tmp_path):
    pieces = {"a": ["▁the", "▁film", "s"], "b": ["▁the", "▁fuchs", "▁film"]}
    models = {name: tmp_path / name for name in pieces}
    for seed, name in enumerate(models):
        save_t5(models[name], unigram(pieces[name]), seed)
    out = merge(models, LinearConfig(tokenizer="union"), tmp_path / "out", base=None)
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.tokenize("the fuchs films") == ["▁the", "▁fuchs", "▁film", "s"]
    rows = expected_rows(models, "shared.weight", None, list(tokenizer.get_vocab()))
    assert_rows(out, "shared.weight", {token: (rows["a"][token] + rows["b"][token]) / 2 for token in rows["a"]})


def test_ids_of_the_first_tokenizer_stay(llamas, tmp_path):
    out = merge(llamas, LinearConfig(tokenizer="union"), tmp_path / "out")
    base, united = (AutoTokenizer.from_pretrained(path) for path in (llamas["base"], out))
    assert base.get_vocab().items() <= united.get_vocab().items()
    assert united.eos_token == base.eos_token


@pytest.mark.parametrize("text", ["the quick fox", "der fuchs ist schnell", "def quick(): return the fox<fim><de>"])
def test_texts_survive_encoding_and_decoding(llamas, tmp_path, text):
    tokenizer = AutoTokenizer.from_pretrained(merge(llamas, LinearConfig(tokenizer="union"), tmp_path / "out"))
    assert tokenizer.decode(tokenizer(text)["input_ids"], clean_up_tokenization_spaces=False) == text
    if text.endswith("<de>"):
        assert tokenizer.tokenize(text)[-2:] == ["<fim>", "<de>"]


def test_union_with_oneself_speaks_like_the_model(llamas, tmp_path):
    """A model merged with itself under a larger vocabulary gives the same logits for the tokens that it knows."""
    wide = tmp_path / "wide"
    save_llama(wide, train_bpe(GERMAN, ["<eos>", "<de>"]), 5)
    weights = LinearConfig(tokenizer="union", weights={"code": 1.0, "wide": 0.0})
    out = merge({"code": llamas["code"], "wide": wide}, weights, tmp_path / "out", base=None)
    alone, merged = LlamaForCausalLM.from_pretrained(llamas["code"]), load_clean(LlamaForCausalLM, out)
    tokenizer, united = (AutoTokenizer.from_pretrained(path) for path in (llamas["code"], out))
    tokens = list(tokenizer.get_vocab())
    inputs = [[table[token] for token in tokens[:9]] for table in (tokenizer.get_vocab(), united.get_vocab())]
    with torch.no_grad():
        ours = merged(torch.tensor([inputs[1]])).logits[0][:, united.convert_tokens_to_ids(tokens)]
        theirs = alone(torch.tensor([inputs[0]])).logits[0][:, tokenizer.convert_tokens_to_ids(tokens)]
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_a_merged_model_generates(llamas, tmp_path):
    out = merge(llamas, LinearConfig(tokenizer="union"), tmp_path / "out")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    generated = model.generate(**tokenizer("the fuchs", return_tensors="pt"), max_new_tokens=5, do_sample=False)
    assert generated.max() < len(tokenizer) == model.config.vocab_size
    assert tokenizer.decode(generated[0], clean_up_tokenization_spaces=False).startswith("the fuchs")


def test_two_kinds_of_tokenizers_have_no_union(llamas, tmp_path):
    save_llama(tmp_path / "words", word_piece(["the", "fox"]), 1)
    with pytest.raises(PlanError, match="BPE and a WordPiece tokenizer have no union"):
        merge({**llamas, "words": tmp_path / "words"}, LinearConfig(tokenizer="union"), tmp_path / "out")


# -- the tokenizer of one model ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("chosen", ["base", "german"])
def test_the_tokenizer_of_one_model(llamas, tmp_path, chosen):
    out = merge(llamas, TaskArithmeticConfig(scaling=0.5, tokenizer=chosen), tmp_path / "out")
    table = AutoTokenizer.from_pretrained(llamas[chosen]).get_vocab()
    assert AutoTokenizer.from_pretrained(out).get_vocab() == table
    for name in TABLES:
        rows = expected_rows(llamas, name, "base", list(table))
        base, others = rows["base"], (rows["german"], rows["code"])
        assert_rows(out, name, {t: base[t] + 0.5 * sum(rows[t] - base[t] for rows in others) for t in table})


def test_tokens_that_are_left_out_are_told(llamas):
    experts = {name: llamas[name] for name in ("german", "code")}
    merger = Merger.from_pretrained(experts, LinearConfig(tokenizer="german"))
    assert any("of 'code'" in note and "left out" in note for note in merger.check().notes)


def test_permuted_ids_are_merged_by_token(berts, tmp_path):
    """Two vocabularies of the same words in another order need no setting: rows follow the tokens of the first."""
    words = ["the", "film", "##s"]
    models = {"a": tmp_path / "a", "b": tmp_path / "b"}
    save_bert(models["a"], word_piece(words), 1)
    save_bert(models["b"], word_piece(words[::-1]), 2)
    merger = Merger.from_pretrained(models, LinearConfig())
    assert any("same tokens under other ids" in note for note in merger.check().notes)
    merger.save_pretrained(tmp_path / "out")
    for name in BERT_TABLES:
        rows = expected_rows(models, name, None, words)
        assert_rows(tmp_path / "out", name, {token: (rows["a"][token] + rows["b"][token]) / 2 for token in words})


def test_vocabularies_that_differ_need_a_choice(llamas, tmp_path):
    with pytest.raises(PlanError, match="tokenizer='union'"):
        merge(llamas, LinearConfig(), tmp_path / "out")


def test_equal_vocabularies_are_left_as_they_are(llamas, tmp_path):
    other = tmp_path / "other"
    save_llama(other, AutoTokenizer.from_pretrained(llamas["base"]), 7)
    experts = {"one": llamas["base"], "other": other}
    for tokenizer in (None, "one", "union"):
        merger = Merger.from_pretrained(experts, LinearConfig(tokenizer=tokenizer))
        assert merger.plan.experts == merger.experts


# -- single tokens, padding, ids --------------------------------------------------------------------------------------


def test_rows_without_a_token_stay_those_of_the_chosen_model(llamas, tmp_path):
    padded = tmp_path / "padded"
    tokenizer = AutoTokenizer.from_pretrained(llamas["german"])
    save_llama(padded, tokenizer, 3, rows=len(tokenizer) + 5)
    out = merge({"padded": padded, "code": llamas["code"]}, LinearConfig(tokenizer="padded"), tmp_path / "out", None)
    merged, own = (state_of(path)["lm_head.weight"] for path in (out, padded))
    assert len(merged) == len(tokenizer) + 5
    torch.testing.assert_close(merged[-5:], own[-5:])


def test_pad_to_multiple_of(llamas, tmp_path):
    out = merge(llamas, LinearConfig(tokenizer="base", pad_to_multiple_of=64), tmp_path / "out")
    model = load_clean(LlamaForCausalLM, out)
    count = len(AutoTokenizer.from_pretrained(llamas["base"]))
    assert model.config.vocab_size == 64 > count
    head = model.lm_head.weight
    torch.testing.assert_close(head[count:], head[:count].mean(0).expand(64 - count, -1))


def test_tokens_say_where_rows_come_from(llamas, tmp_path):
    tokens = {
        "<de>": {"source": "zero"},
        "<fim>": {"source": {"model": "base", "token": "the"}, "force": True},
        "fo": {},
        "<new>": {"source": {"model": "german", "token_id": 3}},
    }
    experts = {name: llamas[name] for name in ("german", "code")}
    config = LinearConfig(weights={"german": 0.5, "code": 0.5}, tokenizer="union", tokens=tokens)
    merger = Merger.from_pretrained(experts, config, base_model=llamas["base"])
    merger.save_pretrained(tmp_path / "out")
    for name in TABLES:
        german = rows_by_token(llamas["german"], state_of(llamas["german"])[name])
        base = rows_by_token(llamas["base"], state_of(llamas["base"])[name])
        third = state_of(llamas["german"])[name][3].double()
        assert_rows(tmp_path / "out", name, {"<de>": german["<de>"] / 2, "<fim>": base["the"], "<new>": third})
    assert AutoTokenizer.from_pretrained(tmp_path / "out").tokenize("fox<new>")[-1] == "<new>"


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ({"<new>": {}}, "no model has the token '<new>'"),
        ({"<de>": {"source": "nobody"}}, "names the model 'nobody'"),
        ({"<de>": {"source": "code"}}, "does not have the token '<de>'"),
        ({"<de>": {"source": {"model": "code", "token_id": 999}}}, "the id 999"),
    ],
)
def test_impossible_rules_for_tokens(llamas, tmp_path, tokens, message):
    with pytest.raises(PlanError, match=message):
        merge(llamas, LinearConfig(tokenizer="union", tokens=tokens), tmp_path / "out")


def test_plan_says_how_large_the_vocabulary_is(llamas):
    experts = {name: llamas[name] for name in ("german", "code")}
    merger = Merger.from_pretrained(experts, LinearConfig(tokenizer="union"), base_model=llamas["base"])
    tables = {name: AutoTokenizer.from_pretrained(llamas[name]).get_vocab() for name in ("base", "german", "code")}
    total, own = len(set().union(*tables.values())), len(tables["base"])
    note = (
        f"the result has {total} tokens in {total} rows: the {own} of 'base' under their ids, then {total - own} more"
    )
    assert note in merger.check().notes


def test_unknown_tokenizer_is_one_problem(llamas):
    """It is found where tokens are aligned, and where files are copied. What the problems leave out is not called unknown."""
    experts = {name: llamas[name] for name in ("german", "code")}
    merger = Merger.from_pretrained(experts, LinearConfig(tokenizer="nobody"))
    assert len([problem for problem in merger.problems() if "'nobody'" in problem]) == 1
    assert "has no such parameter" not in str(merger.plan)


def test_ids_in_configs_follow_their_tokens(llamas, tmp_path):
    moved = tmp_path / "moved"
    save_llama(moved, train_bpe(GERMAN, ["<de>", "<end>", "<eos>"]), 2, suppress_tokens=[0, 1])
    config = json.loads((moved / "config.json").read_text())
    (moved / "config.json").write_text(json.dumps(config | {"eos_token_id": 2, "pad_token_id": 1}))
    GenerationConfig(eos_token_id=[2, 0], pad_token_id=2).save_pretrained(moved)
    out = merge({"moved": moved, "base": llamas["base"]}, LinearConfig(tokenizer="base"), tmp_path / "out")
    eos = AutoTokenizer.from_pretrained(llamas["base"]).convert_tokens_to_ids("<eos>")
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.config.eos_token_id == eos
    assert model.generation_config.eos_token_id == [eos]  # '<de>' is no token of the base
    assert model.generation_config.pad_token_id == eos


def test_sequences_of_ids_follow_their_tokens():
    config = GenerationConfig(
        bad_words_ids=[[1, 2], [3]],
        force_words_ids=[[1], [[2], [3]]],
        forced_decoder_ids=[[1, 2], [2, None], [3, 3]],
        sequence_bias=[[[1, 2], 0.5], [[3], 2.0]],
    )
    assert map_token_ids(config, {1: 11, 2: 12}.get, None) == []
    assert config.bad_words_ids == [[11, 12]]
    assert config.force_words_ids == [[11], [[12]]]
    assert config.forced_decoder_ids == [[1, 12], [2, None]]
    assert config.sequence_bias == [[[11, 12], 0.5]]
    config = GenerationConfig(sequence_bias={(1, 2): 0.5, (3,): 2.0}, bad_words_ids=[[3]])
    assert map_token_ids(config, {1: 11, 2: 12}.get, None) == ["bad_words_ids"]
    assert config.sequence_bias == {(11, 12): 0.5}
    assert config.bad_words_ids is None


def test_an_id_without_a_token_becomes_no_other_token(llamas, tmp_path):
    moved, rows = tmp_path / "moved", 80
    tokenizer = train_bpe(GERMAN, ["<eos>"], 40)
    save_llama(moved, tokenizer, 2, rows=rows)
    nameless = len(tokenizer) + 1
    config = json.loads((moved / "config.json").read_text())
    (moved / "config.json").write_text(json.dumps(config | {"bos_token_id": nameless}))
    assert nameless in AutoTokenizer.from_pretrained(llamas["base"]).get_vocab().values()
    out = merge({"moved": moved, "base": llamas["base"]}, LinearConfig(tokenizer="base"), tmp_path / "out")
    assert AutoModelForCausalLM.from_pretrained(out).config.bos_token_id is None


def test_a_word_that_is_an_added_token_elsewhere(tmp_path):
    words, other = word_piece(["[unused1]", "film"]), word_piece(["film", "[unused1]"])
    other.add_tokens(["[unused1]"], special_tokens=True)
    for seed, (name, tokenizer) in enumerate({"a": words, "b": other}.items()):
        save_bert(tmp_path / name, tokenizer, seed)
    models = {name: tmp_path / name for name in "ab"}
    definitions = [read_definition(path) for path in models.values()]
    united = unite(definitions)
    assert ids_of(united) == words.get_vocab()
    assert {"[unused1]": 5}.items() <= {one["content"]: one["id"] for one in united["added_tokens"]}.items()
    out = merge(models, LinearConfig(tokenizer="union"), tmp_path / "out", base=None)
    assert AutoTokenizer.from_pretrained(out).tokenize("film [unused1]") == ["film", "[unused1]"]


def test_a_model_without_a_tokenizer_has_that_of_the_others(llamas, tmp_path):
    live = LlamaForCausalLM.from_pretrained(llamas["base"])
    merger = Merger.from_pretrained({"german": llamas["german"], "live": live}, LinearConfig(tokenizer="german"))
    with pytest.raises(PlanError, match="no tokenizer beside it"):
        merger.check()
    bare = tmp_path / "bare"
    shutil.copytree(llamas["german"], bare)
    for path in bare.glob("tokenizer*"):
        path.unlink()
    plan = Merger.from_pretrained(
        {"code": llamas["code"], "bare": bare, "german": llamas["german"]}, LinearConfig(tokenizer="german")
    )
    assert any("is taken to have that of 'german'" in note for note in plan.check().notes)


# -- compositions -----------------------------------------------------------------------------------------------------


def test_a_union_inside_of_a_recipe(llamas, tmp_path):
    experts = {"german": str(llamas["german"]), "english": str(llamas["base"])}
    inner = {"merge_type": "linear", "tokenizer": "union", "experts": experts}
    merger = Merger.from_pretrained(
        {"inner": {"merge": inner}, "code": llamas["code"]}, LinearConfig(tokenizer="union")
    )
    merger.save_pretrained(tmp_path / "out")
    assert set(AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab()) == set().union(
        *(AutoTokenizer.from_pretrained(path).get_vocab() for path in llamas.values())
    )
    load_clean(LlamaForCausalLM, tmp_path / "out")


def test_in_memory_and_on_disk_agree(llamas, tmp_path):
    config = TaskArithmeticConfig(tokenizer="union")
    experts = {name: llamas[name] for name in ("german", "code")}
    model = Merger.from_pretrained(experts, config, base_model=llamas["base"]).merge()
    folder = merge(llamas, config, tmp_path / "out")
    for name, tensor in load_clean(LlamaForCausalLM, folder).state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


def test_texts_are_read_by_the_tokenizer_of_the_result(llamas, tmp_path):
    """A method that looks at activations: all models see the same ids, those of the union."""
    experts = {name: llamas[name] for name in ("german", "code")}
    merger = Merger.from_pretrained(experts, RegMeanConfig(tokenizer="union"), base_model=llamas["base"])
    model = merger.merge({"german": list(GERMAN), "code": list(CODE)})
    assert model.config.vocab_size == len(
        set().union(*(AutoTokenizer.from_pretrained(p).get_vocab() for p in llamas.values()))
    )


def test_models_of_different_initialisation_are_merged_by_token_too(tmp_path):
    words = ["the", "film", "##s"]
    models = {"a": tmp_path / "a", "b": tmp_path / "b"}
    save_bert(models["a"], word_piece(words), 1)
    save_bert(models["b"], word_piece(words[::-1]), 2)
    merger = Merger.from_pretrained(models, GitRebasinConfig())
    assert any("same tokens under other ids" in note for note in merger.check().notes)
    merger.merge()


@pytest.mark.parametrize(
    ("wanted", "expected"), [("german", "{{ 'german' }}"), ("auto", "{{ 'code' }}"), (None, "{{ 'base' }}")]
)
def test_chat_templates(llamas, tmp_path, wanted, expected):
    models = {}
    for name, path in llamas.items():
        models[name] = tmp_path / name
        shutil.copytree(path, models[name])
        template = f"{{{{ '{name}' }}}}"
        (models[name] / "chat_template.jinja").write_text(template)
    models["more"] = tmp_path / "more"
    shutil.copytree(models["code"], models["more"])
    out = merge(models, LinearConfig(tokenizer="union", chat_template=wanted), tmp_path / "out")
    assert AutoTokenizer.from_pretrained(out).chat_template == expected


def test_positions_that_are_counted_from_the_padding_token(tmp_path):
    """RoBERTa's first position comes after the id of its padding token: that id has to stay."""
    models = {"a": tmp_path / "a", "b": tmp_path / "b"}
    for seed, (name, pad) in enumerate((("a", 1), ("b", 2))):
        special = ["<s>", "<pad>", "</s>"] if pad == 1 else ["<s>", "</s>", "<pad>"]
        tokenizer = train_bpe(ENGLISH, special)
        config = RobertaConfig(
            vocab_size=len(tokenizer), pad_token_id=pad, bos_token_id=0, eos_token_id=3 - pad, **SIZE
        )
        torch.manual_seed(seed)
        RobertaForMaskedLM(config).save_pretrained(models[name])
        tokenizer.save_pretrained(models[name])
    with pytest.raises(PlanError, match="counts positions from the id of its padding token"):
        Merger.from_pretrained(models, LinearConfig()).check()
