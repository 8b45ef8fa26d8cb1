"""Forks of one process merge into one folder: the bytes of one process, one error, and nothing that stays behind."""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_merge import ConfigError, DareConfig, LinearConfig, Merger, RankLostError, TsvMConfig
from hf_merge.checkpoints import shards
from hf_merge.engines import estimate, forks, pipeline
from hf_merge.engines.forks import run_forked
from hf_merge.engines.placement import Placement

from ..processes import contents, start
from ..testing_utils import Bed, assert_nothing_left, llama_bed, run_cli


pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks are used on Linux")

CASES = {
    "linear": ["linear"],
    "ties over the model": ["ties", "--set", "scope=model", "--set", "density=0.3"],
    "dare": ["dare", "--set", "combination=ties", "--set", "rescale=norm"],
    "della": ["della"],
    "model_stock": ["model_stock"],
    "wudi, which is not divided": ["wudi"],
}


@pytest.fixture(scope="module")
def bed(tmp_path_factory) -> Bed:
    return llama_bed(tmp_path_factory.mktemp("forks"))


def command(bed: Bed, out: Path, method: list[str], *extra: str) -> list[str]:
    arguments = bed.command(*method[1:], *extra, method=method[0])
    arguments[arguments.index("--out") + 1] = str(out)
    return arguments


def rows(folder: Path) -> dict:
    return json.loads((folder / "merge_report.json").read_text(encoding="utf-8"))["parameters"]


@pytest.mark.parametrize("shard_size", ["20KB", "5GB"])
@pytest.mark.parametrize("case", CASES)
def test_any_number_of_processes_writes_the_same(bed: Bed, tmp_path: Path, monkeypatch, case: str, shard_size: str):
    monkeypatch.setattr(pipeline, "READ_AHEAD", 0)
    for count in (1, 2, 5):
        arguments = command(bed, tmp_path / str(count), CASES[case], "--num-proc", str(count))
        assert run_cli([*arguments, "--max-shard-size", shard_size]) == 0
    for count in (2, 5):
        assert contents(tmp_path / str(count)) == contents(tmp_path / "1")
        assert rows(tmp_path / str(count)) == rows(tmp_path / "1")
        assert list(rows(tmp_path / str(count))) == list(rows(tmp_path / "1"))


def at_write(action: Callable[[], None], place: Path, count: int = 1, own: bool = False) -> None:
    """Notes the processes that write, and lets forks (or the process that they come from) do something at a write."""
    write, left, main = shards._ShardFile.write, [count], os.getpid()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs inherit that it is ignored
    pipeline.READ_AHEAD = 0  # the model is small: else the first one reads all of it

    def noted(self, key, entries, start) -> None:
        with open(place, "a", encoding="utf-8") as file:
            file.write(f"{os.getpid()}\n")
        if (os.getpid() == main) is own:
            left[0] -= 1
            if left[0] == 0:
                action()
        else:
            time.sleep(0.02)  # so that each gets something to do
        write(self, key, entries, start)

    shards._ShardFile.write = noted


def nothing() -> None:
    pass


def fill_disk() -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def bug() -> None:
    raise RuntimeError("a bug")


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def pids(place: Path) -> set[int]:
    return {int(line) for line in place.read_text(encoding="utf-8").split()} if place.exists() else set()


def merge_apart(bed: Bed, tmp_path: Path, prepare: Callable[[], None]) -> tuple[int, str]:
    (tmp_path / "merges").mkdir()
    arguments = command(bed, tmp_path / "merges" / "out", CASES["dare"], "--num-proc", "3", "--max-shard-size", "20KB")
    process = start(arguments, prepare=prepare, log=tmp_path / "log")
    process.join(60)
    return process.exitcode, (tmp_path / "log").read_text(encoding="utf-8")


def test_all_processes_write(bed: Bed, tmp_path: Path):
    code, log = merge_apart(bed, tmp_path, partial(at_write, nothing, tmp_path / "pids"))
    assert code == 0, log
    assert len(pids(tmp_path / "pids")) == 3


@pytest.mark.parametrize("own", [False, True], ids=["in a fork", "in the process itself"])
@pytest.mark.parametrize("action", [fill_disk, bug])
def test_an_error_is_that_of_the_merge(bed: Bed, tmp_path: Path, action, own: bool):
    code, log = merge_apart(bed, tmp_path, partial(at_write, action, tmp_path / "pids", 2, own))
    assert code == (2 if action is fill_disk else 1)
    if action is fill_disk:
        assert "disk is full" in log
        assert len(log.strip().splitlines()) == 1
    assert_nothing_left(tmp_path / "merges" / "out")


