"""Several devices in one process: the bytes of one CPU, whichever is first; errors; and parameters that are too large for a device."""

from __future__ import annotations

import json
import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hf_merge import DareConfig, LinearConfig, MergeConfig, Merger, MoeConfig, TiesConfig, TsvMConfig, WudiConfig
from hf_merge.checkpoints import shards
from hf_merge.checkpoints.names import SaveGroup
from hf_merge.checkpoints.source import ModelSource
from hf_merge.engines import estimate, pipeline, transfer
from hf_merge.engines.placement import CPU, Placement, balance
from hf_merge.engines.transfer import Transfer
from hf_merge.errors import NonFiniteError

from ..adapters.helpers import KINDS, make_adapters
from ..processes import contents
from ..testing_utils import Bed, assert_nothing_left, llama_bed, make_bed
from ..zoo import ZOO


METHODS = {
    "linear": LinearConfig(),
    "ties over the model": TiesConfig(scope="model", density=0.3),
    "dare": DareConfig(combination="ties", rescale="norm"),
    "tsv_m": TsvMConfig(),
    "wudi with equal norms": WudiConfig(equalize_norms=True),
    "mixture": MoeConfig(gate_mode="random"),
}


@pytest.fixture(scope="module")
def bed(tmp_path_factory: pytest.TempPathFactory) -> Bed:
    return llama_bed(tmp_path_factory.mktemp("devices"))


@dataclass
class Devices:
    """Stand for accelerators: what is sent there is noted, and stays where it is."""

    sent: dict[torch.device, list[int]] = field(default_factory=dict)
    emptied: list[torch.device] = field(default_factory=list)
    brought_back: list[int] = field(default_factory=list)
    meeting: threading.Barrier | None = None
    fits: Callable[[int], bool] = lambda nbytes: True
    fits_ahead: Callable[[int], bool] = lambda nbytes: True

    def arrive(self, device: torch.device, tensor: Tensor, fits: Callable[[int], bool]) -> Tensor:
        if device != CPU:
            if not fits(tensor.nbytes):
                raise torch.OutOfMemoryError("tried to allocate")
            if self.meeting is not None and device not in self.sent:
                self.meeting.wait(30)
            self.sent.setdefault(device, []).append(tensor.nbytes)
        else:
            self.brought_back.append(tensor.nbytes)
        return tensor

    def transfer_class(self) -> type[Transfer]:
        devices = self

        class FakeTransfer(Transfer):
            def send(self, tensor: Tensor) -> Tensor:
                return devices.arrive(self.device, tensor, devices.fits)

            def send_ahead(self, tensor: Tensor) -> Tensor:
                return devices.arrive(self.device, tensor, lambda n: devices.fits(n) and devices.fits_ahead(n))

            def empty_cache(self) -> None:
                devices.emptied.append(self.device)

        return FakeTransfer


def pretend(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: count)
    monkeypatch.delenv("LOCAL_RANK", raising=False)


@pytest.fixture
def devices(monkeypatch: pytest.MonkeyPatch) -> Devices:
    """Three accelerators."""
    found = Devices()
    pretend(monkeypatch, 3)
    monkeypatch.setattr(pipeline, "Transfer", found.transfer_class())
    return found


CUDA = [torch.device("cuda", index) for index in range(3)]


def merge(bed: Bed, config: MergeConfig, out: Path, device_map="auto", shard_size: str = "20KB", **kwargs) -> dict:
    """Merges into a folder and returns its report."""
    merger = Merger.from_pretrained(bed.experts, config, base_model=bed.base, device_map=device_map)
    merger.save_pretrained(out, max_shard_size=shard_size, **kwargs)
    return json.loads((out / "merge_report.json").read_text(encoding="utf-8"))


# -- where ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "loads"),
    [([], [0, 0]), ([5], [5, 0]), ([3, 3, 3, 3], [6, 6]), ([1, 1, 1, 9], [9, 3]), ([2, 7, 4, 6, 5], [13, 11])],
)
def test_balance(sizes: list[int], loads: list[int]):
    chosen = balance(sizes, CUDA[:2])
    assert len(chosen) == len(sizes)
    assert [
        sum(size for size, one in zip(sizes, chosen, strict=True) if one == device) for device in CUDA[:2]
    ] == loads


