"""Cases in which other merging tools lose weights in silence, crash or ignore what was asked, each with the right outcome here.

The list is the compatibility matrix of mergekit 0.1.5 on transformers 5, and the failures that its users report.
"""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    BertForSequenceClassification,
    GenerationConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    ViTImageProcessor,
)

from hf_merge import ConfigError, MergeConfig, MergeError, Merger, OutputError

from .testing_utils import Bed, assert_nothing_left, dense_average, load_clean, make_bed, run_process
from .zoo import VOCAB, ZOO, edit_json, perturbed, save_zoo_model, tensors_on_disk


def config_of(method: str = "linear", **settings) -> MergeConfig:
    return MergeConfig.from_merge_type(method, **settings)


def bed_for(family: str, folder: Path, **options) -> Bed:
    return make_bed(ZOO[family], folder, **options)


def assert_complete(bed: Bed, out: Path) -> None:
    """All names of the input, every float tensor merged, and clean to load."""
    given, written = tensors_on_disk(bed.base), tensors_on_disk(out)
    assert set(written) == set(given)
    untouched = [n for n, t in written.items() if t.is_floating_point() and torch.equal(t, given[n])]
    assert not untouched, f"not merged: {untouched[:5]}"
    load_clean(bed.model_class, out)


# -- tensors dropped or architectures refused -------------------------------------------------------------------------

ARCHITECTURES = {
    "vit": "32 of 40 tensors dropped, exit code 0",
    "dinov2": "q, k, v and o of every layer dropped, exit code 0",
    "swin": "13 tensors dropped and names rewritten, exit code 0",
    "bert-qa": "qa_outputs dropped because the class was unknown",
    "bert-mlm": "'bert.pooler.dense.weight required but not present'",
    "t5": "'DenseReluDense.wi_0.weight required': only v1.1 was known",
    "clip": "NotImplementedError: get_input_embeddings",
    "resnet": "NotImplementedError: get_input_embeddings",
    "wav2vec2": "NotImplementedError: get_input_embeddings",
}


@pytest.mark.parametrize("method", ["linear", "ties", "dare"])
@pytest.mark.parametrize("family", ARCHITECTURES)
def test_no_tensor_is_dropped_and_no_architecture_needs_a_table(family: str, method: str, tmp_path):
    bed = bed_for(family, tmp_path)
    assert_complete(bed, bed.merge(config_of(method)))


def test_slerp_of_two_vision_transformers(tmp_path):
    bed = bed_for("vit", tmp_path, names=["a", "b"])
    assert_complete(bed, bed.merge(config_of("slerp"), base=False))


def test_question_answering_head_is_kept(tmp_path):
    bed = bed_for("bert-qa", tmp_path)
    merged = load_clean(bed.model_class, bed.merge(config_of()))
    heads = [load_clean(bed.model_class, path).qa_outputs.weight for path in bed.experts.values()]
    assert torch.equal(merged.qa_outputs.weight, (heads[0] + heads[1] + heads[2]) / 3)


def test_batch_norm_statistics_are_merged_and_counters_copied(tmp_path):
    bed = Bed(tmp_path, type(ZOO["resnet"].build()), tmp_path / "base")
    base = ZOO["resnet"].build()
    save_zoo_model(base, bed.base)
    for seed, name in enumerate("abc", start=1):
        bed.experts[name] = save_zoo_model(perturbed(base, seed, only_float=False), tmp_path / name)
    written, given = tensors_on_disk(bed.merge(config_of())), tensors_on_disk(bed.base)
    means = [name for name in written if name.endswith("running_mean")]
    counters = [name for name in written if name.endswith("num_batches_tracked")]
    assert means and counters
    assert all(not torch.equal(written[name], given[name]) for name in means)
    assert all(torch.equal(written[name], given[name]) for name in counters), "integers come from the base"