def test_nan_is_found_in_every_process(bed: Bed, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(pipeline, "READ_AHEAD", 0)
    spoiled = bed.copy(tmp_path / "spoiled")
    path = next(spoiled.experts["a"].glob("*.safetensors"))
    tensors = load_file(path)
    last = max(tensors)
    tensors[last].view(-1)[-1] = float("nan")
    save_file(tensors, path, {"format": "pt"})
    merger = Merger.from_pretrained(spoiled.experts, LinearConfig())
    (tmp_path / "merges").mkdir()
    for count in (1, 2, 4):
        with pytest.raises(ArithmeticError, match=f"'{last}'.*NaN"):
            merger.save_pretrained(tmp_path / "merges" / "out", num_proc=count)
        assert_nothing_left(tmp_path / "merges" / "out")


def test_a_killed_fork_leaves_what_can_be_continued(bed: Bed, tmp_path: Path):
    code, log = merge_apart(bed, tmp_path, partial(at_write, kill, tmp_path / "pids", 3))
    out = tmp_path / "merges" / "out"
    assert code == 2
    assert "same command continues" in log
    assert not out.exists()
    again = command(bed, out, CASES["dare"], "--num-proc", "3", "--max-shard-size", "20KB")
    assert run_cli(again) == 0
    assert run_cli(command(bed, tmp_path / "alone", CASES["dare"], "--num-proc", "1", "--max-shard-size", "20KB")) == 0
    assert contents(out) == contents(tmp_path / "alone")


def test_forks_end_with_the_process_that_they_come_from(bed: Bed, tmp_path: Path):
    code, _ = merge_apart(bed, tmp_path, partial(at_write, kill, tmp_path / "pids", 4, own=True))
    assert code == -signal.SIGKILL
    gone = time.monotonic() + 5
    while any(psutil.pid_exists(pid) for pid in pids(tmp_path / "pids")) and time.monotonic() < gone:
        time.sleep(0.01)
    assert len(pids(tmp_path / "pids")) > 1
    assert not any(psutil.pid_exists(pid) for pid in pids(tmp_path / "pids"))
    out = tmp_path / "merges" / "out"
    assert run_cli(command(bed, out, CASES["dare"], "--num-proc", "3", "--max-shard-size", "20KB")) == 0


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def test_an_interrupt_keeps_what_is_finished(bed: Bed, tmp_path: Path):
    code, log = merge_apart(bed, tmp_path, partial(at_write, interrupt, tmp_path / "pids", 4, own=True))
    assert code == 130, log
    assert "to continue" in log
    assert (tmp_path / "merges" / "out.partial").is_dir()
    assert not any(psutil.pid_exists(pid) for pid in pids(tmp_path / "pids"))


@pytest.mark.parametrize("count", [0, -1, 1.5, "many", True])
def test_refuses_what_is_no_number_of_processes(bed: Bed, tmp_path: Path, count):
    with pytest.raises(ConfigError, match="num_proc"):
        Merger.from_pretrained(bed.experts, LinearConfig()).save_pretrained(tmp_path / "out", num_proc=count)


# -- the list of work -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 7, 20_000])
def test_every_item_is_done_once(size: int):
    told: list[int] = []

    def work(items, tell) -> list[int]:
        done = []
        for item in items:
            done.append(item)
            if item % 100 == 0:
                tell(item)
        return done

    results = run_forked(3, range(size), work, told.append)
    assert len(results) == 3
    assert sorted(item for part in results for item in part) == list(range(size))
    assert sorted(told) == list(range(0, size, 100))


class Awkward(Exception):
    """Cannot be made again from its arguments."""

    def __init__(self, first: str, second: str):
        super().__init__(f"{first} and {second}")


def test_errors_that_cannot_be_pickled_keep_their_message():
    main = os.getpid()

    def work(items, tell) -> None:
        for _ in items:
            if os.getpid() != main:
                raise Awkward("this", "that")
            time.sleep(0.01)

    with pytest.raises(Exception, match="Awkward: this and that"):
        run_forked(2, range(1000), work, print)


def test_an_error_in_what_is_told_ends_the_work():
    def told(item: int) -> None:
        raise ValueError("not this")

    def work(items, tell) -> None:
        for item in items:
            time.sleep(0.001)
            tell(item)

    with pytest.raises(ValueError, match="not this"):
        run_forked(2, range(10_000), work, told)


def test_a_fork_that_ends_is_noticed():
    main = os.getpid()

    def work(items, tell) -> None:
        for _ in items:
            if os.getpid() != main:
                os._exit(3)
            time.sleep(0.01)

    with pytest.raises(RankLostError, match="exit code 3"):
        run_forked(2, range(1000), work, print)


# -- how many ---------------------------------------------------------------------------------------------------------


def test_as_many_as_processors_and_memory_allow(bed: Bed, monkeypatch):
    plan = Merger.from_pretrained(bed.experts, DareConfig(), base_model=bed.base).check()
    count = partial(estimate.count_processes, plan, Placement(), plan.groups)
    monkeypatch.setattr(estimate, "processors", lambda: 4)
    assert count("auto") == 4
    assert count("auto", ranks=2) == 1
    assert (count(None), count(3)) == (1, 3)
    monkeypatch.setattr(estimate, "processors", lambda: 64)
    assert count("auto") == forks.MOST_PROCESSES
    each = estimate.streaming_memory(plan, Placement(), plan.groups)["cpu"] - estimate.process_memory()
    monkeypatch.setattr(estimate, "free_memory", lambda: each * 5)
    assert count("auto") == 2
    monkeypatch.setattr(estimate, "free_memory", lambda: 0)
    assert count("auto") == 1


def test_what_a_device_merges_is_not_divided(bed: Bed):
    from hf_merge.engines.choice import choose_engine

    plan = Merger.from_pretrained(bed.experts, DareConfig(), base_model=bed.base).check()
    assert choose_engine(plan, Placement()).can_fork()
    assert not choose_engine(plan, Placement({"": "cpu", "lm_head": "meta"})).can_fork()


def test_models_in_memory_are_divided(bed: Bed, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(pipeline, "READ_AHEAD", 0)
    write = shards._ShardFile.write

    def noted(self, key, entries, start) -> None:
        with open(tmp_path / "pids", "a", encoding="utf-8") as file:
            file.write(f"{os.getpid()}\n")
        time.sleep(0.02)
        write(self, key, entries, start)

    monkeypatch.setattr(shards._ShardFile, "write", noted)
    models = {name: bed.model_class.from_pretrained(path) for name, path in bed.experts.items()}
    for count in (1, 2):
        Merger.from_pretrained(models, LinearConfig()).save_pretrained(tmp_path / str(count), num_proc=count)
        assert len(pids(tmp_path / "pids")) == count
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("1", "2"))
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_models_on_a_device_are_not_divided(bed: Bed, tmp_path: Path):
    """A fork cannot use the accelerator of the process that it comes from."""
    from hf_merge.engines.choice import choose_engine

    models = {name: bed.model_class.from_pretrained(path) for name, path in bed.experts.items()}
    merger = Merger.from_pretrained(models, LinearConfig())
    assert choose_engine(merger.check(), Placement()).can_fork()
    merger.experts[1].storage.is_on_cpu = False
    assert not choose_engine(merger.check(), Placement()).can_fork()


def test_what_is_not_divided_says_so(bed: Bed, tmp_path: Path):
    merger = Merger.from_pretrained(bed.experts, TsvMConfig(), base_model=bed.base)
    merger.save_pretrained(tmp_path / "alone")
    assert not any("num_proc" in note for note in merger.report.notes)
    merger = Merger.from_pretrained(bed.experts, TsvMConfig(), base_model=bed.base)
    merger.save_pretrained(tmp_path / "out", num_proc=2)
    assert any("num_proc=2 has no effect" in note for note in merger.report.notes)


def test_limits_of_a_container_count(tmp_path: Path, monkeypatch):
    own = forks.processors()
    monkeypatch.setattr(forks, "CGROUP", tmp_path)
    assert forks.free_memory() > 0
    (tmp_path / "cpu.max").write_text("max 100000\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert forks.processors() == own
    (tmp_path / "cpu.max").write_text("50000 100000\n")
    assert forks.processors() == 1
    (tmp_path / "memory.max").write_text("5000\n")
    (tmp_path / "memory.stat").write_text("anon 2000\nfile 2500\n")
    assert forks.free_memory() == 3000
    (tmp_path / "memory.stat").write_text("anon 6000\n")
    assert forks.free_memory() == 0


def test_a_process_that_may_have_no_children_merges_alone(bed: Bed, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(forks.BaseProcess, "start", refuse)
    merger = Merger.from_pretrained(bed.experts, LinearConfig())
    merger.save_pretrained(tmp_path / "out", num_proc=3)
    assert (tmp_path / "out" / "config.json").exists()


def refuse(process) -> None:
    raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")
