"""The block-wise engine: same result however it runs, resumable, and clear about what it cannot do."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import datasets
import pytest
import torch
import transformers
from torch import Tensor
from transformers import AutoModelForSequenceClassification, BertForSequenceClassification, BertModel, TrainerCallback

from hf_merge import (
    AutoMergedModelForSequenceClassification,
    CalibrationData,
    ConfigError,
    Merger,
    NonFiniteError,
    PlanError,
    ProDistillArguments,
    ProDistillConfig,
    RegMeanConfig,
    RegMeanPlusPlusConfig,
    TaskArithmeticConfig,
    UnsupportedModelError,
)
from hf_merge.methods.prodistill import ProDistill

from ..testing_utils import make_bed
from ..zoo import ZOO, perturbed


CONFIG = ProDistillConfig(epochs=2)
TASKS = ("a", "b")


@pytest.fixture(scope="module")
def bed(tmp_path_factory: pytest.TempPathFactory):
    return make_bed(ZOO["bert"], tmp_path_factory.mktemp("bed"), names=TASKS)


def samples(count: int = 3) -> dict[str, list[dict[str, Tensor]]]:
    generator = torch.Generator().manual_seed(0)
    return {
        task: [{"input_ids": torch.randint(5, 99, (4 + index,), generator=generator)} for index in range(count)]
        for task in TASKS
    }


def merger_of(bed, config=CONFIG, **kwargs) -> Merger:
    return Merger.from_pretrained(bed.experts, config, base_model=bed.base, **kwargs)


def assert_equal_states(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


# -- one result, many ways --------------------------------------------------------------------------------------------


def test_saving_and_merging_in_memory_give_the_same(bed, tmp_path: Path):
    merged = merger_of(bed).merge(samples()).state_dict()
    merger_of(bed).save_pretrained(tmp_path / "out", data=samples(), max_shard_size="20KB")
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert_equal_states(merged, loaded.state_dict())
    assert not list(tmp_path.glob("out.*"))


@pytest.mark.parametrize("config", [CONFIG, RegMeanConfig(), RegMeanPlusPlusConfig()])
@pytest.mark.parametrize(
    "arguments", [{"activation_cache": "disk"}, {"activation_cache_limit": 5000}, {"self_check": False}]
)
def test_caches_and_checks_do_not_change_the_result(bed, config, arguments: dict):
    expected = merger_of(bed, config).merge(samples()).state_dict()
    found = merger_of(bed, config).merge(samples(), args=ProDistillArguments(**arguments)).state_dict()
    assert_equal_states(expected, found)


def test_rounded_caches_are_near(bed):
    expected = merger_of(bed).merge(samples())
    found = merger_of(bed).merge(samples(), args=ProDistillArguments(activation_cache_dtype="bfloat16"))
    inputs = ZOO["bert"].inputs()
    torch.testing.assert_close(found(**inputs).logits, expected(**inputs).logits, rtol=0, atol=2e-2)


def test_the_blocks_that_follow_see_the_rounded_model(bed):
    """In float16 the result is that of a merge whose every block was rounded before the next one was merged."""
    merged = merger_of(bed, dtype="float16").merge(samples())
    assert merged.dtype == torch.float16
    full = merger_of(bed).merge(samples()).state_dict()
    for name, tensor in merged.state_dict().items():
        torch.testing.assert_close(tensor.float(), full[name].float(), rtol=0, atol=5e-3, msg=name)


def test_experts_of_other_classes_share_the_backbone(tmp_path: Path):
    base = BertModel(ZOO["bert"].config()).eval()
    experts = {}
    for seed, (task, labels) in enumerate({"a": 2, "b": 5}.items(), start=1):
        model = BertForSequenceClassification(
            transformers.BertConfig(**{**base.config.to_dict(), "num_labels": labels})
        )
        model.bert.load_state_dict(perturbed(base, seed).state_dict())
        experts[task] = model.eval()
    merger = Merger.from_pretrained(experts, CONFIG, base_model=base)
    merger.save_pretrained(tmp_path / "out", data=samples())
    for task, labels in {"a": 2, "b": 5}.items():
        model = AutoMergedModelForSequenceClassification.from_pretrained(tmp_path / "out", task=task)
        assert model.classifier.out_features == labels
        assert torch.equal(model.classifier.weight, experts[task].classifier.weight)


def test_the_report_tells_of_every_block_and_parameter(bed):
    merger = merger_of(bed)
    merger.merge(samples())
    assert list(merger.report.blocks) == [f"bert.encoder.layer.{index}" for index in range(3)]
    assert set(merger.report.parameters) == set(merger.plan.outputs)
    row = merger.report.parameters["bert.encoder.layer.0.output.dense.weight"]
    assert row["method"] == "prodistill" and row["task_vector_norm"] > 0
    assert merger.report.parameters["bert.embeddings.word_embeddings.weight"]["method"] == "task_arithmetic"


def test_blocks_that_no_sample_reaches_are_noted():
    inputs = ZOO["qwen2-vl"].inputs()
    base = ZOO["qwen2-vl"].build()
    experts = {task: perturbed(base, seed) for seed, task in enumerate(TASKS, start=1)}
    merger = Merger.from_pretrained(experts, CONFIG, base_model=base)
    merger.merge(dict.fromkeys(TASKS, inputs))
    assert "No calibration sample reaches model.visual.blocks.0, model.visual.blocks.1" in merger.report.notes[0]


def test_then_is_applied_to_what_the_blocks_give(bed):
    config = ProDistillConfig(epochs=1, then=[{"merge_type": "wise_ft", "alpha": 0.0}])
    merged = merger_of(bed, config).merge(samples()).state_dict()
    base = bed.model_class.from_pretrained(bed.base).state_dict()
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, base[name], rtol=0, atol=1e-6, msg=name)


# -- resuming ---------------------------------------------------------------------------------------------------------


class _KillAtBlock(TrainerCallback):
    def __init__(self, block: int):
        self.block = block
        self.blocks: list[str] = []

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if not self.blocks or self.blocks[-1] is not model:
            self.blocks.append(model)
        if len(self.blocks) > self.block:
            raise KeyboardInterrupt


def test_a_killed_merge_goes_on_at_the_block_where_it_stopped(bed, tmp_path: Path):
    expected = merger_of(bed).merge(samples()).state_dict()
    with pytest.raises(KeyboardInterrupt):
        merger_of(bed).save_pretrained(tmp_path / "out", data=samples(), callbacks=[_KillAtBlock(2)])
    assert not (tmp_path / "out").exists()
    assert len(list((tmp_path / "out.work").glob("*.safetensors"))) == 2
    counter = _KillAtBlock(99)
    merger_of(bed).save_pretrained(tmp_path / "out", data=samples(), callbacks=[counter])
    assert len(counter.blocks) == 1
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").state_dict()
    assert_equal_states(expected, loaded)
    assert not list(tmp_path.glob("out.*"))


def test_a_work_folder_resumes_a_merge_in_memory_and_belongs_to_one_merge(bed, tmp_path: Path):
    arguments = {"args": ProDistillArguments(work_dir=str(tmp_path / "work"))}
    expected = merger_of(bed).merge(samples(), **arguments).state_dict()
    counter = _KillAtBlock(99)
    again = merger_of(bed).merge(samples(), callbacks=[counter], **arguments).state_dict()
    assert counter.blocks == []
    assert_equal_states(expected, again)
    merger_of(bed, ProDistillConfig(epochs=1)).merge(samples(), callbacks=[counter], **arguments)
    assert len(counter.blocks) == 3
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("...")
    with pytest.raises(OSError, match="holds other files"):
        merger_of(bed).merge(samples(), args=ProDistillArguments(work_dir=str(tmp_path / "other")))


def test_an_error_leaves_nothing_behind(bed, tmp_path: Path):
    class Fail(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            raise RuntimeError("broken callback")

    with pytest.raises(RuntimeError, match="broken callback"):
        merger_of(bed).save_pretrained(tmp_path / "out", data=samples(), callbacks=[Fail()])
    assert not list(tmp_path.iterdir())


# -- what is refused --------------------------------------------------------------------------------------------------


def test_problems_with_samples_are_all_told_before_anything_is_read(bed):
    with pytest.raises(PlanError, match="needs calibration samples: pass them by task"):
        merger_of(bed).merge()
    with pytest.raises(PlanError) as error:
        merger_of(bed).merge({"a": samples()["a"], "c": []})
    assert len(error.value.problems) == 2
    with pytest.raises(PlanError, match="'task_arithmetic' needs no data"):
        merger_of(bed, TaskArithmeticConfig()).merge(samples())
    with pytest.raises(PlanError, match="works on task vectors and needs the base model"):
        Merger.from_pretrained(bed.experts, CONFIG).merge(samples())
    with pytest.raises(PlanError, match="A rule chooses 'regmean', which needs data"):
        rules = [{"match": "dense", "merge_type": "regmean"}]
        merger_of(bed, ProDistillConfig(rules=rules)).merge(samples())


def test_augmentation_without_copies_is_told(bed):
    data = CalibrationData(samples(), augment=lambda task, arguments, generator: arguments)
    with pytest.raises(PlanError, match="takes every sample as it is: with 'augment', set copies=8"):
        merger_of(bed).merge(data)
    data = CalibrationData(samples(), augment=lambda task, arguments, generator: arguments, copies=2)
    merger_of(bed).merge(data)


def test_an_empty_task_is_named(bed):
    with pytest.raises(ConfigError, match="calibration samples of 'b' are empty"):
        merger_of(bed).merge({**samples(), "b": []})


def test_samples_that_are_too_long_are_named(bed):
    long = [{"input_ids": torch.full((600,), 7)}]
    with pytest.raises(
        ConfigError, match="Sample 0 of 'b' has 600 tokens in 'input_ids', but the model has 512 positions"
    ):
        merger_of(bed).merge({**samples(), "b": long})


def test_one_sample_of_a_dataset_with_labels_is_enough(bed):
    rows = [{"input_ids": [7, 8, 9], "label": 1}]
    merger_of(bed).merge(dict.fromkeys(TASKS, datasets.Dataset.from_list(rows)))
    merger_of(bed).merge(CalibrationData(samples(), num_samples=1))


def test_activations_that_are_not_finite_name_model_and_block():
    base = ZOO["bert"].build()
    broken = perturbed(base, 1)
    with torch.no_grad():
        broken.bert.encoder.layer[1].intermediate.dense.weight.fill_(float("inf"))
    merger = Merger.from_pretrained({"a": broken, "b": perturbed(base, 2)}, RegMeanConfig())
    with pytest.raises(NonFiniteError, match=r"The block 'bert.encoder.layer.1' of 'a' \(in memory\) gives NaN"):
        merger.merge(samples())


def test_albert_is_refused_with_the_reason():
    config = transformers.AlbertConfig(
        vocab_size=99,
        embedding_size=16,
        hidden_size=32,
        num_attention_heads=4,
        intermediate_size=64,
        num_hidden_layers=3,
    )
    base = transformers.AlbertForSequenceClassification(config).eval()
    experts = {task: perturbed(base, seed) for seed, task in enumerate(TASKS, start=1)}
    with pytest.raises(UnsupportedModelError, match="more than once in a forward"):
        Merger.from_pretrained(experts, CONFIG, base_model=base).merge(samples())


def test_samples_are_not_accepted_after_the_merge(bed, tmp_path: Path):
    merger = merger_of(bed)
    merger.merge(samples())
    with pytest.raises(ConfigError, match="The models are merged already"):
        merger.save_pretrained(tmp_path / "out", data=samples())
    merger.save_pretrained(tmp_path / "out")


# -- memory -----------------------------------------------------------------------------------------------------------


def test_experts_are_let_go_before_coefficients_are_trained(bed):
    """Only the task vectors are needed then."""
    kept = []

    class Watch(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            kept.extend(p.device.type for expert in blocks[-1].experts for p in expert.parameters())
            kept.extend(t.device.type for g in blocks[-1].parameters.values() for t in g.stored_experts)

    blocks = []
    merge_block = ProDistill.merge_block

    def remember(self, block):
        blocks.append(block)
        merge_block(self, block)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ProDistill, "merge_block", remember)
        merger_of(bed).merge(samples(), callbacks=[Watch])
    assert kept
    assert set(kept) == {"meta"}


_PEAK = """
    import sys, torch, transformers
    from hf_merge import Merger, ProDistillConfig
    from hf_merge.engines.report import peak_memory_bytes
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    folder, out = sys.argv[1:]
    rows = {"input_ids": torch.randint(5, 1000, (16, 256), generator=torch.Generator().manual_seed(0))}
    before = peak_memory_bytes()
    merger = Merger.from_pretrained(
        {"a": f"{folder}/a", "b": f"{folder}/b"}, ProDistillConfig(epochs=1, batch_size=2), base_model=f"{folder}/base"
    )
    merger.save_pretrained(out, data={"a": rows, "b": rows}, max_shard_size="50MB")
    print(peak_memory_bytes() - before)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_depth(tmp_path: Path):
    peaks = []
    for layers in (4, 8):
        config = transformers.LlamaConfig(
            vocab_size=1000,
            hidden_size=512,
            intermediate_size=1536,
            num_hidden_layers=layers,
            num_attention_heads=8,
            max_position_embeddings=256,
        )
        folder = tmp_path / str(layers)
        model = transformers.LlamaForCausalLM(config)
        model.save_pretrained(folder / "base")
        for seed, task in enumerate(TASKS, start=1):
            perturbed(model, seed, 0.001).save_pretrained(folder / task)
        script = [sys.executable, "-c", textwrap.dedent(_PEAK), str(folder), str(folder / "out")]
        peaks.append(int(subprocess.run(script, check=True, capture_output=True, text=True).stdout))
    assert peaks[0] > 10e6  # the merge is what the peak is of
    assert peaks[1] < 1.1 * peaks[0]