def test_auto_divides_a_plan_by_bytes(bed: Bed, monkeypatch):
    pretend(monkeypatch, 3)
    plan = Merger.from_pretrained(bed.experts, LinearConfig(exclude=["norm"]), base_model=bed.base).plan
    placement = Placement("auto").over(plan, plan.groups)
    copied = {parameter.name for parameter in plan.parameters if parameter.action == "copy"}
    loads = Counter()
    for parameter in plan.parameters:
        loads[placement.device_of(parameter.name)] += parameter.info.nbytes
    assert set(loads) == {CPU, *CUDA}
    assert loads.pop(CPU) == sum(plan.outputs[name].nbytes for name in copied)
    largest = max(info.nbytes for info in plan.outputs.values())
    assert max(loads.values()) - min(loads.values()) <= largest
    again = placement.over(plan, plan.groups)
    assert all(again.device_of(name) == placement.device_of(name) for name in plan.outputs)


def test_auto_in_a_job_is_one_device(bed: Bed, monkeypatch):
    pretend(monkeypatch, 3)
    monkeypatch.setenv("LOCAL_RANK", "4")
    plan = Merger.from_pretrained(bed.experts, LinearConfig()).plan
    placement = Placement("auto").over(plan, plan.groups)
    assert {placement.device_of(name) for name in plan.outputs} == {CUDA[1]}


def test_what_is_written_together_is_merged_on_one_device(bed: Bed, monkeypatch):
    pretend(monkeypatch, 2)
    plan = Merger.from_pretrained(bed.experts, LinearConfig()).plan
    names = list(plan.outputs)
    for parameter in plan.parameters:
        if parameter.name == names[0]:
            parameter.action = "copy"
    groups = [SaveGroup(names[:4], {}, False), SaveGroup(names[4:8], {}, False), *plan.groups[8:]]
    placement = Placement({"": "auto", names[1]: "meta", names[2]: "cpu", names[4]: "cpu"}).over(plan, groups)
    found = [placement.device_of(name) for name in names[:8]]
    assert found == [CPU, *[torch.device("meta")] * 3, *[CPU] * 4]
    parts = placement.by_device(groups)
    assert parts[torch.device("meta")] == groups[:1]
    assert parts[CPU] == groups[1:2]
    assert sum(map(len, parts.values())) == len(groups)


# -- results ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shard_size", ["20KB", "5GB"])
@pytest.mark.parametrize("case", METHODS)
def test_several_devices_write_the_same(bed: Bed, tmp_path: Path, devices: Devices, monkeypatch, case, shard_size):
    monkeypatch.setattr(pipeline, "READ_AHEAD", 0)
    expected = merge(bed, METHODS[case], tmp_path / "alone", None, shard_size)["parameters"]
    assert not devices.sent
    found = merge(bed, METHODS[case], tmp_path / "devices", "auto", shard_size)["parameters"]
    assert contents(tmp_path / "devices") == contents(tmp_path / "alone")
    assert found == expected
    assert list(found) == list(expected)
    assert set(devices.sent) == set(CUDA)
    merged = Merger.from_pretrained(bed.experts, METHODS[case], base_model=bed.base, device_map="auto").merge()
    written = type(merged).from_pretrained(tmp_path / "alone").state_dict()
    assert all(torch.equal(value, written[name]) for name, value in merged.state_dict().items())


def test_devices_work_at_the_same_time(bed: Bed, tmp_path: Path, devices: Devices):
    devices.meeting = threading.Barrier(3)  # broken when one of them waits for another one to be done
    merge(bed, LinearConfig(), tmp_path / "out")
    assert set(devices.sent) == set(CUDA)


def test_converted_parameters_on_several_devices(tmp_path: Path, devices: Devices):
    """What is one parameter in the model, and many tensors in several files."""
    mixtures = make_bed(ZOO["qwen3-moe"], tmp_path / "bed", names=("a", "b"))
    rows = [merge(mixtures, TiesConfig(), tmp_path / str(map_), map_)["parameters"] for map_ in (None, "auto")]
    assert rows[0] == rows[1]
    assert contents(tmp_path / "None") == contents(tmp_path / "auto")
    assert set(devices.sent) == set(CUDA)