@pytest.mark.parametrize("family", ["mixtral", "qwen3-moe", "qwen3-next"])
@pytest.mark.parametrize("names", ["original", "module"])
def test_mixture_of_experts_is_written_in_the_layout_of_the_input(family: str, names: str, tmp_path):
    bed = make_bed(ZOO[family], tmp_path, options=lambda _: {"names": names})
    out = bed.merge(config_of())
    assert set(tensors_on_disk(out)) == set(tensors_on_disk(bed.base))
    per_expert = any(".experts.0." in name for name in tensors_on_disk(out))
    assert per_expert == (names == "original")


def test_tied_head_is_not_written_twice(tmp_path):
    bed = bed_for("gemma2", tmp_path)
    assert "lm_head.weight" not in tensors_on_disk(bed.merge(config_of()))


# -- numbers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["linear", "task_arithmetic"])
def test_weights_that_sum_to_zero_are_refused(method: str, tmp_path):
    bed = bed_for("bert", tmp_path, names=["a", "b"])
    with pytest.raises(MergeError, match="sum to zero"):
        bed.merge(config_of(method, weights=[1.0, -1.0], normalize=True))
    assert_nothing_left(bed.out)


@pytest.mark.parametrize("family", ["vit", "bert"])
def test_della_with_class_token_and_one_label(family: str, tmp_path):
    entry = ZOO[family]
    config = entry.config()
    config.num_labels = 1
    bed = make_bed(entry, tmp_path, model=type(entry.build())(config))
    out = bed.merge(config_of("della"))
    assert all(torch.isfinite(tensor).all() for tensor in tensors_on_disk(out).values())
    load_clean(bed.model_class, out)


def test_bfloat16_is_averaged_in_float32(tmp_path):
    bed = bed_for("llama", tmp_path, dtype=torch.bfloat16)
    merged = load_clean(bed.model_class, bed.merge(config_of())).state_dict()
    states = [load_clean(bed.model_class, path).state_dict() for path in bed.experts.values()]
    assert all(torch.equal(merged[name], tensor) for name, tensor in dense_average(states).items())


def test_breadcrumbs_by_default_does_something_to_small_tensors(tmp_path):
    """Elsewhere the default density keeps everything, and an older version emptied every tensor of fewer than 100 elements."""
    bed = bed_for("bert", tmp_path)
    averaged = tensors_on_disk(bed.merge(config_of("task_arithmetic", scaling=1.0)))
    given, written = tensors_on_disk(bed.base), tensors_on_disk(bed.merge(config_of("breadcrumbs"), tmp_path / "out2"))
    bias = "bert.encoder.layer.0.output.LayerNorm.bias"
    assert not torch.equal(written[bias], given[bias])
    matrix = "bert.encoder.layer.0.intermediate.dense.weight"
    assert not torch.equal(written[matrix], averaged[matrix])


def test_model_stock_does_not_ignore_small_steps(tmp_path):
    """The interpolation is a ratio: scaling the task vectors leaves it alone. Elsewhere a clamp at 1e-6 sets it to zero."""
    base = ZOO["bert"].build()
    beds = []
    for index, scale in enumerate((1e-2, 1e-5)):
        bed = Bed(tmp_path / str(index), type(base), save_zoo_model(base, tmp_path / str(index) / "base"))
        common = perturbed(base, 50, scale)
        for seed, name in enumerate("abc", start=1):
            bed.experts[name] = save_zoo_model(perturbed(common, seed, scale / 10), bed.folder / name)
        beds.append(bed)
    name = "bert.encoder.layer.0.intermediate.dense.weight"

    def ratio(bed: Bed) -> float:
        given, written = tensors_on_disk(bed.base)[name], tensors_on_disk(bed.merge(config_of("model_stock")))[name]
        mean = sum(tensors_on_disk(path)[name] for path in bed.experts.values()) / 3
        return ((written - given).norm() / (mean - given).norm()).item()

    large, small = map(ratio, beds)
    assert large > 0.95
    assert small == pytest.approx(large, rel=0.02)


