"""Ensembles: the mean of logits and of probabilities, one model that runs all members, folders, recipes, and refusals."""

from __future__ import annotations

import copy
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from hf_merge import (
    AutoMergeConfig,
    AutoMergedModel,
    AutoMergedModelForSequenceClassification,
    CheckpointError,
    ConfigError,
    EnsembleConfig,
    LinearConfig,
    Merger,
    NonFiniteError,
    PlanError,
    evaluate_merge,
)
from hf_merge.engines import saving
from hf_merge.methods.ensemble import Ensemble

from ..testing_utils import assert_nothing_left, llama_bed, load_clean, run_cli
from ..zoo import ZOO, perturbed
from .helpers_models import bert, samples, single_batch


def experts(classes: int = 3, **settings) -> dict[str, PreTrainedModel]:
    return {name: bert(classes, seed, **settings) for seed, name in enumerate("abc", start=1)}


def inputs() -> dict[str, Tensor]:
    return single_batch(samples()["a"])


def logits_of(model: PreTrainedModel, **arguments) -> Tensor:
    with torch.no_grad():
        return model(**arguments).logits


# -- the formulas -----------------------------------------------------------------------------------------------------


def drawn(count: int, *shape: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(count)
    return [4 * torch.randn(shape, generator=generator) for _ in range(count)]


@pytest.mark.parametrize("count", [2, 3, 5])
def test_logits_are_averaged(count: int) -> None:
    logits = drawn(count, 7, 4)
    expected = sum(one.double() for one in logits) / count
    torch.testing.assert_close(Ensemble().combine(logits, EnsembleConfig()).double(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", [(6, 4), (3, 5, 4), (2, 4, 3, 3)], ids=["samples", "tokens", "maps"])
def test_probabilities_are_averaged(shape: tuple[int, ...]) -> None:
    logits, classes = drawn(3, *shape), 1 if len(shape) == 4 else -1
    expected = sum(one.double().softmax(classes) for one in logits) / 3
    found = Ensemble().combine(logits, EnsembleConfig(average="probabilities"))
    torch.testing.assert_close(found.double().softmax(classes), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(
        found.double().logsumexp(classes).abs().max(), torch.tensor(0.0).double(), rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("count", [2, 3, 6, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_logits_stay_as_they_are(count: int, dtype: torch.dtype) -> None:
    logits = drawn(2, 500, 5)[0].to(dtype)
    logits[0, 0], logits[1, 1] = -math.inf, torch.finfo(dtype).min  # tokens that are ruled out
    assert torch.equal(Ensemble().combine([logits] * count, EnsembleConfig()), logits)


@pytest.mark.parametrize("average", ["logits", "probabilities"])
def test_order_does_not_matter_and_one_impossible_token_is_no_nan(average: str) -> None:
    logits, config = drawn(4, 20, 6), EnsembleConfig(average=average)
    logits[2][3, 4] = -math.inf
    found, turned = Ensemble().combine(logits, config), Ensemble().combine(logits[::-1], config)
    assert not found.isnan().any()
    torch.testing.assert_close(found, turned, rtol=1e-5, atol=1e-5)


# -- one model --------------------------------------------------------------------------------------------------------


FAMILIES = ["bert", "bert-mlm", "bert-qa", "electra", "vit", "resnet", "wav2vec2", "gpt2", "llama", "mixtral", "t5"]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_kind_of_output_is_averaged(family: str, tmp_path: Path) -> None:
    entry = ZOO[family]
    base, batch = entry.build(), entry.inputs()
    members = {name: perturbed(base, seed, 0.1) for seed, name in enumerate("abc", start=1)}
    with torch.no_grad():
        alone = [member(**batch) for member in members.values()]
    Merger.from_pretrained(members, EnsembleConfig()).save_pretrained(tmp_path / "out")
    model = AutoMergedModel.from_pretrained(tmp_path / "out")
    assert type(model) is type(base)
    with torch.no_grad():
        found = model(**batch)
    names = [name for name in alone[0] if name.endswith("logits")]
    assert names and sorted(found) == sorted(names)
    for name in names:
        expected = sum(one[name].double() for one in alone) / 3
        torch.testing.assert_close(found[name].double(), expected, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(found[name], alone[0][name], rtol=1e-3)


def test_identical_experts_give_their_own_logits() -> None:
    one, batch = bert(3, 1), inputs()
    merger = Merger.from_pretrained({name: copy.deepcopy(one) for name in "abc"}, EnsembleConfig())
    assert torch.equal(logits_of(merger.merge(), **batch), logits_of(one, **batch))


def test_experts_are_not_changed_and_may_differ_in_size() -> None:
    from transformers import BertConfig, BertForSequenceClassification

    from .helpers_models import SIZE

    torch.manual_seed(3)
    wide = BertForSequenceClassification(BertConfig(num_labels=3, **SIZE | {"hidden_size": 24})).eval()
    models, batch = {"a": bert(3, 1), "wide": wide}, inputs()
    before = {name: logits_of(model, **batch) for name, model in models.items()}
    made = Merger.from_pretrained(models, EnsembleConfig()).merge()
    found = logits_of(made, **batch)
    torch.testing.assert_close(found, (before["a"] + before["wide"]) / 2)
    for name, model in models.items():
        assert torch.equal(logits_of(model, **batch), before[name])
        assert not hasattr(model, "ensemble")


def test_loss_is_that_of_the_averaged_logits() -> None:
    model, batch = Merger.from_pretrained(experts(), EnsembleConfig()).merge(), inputs()
    labels = torch.tensor([0, 1, 2, 0, 1, 2])
    found = model(**batch, labels=labels).loss
    torch.testing.assert_close(found, torch.nn.functional.cross_entropy(logits_of(model, **batch), labels))


@pytest.mark.parametrize("family", ["llama", "bert-mlm", "electra"])
def test_loss_of_tokens(family: str) -> None:
    entry = ZOO[family]
    base, batch = entry.build(), entry.inputs()
    members = {name: perturbed(base, seed, 0.1) for seed, name in enumerate("ab", start=1)}
    model = Merger.from_pretrained(members, EnsembleConfig()).merge()
    logits = logits_of(model, **batch)
    labels = batch["input_ids"] % logits.shape[-1]
    kept = (logits[:, :-1], labels[:, 1:]) if family == "llama" else (logits, labels)
    expected = torch.nn.functional.cross_entropy(kept[0].flatten(0, 1), kept[1].flatten())
    torch.testing.assert_close(model(**batch, labels=labels).loss, expected)


def test_a_loss_that_is_not_known_is_an_error() -> None:
    entry = ZOO["t5"]
    base, batch = entry.build(), entry.inputs()
    members = {name: perturbed(base, seed, 0.1) for seed, name in enumerate("ab", start=1)}
    model = Merger.from_pretrained(members, EnsembleConfig()).merge()
    with pytest.raises(ValueError, match="loss of a T5ForConditionalGeneration cannot be computed"):
        model(**batch, labels=batch["decoder_input_ids"])
    with pytest.raises(ValueError, match="takes no 'encoder_outputs'"):
        model.generate(input_ids=batch["input_ids"], max_new_tokens=2)


@pytest.mark.parametrize("beams", [1, 3])
def test_text_is_generated_by_all_members(beams: int) -> None:
    entry = ZOO["llama"]
    base, prompt = entry.build(), {key: value[:1] for key, value in entry.inputs().items()}
    members = {name: perturbed(base, seed, 0.3) for seed, name in enumerate("ab", start=1)}
    model = Merger.from_pretrained(members, EnsembleConfig()).merge()
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "num_beams": beams}
    found = model.generate(**prompt, **options, output_logits=True, return_dict_in_generate=True)
    if beams == 1:
        ids = found.sequences[:, :-1]
        expected = sum(logits_of(member, input_ids=ids) for member in members.values()) / 2
        torch.testing.assert_close(torch.stack(found.logits, 1), expected[:, -5:], rtol=1e-4, atol=1e-4)
    else:
        again = model.generate(**prompt, **options)
        assert torch.equal(found.sequences, again)
    with pytest.raises(ValueError, match="use_cache=False"):
        model(**prompt, use_cache=True)
    with pytest.raises(ValueError, match="takes no 'inputs_embeds'"):
        model(inputs_embeds=model.get_input_embeddings()(prompt["input_ids"]))
    with pytest.raises(ValueError, match="return_dict=False"):
        model(**prompt, return_dict=False)


# -- folders and recipes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("average", ["logits", "probabilities"])
def test_saved_streamed_and_merged_are_one_model(average: str, tmp_path: Path) -> None:
    models, batch = experts(), inputs()
    made = Merger.from_pretrained(models, EnsembleConfig(average=average))
    made.save_pretrained(tmp_path / "streamed", max_shard_size="20KB")
    expected = logits_of(made.merge(), **batch)
    made.save_pretrained(tmp_path / "merged")
    for name in ("streamed", "merged"):
        loaded = AutoMergedModelForSequenceClassification.from_pretrained(tmp_path / name)
        assert torch.equal(logits_of(loaded, **batch), expected)
        first = load_clean(AutoModelForSequenceClassification, tmp_path / name)
        assert torch.equal(logits_of(first, **batch), logits_of(models["a"], **batch))
        second = load_clean(AutoModelForSequenceClassification, tmp_path / name / "members/b")
        assert torch.equal(logits_of(second, **batch), logits_of(models["b"], **batch))
    assert len(list((tmp_path / "streamed/members/c").glob("model-*.safetensors"))) > 1
    card = (tmp_path / "merged/README.md").read_text()
    assert (
        "AutoMergedModel.from_pretrained" in card
        and "AutoMergedModel" not in (tmp_path / "merged/members/b/README.md").read_text()
    )
    assert torch.equal(logits_of(made.model_for("b"), **batch), expected)
    assert AutoMergeConfig.from_pretrained(tmp_path / "merged").average == average


def test_size_and_dtype_are_those_of_all_members(tmp_path: Path) -> None:
    made = Merger.from_pretrained(experts(), EnsembleConfig(), dtype="float16")
    plan = made.check()
    assert plan.nbytes == 3 * sum(
        value.numel() * 2 for value in bert(3, 1).state_dict().values() if value.is_floating_point()
    )
    assert plan.estimate.disk == plan.nbytes and plan.estimate.memory["cpu"] > 0
    assert made.estimate(tmp_path / "out").seconds > 0
    assert "member 'c': " in str(plan) and plan.to_dict()["members"] == ["b", "c"]
    made.save_pretrained(tmp_path / "out")
    loaded = AutoMergedModel.from_pretrained(tmp_path / "out")
    assert {value.dtype for value in loaded.parameters()} == {torch.float16}
    wide = AutoMergedModel.from_pretrained(tmp_path / "out", dtype="float32")
    assert {value.dtype for value in wide.parameters()} == {torch.float32}


def test_recipes_load_as_ensembles(tmp_path: Path) -> None:
    bed = llama_bed(tmp_path)
    batch = ZOO["llama"].inputs()
    config = EnsembleConfig()
    config.experts = {name: {"model": str(path)} for name, path in bed.experts.items()}
    config.save_pretrained(tmp_path / "recipe")
    expected = logits_of(AutoMergedModel.from_pretrained(bed.merge(EnsembleConfig(), base=False)), **batch)
    assert torch.equal(logits_of(AutoMergedModel.from_pretrained(tmp_path / "recipe"), **batch), expected)
    assert torch.equal(logits_of(AutoMergedModel.from_pretrained(config), **batch), expected)


def test_command_line_and_evaluation(tmp_path: Path, capsys) -> None:
    bed = llama_bed(tmp_path)
    assert run_cli(bed.command("--set", "average=probabilities", method="ensemble")) == 0
    rows = [{"input_ids": row} for row in ZOO["llama"].inputs()["input_ids"]]
    result = evaluate_merge(str(bed.out), {"text": rows})
    merger = Merger.from_pretrained(bed.experts, EnsembleConfig(average="probabilities"))
    assert result.tasks["text"].value == evaluate_merge(merger, {"text": rows}, experts=False).tasks["text"].value


def test_an_incomplete_ensemble_is_an_error(tmp_path: Path) -> None:
    Merger.from_pretrained(experts(), EnsembleConfig()).save_pretrained(tmp_path / "out")
    with pytest.raises(CheckpointError, match="keeps no heads per task"):
        AutoMergedModel.from_pretrained(tmp_path / "out", task="b")
    with pytest.raises(ConfigError, match="output_loading_info"):
        AutoMergedModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    shutil.rmtree(tmp_path / "out/members/b")
    with pytest.raises(CheckpointError, match=r"holds c, and '.*merge_config\.json' names b, c"):
        AutoMergedModel.from_pretrained(tmp_path / "out")
    shutil.rmtree(tmp_path / "out/members")
    with pytest.raises(CheckpointError, match="holds nothing"):
        AutoMergedModel.from_pretrained(tmp_path / "out")


def test_a_damaged_recipe_is_an_error(tmp_path: Path) -> None:
    Merger.from_pretrained(experts(), EnsembleConfig()).save_pretrained(tmp_path / "out")
    recipe = tmp_path / "out/merge_config.json"
    recipe.write_text(recipe.read_text()[:-20])
    with pytest.raises(ConfigError, match=r"merge_config\.json"):
        AutoMergedModel.from_pretrained(tmp_path / "out")


def test_a_copy_that_was_killed_is_begun_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bed, whole = llama_bed(tmp_path), saving.save_merge
    expected = {path.relative_to(bed.out): path.read_bytes() for path in weights(bed.merge(EnsembleConfig()))}

    def killed(ranks: Any, plan: Any, engine: Any, folder: Path, *sizes: Any) -> Any:
        if folder.name == "c":
            raise KeyboardInterrupt
        return whole(ranks, plan, engine, folder, *sizes)

    monkeypatch.setattr(saving, "save_merge", killed)
    with pytest.raises(KeyboardInterrupt):
        bed.merge(EnsembleConfig(), tmp_path / "again")
    assert not (tmp_path / "again").exists()
    monkeypatch.undo()
    bed.merge(EnsembleConfig(), tmp_path / "again")
    assert {
        path.relative_to(tmp_path / "again"): path.read_bytes() for path in weights(tmp_path / "again")
    } == expected
    assert_nothing_left(tmp_path / "again.partial")


def weights(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.safetensors"))


def test_nothing_is_left_when_a_member_cannot_be_copied(tmp_path: Path) -> None:
    models = experts()
    models["c"].classifier.weight.data[0, 0] = math.nan
    with pytest.raises(NonFiniteError, match=r"'classifier\.weight' of 'c' holds NaN"):
        Merger.from_pretrained(models, EnsembleConfig()).save_pretrained(tmp_path / "out")
    assert_nothing_left(tmp_path / "out")


# -- refusals ---------------------------------------------------------------------------------------------------------


def refusal(models: dict[str, PreTrainedModel], config: EnsembleConfig | None = None) -> str:
    with pytest.raises(PlanError) as caught:
        Merger.from_pretrained(models, config or EnsembleConfig()).check()
    return str(caught.value)


def test_experts_that_do_not_answer_the_same_question_are_refused() -> None:
    names = {"id2label": {0: "no", 1: "yes"}, "label2id": {"no": 0, "yes": 1}}
    assert "(3: LABEL_0, LABEL_1, LABEL_2 and 4: LABEL_0" in refusal({"a": bert(3, 1), "b": bert(4, 2)})
    found = refusal({"a": bert(2, 1), "b": bert(2, 2, **names)})
    assert "LABEL_0, LABEL_1 and 2: no, yes" in found and "each expert alone" in found
    assert "have one class" in refusal({"a": bert(3, 1), "b": ZOO["roberta"].build()})
    assert "at least 2 experts" in refusal({"a": bert(3, 1)})
    assert "BertModel, whose outputs are no logits" in refusal({name: bert(3, 1).bert for name in "ab"})
    wider = ZOO["llama"].config()
    wider.vocab_size += 1
    assert "tokens: logits have no mean" in refusal(
        {"a": ZOO["llama"].build(), "b": type(ZOO["llama"].build())(wider)}
    )


def test_probabilities_need_classes_that_exclude_each_other() -> None:
    config = EnsembleConfig(average="probabilities")
    for models in (experts(classes=1), experts(problem_type="multi_label_classification")):
        assert "exclude each other" in refusal(models, config)
        Merger.from_pretrained(models, EnsembleConfig()).check()
    Merger.from_pretrained(experts(), config).check()


@pytest.mark.parametrize(
    "field", [{"include": ["x"]}, {"heads": "per_task"}, {"then": [{"merge_type": "wise_ft"}]}, {"tokenizer": "union"}]
)
def test_settings_of_merged_weights_are_refused(field: dict) -> None:
    with pytest.raises(ConfigError, match=rf"EnsembleConfig\.{next(iter(field))} is about weights or heads"):
        EnsembleConfig(**field)


def test_an_ensemble_is_no_part_of_another_recipe(tmp_path: Path) -> None:
    bed = llama_bed(tmp_path)
    recipe = {"merge_type": "ensemble", "experts": {name: {"model": str(path)} for name, path in bed.experts.items()}}
    with pytest.raises(ConfigError, match="'ensemble' does not"):
        Merger.from_pretrained({"x": {"merge": recipe}, "y": bed.experts["a"]}, LinearConfig())