def test_a_part_stays_on_the_cpu(bed: Bed, tmp_path: Path, devices: Devices):
    merge(bed, LinearConfig(), tmp_path / "alone", None)
    merge(bed, LinearConfig(), tmp_path / "devices", {"": "auto", "model.layers.0": "cpu"})
    assert contents(tmp_path / "devices") == contents(tmp_path / "alone")
    merger = Merger.from_pretrained(bed.experts, LinearConfig(), base_model=bed.base)
    sent = sum(info.nbytes for name, info in merger.plan.outputs.items() if ".layers.0." not in name)
    assert sum(map(sum, devices.sent.values())) == 2 * 4 * sent  # ahead, and asked for when it is there


@pytest.mark.parametrize("output", ["model", "adapter"])
@pytest.mark.parametrize("method", ["ties", "wudi", "dare"])
def test_adapters_on_several_devices(tmp_path: Path, devices: Devices, method: str, output: str):
    adapters = make_adapters(KINDS["lora"], tmp_path, 2)
    found = {}
    for device_map in (None, "auto"):
        out = tmp_path / str(device_map)
        config = MergeConfig.from_merge_type(method, output=output, adapter_rank=4 if output == "adapter" else None)
        merger = Merger.from_pretrained(adapters.adapters, config, base_model=adapters.base, device_map=device_map)
        merger.save_pretrained(out)
        found[device_map] = contents(out)
    assert found[None] == found["auto"]
    assert bool(devices.sent) == (method != "wudi")  # of which factors are enough


# -- errors -----------------------------------------------------------------------------------------------------------


def test_an_error_of_one_device_is_that_of_the_merge(bed: Bed, tmp_path: Path, devices: Devices, monkeypatch):
    monkeypatch.setattr(pipeline, "READ_AHEAD", 0)
    spoiled = bed.copy(tmp_path / "spoiled")
    path = next(spoiled.experts["a"].glob("*.safetensors"))
    tensors = load_file(path)
    for name in sorted(tensors)[::5]:
        tensors[name].view(-1)[-1] = float("nan")
        save_file(tensors, path, {"format": "pt"})
        with pytest.raises(NonFiniteError, match="holds NaN"):
            merge(spoiled, LinearConfig(), tmp_path / "merges" / "out")
        assert_nothing_left(tmp_path / "merges" / "out")


def test_an_error_in_writing_is_that_of_the_merge(bed: Bed, tmp_path: Path, devices: Devices, monkeypatch):
    write, count = shards._ShardFile.write, [5]

    def failing(self, key: str, entries: Tensor, start: int) -> None:
        count[0] -= 1
        if count[0] == 0:
            raise RuntimeError("a bug")
        write(self, key, entries, start)

    monkeypatch.setattr(shards._ShardFile, "write", failing)
    with pytest.raises(RuntimeError, match="a bug"):
        merge(bed, LinearConfig(), tmp_path / "merges" / "out")
    assert_nothing_left(tmp_path / "merges" / "out")


# -- memory -----------------------------------------------------------------------------------------------------------


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if "does not fit" in record.getMessage()]


@pytest.fixture
def heard(caplog: pytest.LogCaptureFixture, monkeypatch) -> Iterator[pytest.LogCaptureFixture]:
    with caplog.at_level(logging.WARNING, "hf_merge"):
        yield caplog


@pytest.mark.parametrize("case", METHODS)
def test_what_does_not_fit_is_merged_on_the_cpu(bed: Bed, tmp_path: Path, devices: Devices, heard, case: str):
    expected = merge(bed, METHODS[case], tmp_path / "alone", None)["parameters"]
    largest = max(info.nbytes for info in Merger.from_pretrained(bed.experts).plan.outputs.values())
    devices.fits = lambda nbytes: nbytes < largest
    devices.brought_back.clear()
    rows = merge(bed, METHODS[case], tmp_path / "devices")["parameters"]
    assert contents(tmp_path / "devices") == contents(tmp_path / "alone")
    moved = {name: row.pop("out_of_memory") for name, row in rows.items() if "out_of_memory" in row}
    assert {"model.embed_tokens.weight", "lm_head.weight"} <= moved.keys() < rows.keys()
    assert set(moved.values()) <= {str(device) for device in CUDA}
    assert len(devices.brought_back) >= len(bed.experts) * len(
        moved
    )  # some of their tensors were on the device already
    assert rows == expected
    assert sorted(warnings_of(heard)) == sorted(
        f"'{name}' does not fit into the memory of {device}: it is merged on the CPU."
        for name, device in moved.items()
    )
    assert Counter(map(str, devices.emptied)) == Counter(moved.values())