# -- what was asked is done or refused --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "nearest"), [("densty", "density"), ("exclud", "exclude"), ("ruls", "rules"), ("dtypee", "dtype")]
)
def test_misspelt_keys_are_refused_with_the_nearest(key: str, nearest: str):
    with pytest.raises(ConfigError, match=f"'{key}'.*Did you mean '{nearest}'"):
        MergeConfig.from_dict({"merge_type": "ties", key: 0.5})


def test_misspelt_method_is_refused_with_the_nearest():
    with pytest.raises(ConfigError, match="Did you mean 'ties'"):
        MergeConfig.from_dict({"merge_type": "tiez"})


def test_density_below_zero_is_refused_before_anything_runs():
    with pytest.raises(ConfigError, match="density.*-3"):
        config_of("ties", density=-3)


@pytest.mark.parametrize(
    "settings",
    [
        {"rules": [{"match": "attenshun", "weights": 0.5}]},
        {"include": ["attenshun"]},
        {"exclude": ["attenshun"]},
    ],
    ids=["rule", "include", "exclude"],
)
def test_patterns_that_match_nothing_are_refused(settings: dict, tmp_path):
    bed = bed_for("bert", tmp_path)
    with pytest.raises(MergeError, match="attenshun"):
        bed.merge(config_of(**settings))
    assert_nothing_left(bed.out)


def test_gradient_reaches_the_ends_of_the_model(tmp_path):
    """Elsewhere the output embedding and the final norm get the gradient's first value."""
    bed = bed_for("llama", tmp_path, names=["a", "b"])
    weights = {"a": {"gradient": [0.0, 1.0]}, "b": {"gradient": [1.0, 0.0]}}
    written = tensors_on_disk(bed.merge(config_of(weights=weights)))
    first, second = (tensors_on_disk(path) for path in bed.experts.values())
    for name in ("lm_head.weight", "model.norm.weight", "model.layers.2.mlp.up_proj.weight"):
        assert torch.equal(written[name], first[name]), name
    for name in ("model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight"):
        assert torch.equal(written[name], second[name]), name
    middle = "model.layers.1.mlp.up_proj.weight"
    torch.testing.assert_close(written[middle], (first[middle] + second[middle]) / 2)


@pytest.mark.parametrize(("method", "count"), [("slerp", 3), ("wise_ft", 2)])
def test_wrong_number_of_experts(method: str, count: int, tmp_path):
    bed = bed_for("bert", tmp_path, names=list("abc")[:count])
    with pytest.raises(MergeError, match=f"{count}"):
        bed.merge(config_of(method))
    assert_nothing_left(bed.out)


@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "wudi"])
def test_missing_base_is_refused(method: str, tmp_path):
    bed = bed_for("bert", tmp_path)
    with pytest.raises(MergeError, match="base"):
        bed.merge(config_of(method), base=False)
    assert_nothing_left(bed.out)


def test_all_problems_are_listed_at_once(tmp_path):
    bed = bed_for("bert", tmp_path)
    edit_json(bed.experts["a"] / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    path = bed.experts["b"] / "model.safetensors"
    tensors = load_file(path)
    del tensors["bert.encoder.layer.1.output.dense.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(MergeError) as caught:
        bed.merge(config_of(exclude=["attenshun"]))
    for fragment in ("quanti", "bert.encoder.layer.1.output.dense.weight", "attenshun"):
        assert fragment in str(caught.value)


# -- vocabularies -----------------------------------------------------------------------------------------------------


def save_tokenizer(folder: Path, words: list[str]) -> None:
    tokenizer = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, unk_token=words[0]))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token=words[0]).save_pretrained(folder)


WORDS = [f"word{index}" for index in range(VOCAB)]


