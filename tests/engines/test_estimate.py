"""What a plan says a merge takes, against what it takes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import textwrap
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from hf_merge import (
    DistillMergeConfig,
    KarcherConfig,
    KdConfig,
    LinearConfig,
    MergeConfig,
    Merger,
    MoeConfig,
    PlanError,
    ProDistillArguments,
    ProDistillConfig,
    RegMeanConfig,
    TiesConfig,
    TsvMConfig,
    WudiConfig,
    available_merge_methods,
)
from hf_merge.checkpoints.conversion import Converter
from hf_merge.checkpoints.source import ModelSource
from hf_merge.checkpoints.storage import SafetensorsStorage
from hf_merge.checkpoints.stored import StoredFile
from hf_merge.data.calibration import TaskSamples
from hf_merge.engines import estimate as estimates
from hf_merge.engines.pipeline import READ_AHEAD
from hf_merge.engines.placement import Placement
from hf_merge.engines.sample_sizes import Samples
from hf_merge.kinds import ParameterKind
from hf_merge.methods import trimming
from hf_merge.methods.base import LinearMethod, TensorMethod
from hf_merge.methods.karcher.method import Karcher
from hf_merge.methods.model_base import ModelMethod

from ..testing_utils import make_bed, run_cli
from ..zoo import ZOO


TENSOR_METHODS = sorted(
    name for name, entry in available_merge_methods().items() if issubclass(entry.method_cls, TensorMethod)
)


@pytest.fixture(scope="module")
def bed(tmp_path_factory: pytest.TempPathFactory):
    return make_bed(ZOO["llama"], tmp_path_factory.mktemp("bed"))


@pytest.fixture
def no_process():
    """The process itself takes nothing."""
    with (
        mock.patch.object(estimates, "process_memory", return_value=0),
        mock.patch("hf_merge.engines.estimate_blocks.process_memory", return_value=0),
        mock.patch("hf_merge.engines.estimate_models.process_memory", return_value=0),
    ):
        yield


def merger_of(bed, config, **kwargs) -> Merger:
    return Merger.from_pretrained(bed.experts, config, base_model=bed.base, **kwargs)


def streaming(merger: Merger, placement: Placement | None = None) -> dict[str, int]:
    plan = merger.plan
    groups = plan.target.save_groups(plan.outputs)
    return estimates.streaming_memory(plan, placement or Placement(), groups)


@pytest.mark.parametrize(
    ("config", "surveys"), [(WudiConfig(), 0), (TiesConfig(scope="model"), 2), (LinearConfig(include=["mlp"]), 0)]
)
def test_bytes_are_those_that_are_read_and_written(bed, tmp_path: Path, config, surveys: int) -> None:
    merger = merger_of(bed, config)
    expected = merger.check().estimate
    whole, parts = [], Counter()
    original, original_part = SafetensorsStorage.read, StoredFile.read

    def read(self, key: str) -> Tensor:
        whole.append(self.infos[key].nbytes)
        return original(self, key)

    def read_part(self, target: memoryview, start: int, what: str) -> None:
        parts[self.path, start, len(target)] += 1
        original_part(self, target, start, what)

    with mock.patch.object(SafetensorsStorage, "read", read), mock.patch.object(StoredFile, "read", read_part):
        merger.save_pretrained(tmp_path / "out")
    # What is read once more right away, comes from the system's cache.
    assert all(times > surveys for times in parts.values())
    assert expected.bytes_read == sum(whole) + (1 + surveys) * sum(nbytes for _, _, nbytes in parts)
    written = (tmp_path / "out" / "model.safetensors").stat().st_size
    header = int.from_bytes((tmp_path / "out" / "model.safetensors").read_bytes()[:8], "little") + 8
    assert expected.bytes_written == expected.disk == written - header


def test_no_weight_is_read(bed) -> None:
    failing = {"side_effect": AssertionError("read")}
    with mock.patch.object(SafetensorsStorage, "read", **failing), mock.patch.object(StoredFile, "read", **failing):
        estimate = merger_of(bed, TiesConfig(scope="model")).estimate()
    assert estimate.seconds > 0


def llama(layers: int, vocab: int, folder: Path) -> Path:
    config = LlamaConfig(
        vocab_size=vocab, hidden_size=8, intermediate_size=16, num_hidden_layers=layers, num_attention_heads=2
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


def test_memory_does_not_grow_with_layers(tmp_path: Path, no_process: None) -> None:
    found = []
    for layers in (1, 3):
        merger = Merger.from_pretrained([llama(layers, 9000, tmp_path / str(layers))] * 3, KarcherConfig())
        with mock.patch.object(estimates, "READ_AHEAD", 0):
            found.append(streaming(merger)["cpu"])
        assert found[-1] < streaming(merger)["cpu"]  # small models are read ahead as a whole
    assert found[0] == found[1]


def test_memory_is_that_of_the_loop(tmp_path: Path, no_process: None) -> None:
    """Two large parameters, one after another, and nothing worth reading ahead."""
    vocab = READ_AHEAD // 8
    config = LlamaConfig(vocab_size=vocab, hidden_size=2, num_hidden_layers=0, num_attention_heads=1, head_dim=2)
    shell = LlamaForCausalLM(config).to(torch.bfloat16)
    state = {
        name: torch.zeros(1, dtype=torch.bfloat16).expand(value.shape) for name, value in shell.state_dict().items()
    }
    shell.save_pretrained(tmp_path / "model")
    large = 2 * vocab * 2

    def parameters_held(models: list, method: MergeConfig) -> float:
        return streaming(Merger.from_pretrained(models, method))["cpu"] / large

    assert parameters_held([tmp_path / "model"] * 2, LinearConfig()) < 0.5  # pieces take little
    assert 2 <= parameters_held([shell, state], LinearConfig()) < 2.5  # the result as it is in memory and on disk
    with mock.patch.object(ModelSource, "stored", return_value=None):
        assert 2 <= parameters_held([tmp_path / "model"] * 2, LinearConfig()) < 2.5  # two experts
    # Of the second: two experts, its result, and the first one's result, which is being written.
    fixed, each = Karcher.working_copies
    working = 2 * (fixed + 2 * each)  # in float32
    assert 4 <= parameters_held([tmp_path / "model"] * 2, KarcherConfig()) - working < 4.5
    assert 2 <= parameters_held([shell, state], KarcherConfig()) - working < 2.5


def test_devices_hold_what_is_merged_there(bed, no_process: None) -> None:
    placement = Placement({"": "cpu", "model.layers.1": "meta"})
    memory = streaming(merger_of(bed, TsvMConfig()), placement)
    largest = max(p.info.nbytes for p in merger_of(bed, TsvMConfig()).plan.parameters if ".layers.1." in p.name)
    assert memory["meta"] > 4 * largest
    assert set(memory) == {"cpu", "meta"}


@pytest.mark.parametrize("name", TENSOR_METHODS)
def test_working_memory_grows_with_the_parameter(name: str) -> None:
    entry = available_merge_methods()[name]
    settings = entry.config_cls().resolve("x.weight", 0.5, ["a", "b"])
    kinds = [ParameterKind.LINEAR, ParameterKind.NORM]
    for kind in kinds + ([ParameterKind.EXPERT_LINEAR] if issubclass(entry.method_cls, LinearMethod) else []):
        sizes = [entry.method_cls.working_memory(kind, (8, side, side), 2, settings) for side in (64, 512)]
        assert 0 <= sizes[0] < sizes[1]


def test_blocks_need_a_work_folder_and_activations(bed, no_process: None) -> None:
    merger = merger_of(bed, ProDistillConfig(batch_size=2))
    without, few, many = (merger.estimate(samples=n, tokens=32) for n in (0, 4, 64))
    blocks = sum(p.info.nbytes for p in merger.plan.parameters if ".layers." in p.name)
    assert few.disk == many.disk == merger.plan.nbytes + blocks
    assert without.memory["cpu"] < few.memory["cpu"] < many.memory["cpu"]
    assert "samples" in without.notes[0] and not few.notes
    hidden = merger.plan.target.config.hidden_size
    more = 4 * 60 * 32 * hidden * 4 * len(bed.experts)  # in and out of two models, float32
    assert many.memory["cpu"] - few.memory["cpu"] == more
    on_disk = merger.estimate(samples=64, tokens=32, args=ProDistillArguments(activation_cache="disk"))
    assert on_disk.memory["cpu"] < few.memory["cpu"]
    assert on_disk.disk > many.disk


def leave_free(monkeypatch: pytest.MonkeyPatch, nbytes: int) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=nbytes))


def test_disk_has_to_hold_finished_blocks_too(bed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    merger = merger_of(bed, RegMeanConfig())
    blocks = sum(p.info.nbytes for p in merger.plan.parameters if ".layers." in p.name)
    leave_free(monkeypatch, merger.plan.nbytes + blocks - 1)
    (problem,) = merger.problems(tmp_path / "out")
    assert "Not enough disk space" in problem and "out.partial" in problem and "out.work" in problem
    assert merger_of(bed, LinearConfig()).problems(tmp_path / "out") == []
    leave_free(monkeypatch, merger.plan.nbytes + blocks)
    assert merger.problems(tmp_path / "out") == []


def test_what_a_killed_merge_left_needs_no_more_space(bed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    merger, out = merger_of(bed, RegMeanConfig()), tmp_path / "out"
    needed = merger.estimate().disk
    for folder, nbytes in (("out.work", 3000), ("out.partial", 2000)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "finished.safetensors").write_bytes(bytes(nbytes))
    leave_free(monkeypatch, needed - 5000)
    assert merger.problems(out) == []
    leave_free(monkeypatch, needed - 5001)
    assert len(merger.problems(out)) == 1


def test_disk_has_to_hold_the_activations_of_the_samples(bed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    merger, args = merger_of(bed, RegMeanConfig()), ProDistillArguments(activation_cache="disk")
    samples = {name: [{"input_ids": torch.arange(1, 33)}] * 64 for name in bed.experts}
    leave_free(monkeypatch, merger.estimate(samples=64, tokens=32, args=args).disk - 1)
    merges = tmp_path / "merges"
    merges.mkdir()
    assert merger.problems(merges / "out") == []
    with pytest.raises(PlanError, match="Not enough disk space"):
        merger.save_pretrained(merges / "out", data=samples, args=args)
    assert not list(merges.iterdir())
    merger.save_pretrained(merges / "out", data=samples)
    assert (merges / "out" / "config.json").exists()


def test_patches_of_images_are_counted() -> None:
    rows = [
        {"pixel_values": torch.zeros(3, 32, 16)},
        {"input_ids": torch.zeros(9)},
        {"input_features": torch.zeros(5, 5)},
    ]
    config = SimpleNamespace(patch_size=8)
    assert Samples.of(TaskSamples([rows[:1]], {}, [{}]), config) == Samples(1, 9)
    assert Samples.of(TaskSamples([rows[1:2] * 3, rows[1:2]], {}, [{}, {}]), config) == Samples(2, 9)
    assert Samples.of(TaskSamples([rows[2:]], {}, [{}]), config) == Samples(1, 0)


MODEL_METHODS = sorted(
    name for name, entry in available_merge_methods().items() if issubclass(entry.method_cls, ModelMethod)
)


@pytest.mark.parametrize("name", MODEL_METHODS)
def test_end_to_end_methods_hold_the_model_and_activations(bed, no_process: None, name: str, monkeypatch) -> None:
    for bins in (
        "HIGH_BINS",
        "LOW_BINS",
    ):  # the histograms that adamerging_pp begins with are larger than these models
        monkeypatch.setattr(trimming, bins, 0)
    merger = merger_of(bed, available_merge_methods()[name].config_cls())
    without, few, more, many = (merger.estimate(samples=n, tokens=16).memory["cpu"] for n in (0, 2, 4, 400))
    model = 4 * sum(parameter.info.numel for parameter in merger.plan.parameters)
    assert 4 * model < without < few
    assert "samples" in merger.estimate().notes[0] and not merger.estimate(samples=2, tokens=16).notes
    one_by_one = name == "fisher"
    assert (few == more) == one_by_one
    targets = 4 * 16 * merger.plan.target.config.hidden_size * len(bed.experts)
    keeps = name in ("distill_merge", "direct_distill")
    # Once a batch is full, what grows is what is kept of the experts' outputs.
    full = merger.estimate(samples=200, tokens=16).memory["cpu"]
    assert many - full == (200 * targets if keeps else 0)


def test_coefficients_of_elements_take_the_most(bed, no_process: None) -> None:
    found = {
        granularity: merger_of(bed, DistillMergeConfig(granularity=granularity)).check().estimate.memory["cpu"]
        for granularity in ("element", "tensor")
    }
    merged = sum(parameter.info.numel for parameter in merger_of(bed, DistillMergeConfig()).plan.parameters)
    assert found["element"] - found["tensor"] == 4 * len(bed.experts) * 4 * merged


def test_a_start_block_by_block_is_said(bed) -> None:
    notes = merger_of(bed, DistillMergeConfig(init="regmean_pp")).estimate(samples=2, tokens=16).notes
    assert notes == ["without the start, which 'regmean_pp' makes block by block"]


def test_end_to_end_methods_are_on_the_device_of_the_model(bed, no_process: None) -> None:
    on_cpu = merger_of(bed, DistillMergeConfig()).estimate(samples=2, tokens=16).memory
    on_both = merger_of(bed, DistillMergeConfig(), device_map="meta").estimate(samples=2, tokens=16).memory
    assert set(on_cpu) == {"cpu"} and set(on_both) == {"cpu", "meta"}
    assert 0 < on_both["cpu"] < on_both["meta"] <= on_cpu["cpu"]


def test_regmean_holds_gram_matrices(bed, no_process: None) -> None:
    merger = merger_of(bed, RegMeanConfig())
    mlp = max(p.info.shape[-1] for p in merger.plan.parameters if p.kind is ParameterKind.LINEAR)
    assert merger.check().estimate.memory["cpu"] > 8 * len(bed.experts) * mlp**2


@pytest.mark.parametrize("config", [KdConfig(), MoeConfig()], ids=lambda c: c.merge_type)
def test_what_is_not_estimated_is_said(bed, config) -> None:
    estimate = merger_of(bed, config).estimate()
    assert not estimate.memory and estimate.seconds is None
    assert estimate.bytes_read > 0
    assert "not estimated" in str(estimate)


def test_the_plan_shows_it(bed, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    merger = merger_of(bed, LinearConfig())
    assert "estimate" not in str(merger.plan)
    assert "peak memory" in str(merger.check())
    assert run_cli(["plan", *bed.command()[1:-1], str(tmp_path / "planned"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["estimate"]
    assert found["bytes_written"] == merger.plan.nbytes
    assert found["seconds"] > 0 and found["memory"]["cpu"] > 0
    assert not (tmp_path / "planned").exists()


def test_a_plan_with_problems_has_none(bed) -> None:
    merger = Merger.from_pretrained(bed.experts, WudiConfig(include=["nothing"]), base_model=bed.base)
    with pytest.raises(PlanError, match="matches no parameter"):
        merger.estimate()


def mixture(folder: Path, layers: int, experts: int = 8) -> Path:
    config = Qwen3MoeConfig(
        vocab_size=32,
        hidden_size=8,
        intermediate_size=8,
        moe_intermediate_size=4,
        num_hidden_layers=layers,
        num_experts=experts,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=4,
    )
    Qwen3MoeForCausalLM(config).save_pretrained(folder)
    return folder


def test_planning_is_linear_in_the_number_of_tensors(tmp_path: Path) -> None:
    """Calls of Python functions, of which a quadratic step makes four times as many for twice the tensors; what shapes the layers of
    experts have is asked once."""
    calls, conversions = [], []
    for layers in (4, 8, 16):
        folder = mixture(tmp_path / str(layers), layers)
        Merger.from_pretrained([folder] * 2, TiesConfig(), base_model=folder).check()  # what is loaded on first use
        count = 0

        def counting(frame, event, arg):
            nonlocal count
            count += event in ("call", "c_call")

        merger = Merger.from_pretrained([folder] * 2, TiesConfig(), base_model=folder)
        with mock.patch.object(Converter, "to_module", autospec=True, side_effect=Converter.to_module) as converted:
            sys.setprofile(counting)
            try:
                merger.check()
            finally:
                sys.setprofile(None)
        calls.append(count)
        conversions.append(converted.call_count)
    assert conversions[0] == conversions[2]
    assert calls[2] - calls[1] < 2.2 * (calls[1] - calls[0])


PEAK = """
    import json, sys
    import torch
    from hf_merge import Merger
    from hf_merge.engines.report import peak_memory_bytes
    from hf_merge.registry import get_merge_method

    folder, method = sys.argv[1:]
    config = get_merge_method(method).config_cls()
    merger = Merger.from_pretrained([f"{folder}/a", f"{folder}/b"], config, base_model=f"{folder}/base")
    data, size = None, {}
    if get_merge_method(method).method_cls.needs_data(config):
        merger.config.epochs, size = 2, {"samples": 4, "tokens": 64}
        rows = [{"input_ids": torch.arange(100 * i, 100 * i + 64)} for i in range(4)]
        data = {"a": rows, "b": rows}
    estimate = merger.estimate(**size) if size else merger.check().estimate  # without trials, which take memory, too
    expected = estimate.memory["cpu"]
    before = peak_memory_bytes()
    merger.save_pretrained(f"{folder}/{method}", data=data)
    print(json.dumps([expected, before, peak_memory_bytes()]))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("method", ["linear", "ties", "karcher", "tsv_m", "direct_distill", "adamerging"])
def test_peak_is_within_a_fifth(tmp_path: Path, method: str) -> None:
    config = LlamaConfig(
        vocab_size=64_000, hidden_size=1024, intermediate_size=1024, num_hidden_layers=1, num_attention_heads=8
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    for index, name in enumerate(("base", "a", "b")):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=1e-3 * (index > 0))
        model.save_pretrained(tmp_path / name)
    del model
    script = tmp_path / "peak.py"
    script.write_text(textwrap.dedent(PEAK))
    done = subprocess.run(
        [sys.executable, script, tmp_path, method], check=True, capture_output=True, text=True, cwd=Path.cwd()
    )
    expected, before, peak = json.loads(done.stdout.splitlines()[-1])
    if method in ("linear", "ties"):
        assert peak < before + 100e6  # one embedding takes 131 MB
    else:
        assert peak > before + 200e6  # the merge is what the peak is of
    assert expected == pytest.approx(peak, rel=0.2)