def test_what_fits_once_the_one_before_is_gone_is_merged_on_its_device(bed: Bed, tmp_path: Path, devices, heard):
    merge(bed, LinearConfig(), tmp_path / "alone", None)
    devices.fits_ahead = lambda nbytes: nbytes < 1000
    rows = merge(bed, LinearConfig(), tmp_path / "devices")["parameters"]
    assert contents(tmp_path / "devices") == contents(tmp_path / "alone")
    assert not any("out_of_memory" in row for row in rows.values())
    assert not warnings_of(heard) and not devices.emptied


def test_too_little_memory_on_the_cpu_is_an_error(bed: Bed, tmp_path: Path, devices: Devices, monkeypatch):
    def fail(*args) -> None:
        raise torch.OutOfMemoryError("the host's, too")

    monkeypatch.setattr(pipeline.Pipeline, "_write", fail)
    monkeypatch.setattr("hf_merge.engines.streaming.StreamingEngine._compute", fail)
    for device_map in (None, "auto"):
        with pytest.raises(torch.OutOfMemoryError, match="the host's, too"):
            merge(bed, LinearConfig(), tmp_path / "merges" / "out", device_map)
        assert_nothing_left(tmp_path / "merges" / "out")


def test_memory_of_every_device_is_estimated(bed: Bed, monkeypatch):
    pretend(monkeypatch, 2)
    monkeypatch.setattr(estimate, "process_memory", lambda: 0)
    plan = Merger.from_pretrained(bed.experts, LinearConfig(), base_model=bed.base).plan
    groups = plan.target.save_groups(plan.outputs)
    found = estimate.streaming_memory(plan, Placement("auto"), groups)
    assert set(found) == {"cpu", "cuda:0", "cuda:1"}
    placement = Placement("auto").over(plan, groups)
    for device, part in placement.by_device(groups).items():
        stored = [4 * plan.outputs[name].nbytes for group in part for name in group.names]
        two = max(map(sum, pairwise(stored)))
        assert two < found[str(device)] < two + 5 * max(stored)  # and the pieces of two large ones
    monkeypatch.setattr(ModelSource, "stored", lambda self, name: None)  # as for a device, parameters are read whole
    alone = estimate.streaming_memory(plan, Placement(), groups)["cpu"]
    assert 4 * transfer.STAGED < found["cpu"] < 4 * transfer.STAGED + 2 * alone


# -- a device that is there ------------------------------------------------------------------------------------------


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@needs_cuda
@pytest.mark.parametrize("case", METHODS)
def test_cuda_merges_like_the_cpu(bed: Bed, tmp_path: Path, case: str):
    rows = {}
    for name, device_map in (("cpu", None), ("all", "auto"), ("some", {"": "auto", "model.layers.0": "cpu"})):
        rows[name] = merge(bed, METHODS[case], tmp_path / name, device_map)["parameters"]
        assert list(rows[name]) == list(rows["cpu"])
    for name in ("all", "some"):
        for path in sorted((tmp_path / name).glob("*.safetensors")):
            expected = load_file(tmp_path / "cpu" / path.name)
            for key, value in load_file(path).items():
                torch.testing.assert_close(value, expected[key], rtol=1e-4, atol=1e-5)


@needs_cuda
def test_cuda_without_memory_gives_the_bits_of_the_cpu(bed: Bed, tmp_path: Path, monkeypatch, heard):
    def fail(self, tensor: Tensor) -> Tensor:
        if self.device == CPU:
            return tensor
        raise torch.OutOfMemoryError("tried to allocate")

    merge(bed, TsvMConfig(), tmp_path / "cpu", None)
    monkeypatch.setattr(Transfer, "send", fail)
    monkeypatch.setattr(Transfer, "send_ahead", fail)
    rows = merge(bed, TsvMConfig(), tmp_path / "cuda")["parameters"]
    assert contents(tmp_path / "cuda") == contents(tmp_path / "cpu")
    assert all("out_of_memory" in row for row in rows.values() if row["action"] in ("merge", "mean"))