def test_same_tokenizer_everywhere_is_carried(tmp_path):
    bed = bed_for("llama", tmp_path)
    for path in [bed.base, *bed.experts.values()]:
        save_tokenizer(path, WORDS)
    from transformers import AutoTokenizer

    assert AutoTokenizer.from_pretrained(bed.merge(config_of())).get_vocab()["word5"] == 5


def test_permuted_token_ids_are_merged_by_token(tmp_path):
    bed = bed_for("llama", tmp_path)
    for path in [bed.base, *bed.experts.values()]:
        save_tokenizer(path, WORDS)
    in_order = LlamaForCausalLM.from_pretrained(bed.merge(config_of(), tmp_path / "in_order"))
    moved = [0, *range(VOCAB - 1, 0, -1)]
    expert = LlamaForCausalLM.from_pretrained(bed.experts["b"])
    for table in (expert.model.embed_tokens.weight, expert.lm_head.weight):
        table.data = table.data[moved]
    expert.save_pretrained(bed.experts["b"])
    save_tokenizer(bed.experts["b"], [WORDS[row] for row in moved])
    merged = LlamaForCausalLM.from_pretrained(bed.merge(config_of()))
    assert torch.equal(merged.lm_head.weight, in_order.lm_head.weight)
    assert torch.equal(merged.model.embed_tokens.weight, in_order.model.embed_tokens.weight)


def test_vocabularies_of_other_tokens_are_refused(tmp_path):
    bed = bed_for("llama", tmp_path)
    for path in [bed.base, *bed.experts.values()]:
        save_tokenizer(path, WORDS)
    save_tokenizer(bed.experts["b"], [*WORDS[:-1], "another"])
    with pytest.raises(MergeError, match="token") as caught:
        bed.merge(config_of())
    assert "'b'" in str(caught.value)
    assert_nothing_left(bed.out)


def test_vocabularies_of_different_size_are_refused(tmp_path):
    bed = bed_for("llama", tmp_path)
    larger = ZOO["llama"].build()
    larger.resize_token_embeddings(VOCAB + 3)
    bed.experts["b"] = save_zoo_model(larger, tmp_path / "larger")
    with pytest.raises(MergeError, match="(?i)vocabular|embed_tokens") as caught:
        bed.merge(config_of())
    assert str(VOCAB + 3) in str(caught.value)
    assert_nothing_left(bed.out)


def test_no_tokenizer_anywhere_is_no_error(tmp_path, caplog):
    bed = bed_for("llama", tmp_path)
    with caplog.at_level(logging.ERROR):
        bed.merge(config_of())
    assert not caplog.records


# -- files beside the weights -----------------------------------------------------------------------------------------


def test_generation_config_is_carried(tmp_path):
    bed = bed_for("llama", tmp_path)
    for path in bed.experts.values():
        GenerationConfig(temperature=0.3, do_sample=True, top_p=0.9).save_pretrained(path)
    merged = LlamaForCausalLM.from_pretrained(bed.merge(config_of()))
    assert merged.generation_config.temperature == 0.3
    assert merged.generation_config.top_p == 0.9
    in_memory = Merger.from_pretrained(bed.experts, config_of(), base_model=bed.base).merge()
    assert in_memory.generation_config.temperature == 0.3


def test_image_processor_is_carried(tmp_path):
    bed = bed_for("vit", tmp_path)
    for path in bed.experts.values():
        ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(path)
    out = bed.merge(config_of())
    assert ViTImageProcessor.from_pretrained(out).size["height"] == 16


def test_config_comes_from_the_first_expert_whatever_the_hash_seed(tmp_path):
    bed = bed_for("llama", tmp_path)
    for length, path in zip((1024, 1111, 2048), bed.experts.values(), strict=True):
        edit_json(path / "config.json", max_position_embeddings=length)
    for order in (("a", "b", "c"), ("c", "b", "a")):
        experts = {name: bed.experts[name] for name in order}
        out = tmp_path / f"out-{order[0]}"
        Merger.from_pretrained(experts, config_of()).save_pretrained(out)
        donor = json.loads((bed.experts[order[0]] / "config.json").read_text())
        written = json.loads((out / "config.json").read_text())
        assert written["max_position_embeddings"] == donor["max_position_embeddings"]


@pytest.mark.slow
def test_output_does_not_depend_on_the_hash_seed(tmp_path):
    bed = bed_for("llama", tmp_path)
    contents = []
    for seed in ("0", "1"):
        command = [sys.executable, "-m", "hf_merge", *bed.command("--set", "density=0.3", method="dare")]
        assert run_process(command, PYTHONHASHSEED=seed).returncode == 0
        contents.append({p.name: p.read_bytes() for p in bed.out.glob("*") if p.suffix in {".safetensors", ".json"}})
        bed.out.rename(tmp_path / f"out{seed}")
    del contents[0]["merge_report.json"], contents[1]["merge_report.json"]  # holds times
    assert contents[0] == contents[1]


# -- the output folder ------------------------------------------------------------------------------------------------


def test_second_merge_into_the_same_folder_is_refused(tmp_path):
    bed = bed_for("llama", tmp_path)
    out = bed.merge(config_of(), max_shard_size="30KB")
    before = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}
    with pytest.raises((OutputError, MergeError), match="empty|exists"):
        bed.merge(config_of("ties"))
    assert {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()} == before


def test_failed_merge_leaves_no_empty_folder(tmp_path):
    bed = bed_for("bert", tmp_path)
    (bed.experts["c"] / "config.json").unlink()
    with pytest.raises(MergeError):
        bed.merge(config_of())
    assert_nothing_left(bed.out)


def test_an_empty_folder_may_be_the_output(tmp_path):
    bed = bed_for("bert", tmp_path)
    bed.out.mkdir()
    load_clean(BertForSequenceClassification, bed.merge(config_of()))


# -- inputs of other kinds --------------------------------------------------------------------------------------------


def test_float8_weights_are_refused(tmp_path):
    bed = bed_for("llama", tmp_path)
    path = bed.experts["b"] / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.0.mlp.up_proj.weight"
    save_file(tensors | {name: tensors[name].to(torch.float8_e4m3fn)}, path, metadata={"format": "pt"})
    with pytest.raises(MergeError, match="(?i)float8|quanti"):
        bed.merge(config_of())
    assert_nothing_left(bed.out)


def test_int8_weights_are_refused(tmp_path):
    bed = bed_for("llama", tmp_path)
    for folder in [bed.base, *bed.experts.values()]:
        path = folder / "model.safetensors"
        tensors = load_file(path)
        name = "model.layers.0.mlp.up_proj.weight"
        save_file(tensors | {name: tensors[name].to(torch.int8)}, path, metadata={"format": "pt"})
    with pytest.raises(MergeError, match="(?i)int8|quanti"):
        bed.merge(config_of())
    assert_nothing_left(bed.out)


def test_quantised_config_is_refused(tmp_path):
    bed = bed_for("llama", tmp_path)
    edit_json(bed.experts["b"] / "config.json", quantization_config={"quant_method": "awq", "bits": 4})
    with pytest.raises(MergeError, match="(?i)quanti"):
        bed.merge(config_of())
    assert_nothing_left(bed.out)


def test_merge_does_not_change_models_in_memory():
    base = ZOO["bert"].build()
    experts = {name: perturbed(base, seed) for seed, name in enumerate("abc", start=1)}
    before = {name: {k: v.clone() for k, v in model.state_dict().items()} for name, model in experts.items()}
    merged = Merger.from_pretrained(experts, config_of("ties"), base_model=base).merge()
    for parameter in merged.parameters():
        parameter.data.zero_()
    for name, model in experts.items():
        assert all(torch.equal(tensor, before[name][key]) for key, tensor in model.state_dict().items())
