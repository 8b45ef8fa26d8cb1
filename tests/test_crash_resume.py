"""`kill -9` at any moment: the target folder is complete or absent, and running the same command again gives the same bits."""

from __future__ import annotations

import json
import random
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from .processes import contents, kill_after, start
from .testing_utils import Bed, load_clean, make_bed, run_cli, run_process
from .zoo import ZOO


SHARD = ["--max-shard-size", "2MB"]
METHOD = "ties"
KILLS, QUICK_KILLS = 20, 4

pytestmark = pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this system has no SIGKILL")


@pytest.fixture(scope="module")
def bed(tmp_path_factory: pytest.TempPathFactory) -> Bed:
    """Llamas of about 50 MB, so that a merge takes a second or two and writes two dozen shards."""
    config = LlamaConfig(
        vocab_size=4000,
        hidden_size=384,
        intermediate_size=1024,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    torch.manual_seed(0)
    return make_bed(ZOO["llama"], tmp_path_factory.mktemp("big"), model=LlamaForCausalLM(config), max_shard_size="5MB")


def command_for(bed: Bed, out: Path) -> list[str]:
    arguments = bed.command(*SHARD, method=METHOD)
    arguments[arguments.index("--out") + 1] = str(out)
    return arguments


@pytest.fixture(scope="module")
def expected(bed: Bed) -> dict[str, bytes]:
    """What an uninterrupted merge writes."""
    out = bed.folder / "uninterrupted" / "out"
    out.parent.mkdir()
    assert run_cli(command_for(bed, out)) == 0
    load_clean(LlamaForCausalLM, out)
    return contents(out)


@pytest.fixture(scope="module")
def duration(bed: Bed, expected: dict[str, bytes]) -> float:
    """Seconds from the first sign of the output to its completion, in a warm process."""
    out = bed.folder / "timed" / "out"
    out.parent.mkdir()
    start = time.perf_counter()
    assert run_cli(command_for(bed, out)) == 0
    return time.perf_counter() - start


def check_kill(bed: Bed, expected: dict[str, bytes], duration: float, seed: int) -> None:
    out = bed.folder / f"killed{seed}" / "out"
    out.parent.mkdir()
    delay = random.Random(seed).uniform(0.0, duration)
    kill_after(start(command_for(bed, out)), out, delay)
    if out.exists():
        assert contents(out) == expected, "the folder was there but not complete"
        return
    assert run_cli(command_for(bed, out)) == 0
    assert contents(out) == expected
    assert [path.name for path in out.parent.iterdir()] == ["out"], "something was left beside the output"


@pytest.mark.parametrize("seed", range(QUICK_KILLS))
def test_killed_merge_is_absent_and_resumes_to_the_same_bits(bed: Bed, expected, duration: float, seed: int):
    check_kill(bed, expected, duration, seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(QUICK_KILLS, QUICK_KILLS + KILLS))
def test_twenty_more_kills(bed: Bed, expected, duration: float, seed: int):
    check_kill(bed, expected, duration, seed)


def partial_after_kill(bed: Bed, folder: Path, shards: int = 4) -> Path:
    """Kills a merge as soon as it has finished some shards; returns the place of its output, which is absent."""
    out = folder / "out"
    out.parent.mkdir(parents=True)
    process = start(command_for(bed, out))
    while process.is_alive() and len(list(out.parent.rglob("*.safetensors"))) < shards:
        time.sleep(0.001)
    process.kill()
    process.join()
    assert not out.exists(), "the merge was too quick to be caught"
    return out


def test_finished_shards_are_not_written_again(bed: Bed, expected):
    out = partial_after_kill(bed, bed.folder / "reuse")
    partial = out.with_name("out.partial")
    times = {path.stat().st_ino: path.stat().st_mtime_ns for path in partial.glob("*.safetensors")}
    assert run_cli(command_for(bed, out)) == 0
    kept = [path for path in out.glob("*.safetensors") if times.get(path.stat().st_ino) == path.stat().st_mtime_ns]
    assert contents(out) == expected
    assert len(kept) >= len(times) - 1, "at most the shard that was being written is repeated"
    assert_same_rows(out, bed.folder / "uninterrupted" / "out")
    (note,) = json.loads((out / "merge_report.json").read_text())["notes"]
    assert note.startswith(f"continued: {len(times)} of ")


def assert_same_rows(found: Path, expected: Path) -> None:
    """The reports have the same rows in the same order."""
    rows, others = (json.loads((out / "merge_report.json").read_text())["parameters"] for out in (found, expected))
    assert list(rows.items()) == list(others.items())


@pytest.mark.parametrize("content", ["", "[1, 2]", '{"model.norm.weight": 3, "other": {}}', None])
def test_rows_that_cannot_be_read_are_left_out(bed: Bed, expected, tmp_path: Path, content: str | None):
    out = partial_after_kill(bed, tmp_path / "rows")
    damaged = sorted(out.with_name("out.partial").glob("*.rows.json"))
    assert damaged
    for path in damaged:
        path.unlink() if content is None else path.write_text(content)
    assert run_cli(command_for(bed, out)) == 0
    assert contents(out) == expected
    rows, whole = (
        json.loads((folder / "merge_report.json").read_text())["parameters"]
        for folder in (out, bed.folder / "uninterrupted" / "out")
    )
    assert 0 < len(rows) < len(whole)
    assert rows == {name: whole[name] for name in rows}


def test_partial_folder_of_another_recipe_is_not_reused(bed: Bed, expected):
    out = partial_after_kill(bed, bed.folder / "other")
    arguments = command_for(bed, out)
    assert run_cli([*arguments, "--set", "density=0.5"]) == 0
    fresh = bed.folder / "other" / "fresh" / "out"
    fresh.parent.mkdir()
    assert run_cli([*command_for(bed, fresh), "--set", "density=0.5"]) == 0
    assert contents(out) == contents(fresh)
    assert contents(out) != expected


def test_merge_that_was_killed_while_sealing_keeps_its_shards(bed: Bed, expected):
    out = bed.folder / "sealing" / "out"
    out.parent.mkdir()
    process = start(command_for(bed, out))
    while process.is_alive() and not any(out.parent.rglob("config.json")):
        time.sleep(0.0005)
    process.kill()
    process.join()
    if out.exists():
        pytest.skip("sealing was too quick to be caught")
    numbers = {path.stat().st_ino for path in out.parent.rglob("*.safetensors")}
    assert run_cli(command_for(bed, out)) == 0
    assert contents(out) == expected
    assert {path.stat().st_ino for path in out.glob("*.safetensors")} == numbers
    assert_same_rows(out, bed.folder / "uninterrupted" / "out")


def test_spoilt_partial_shard_is_written_again(bed: Bed, expected):
    """A power cut may leave a shard of the right size and wrong bytes; nothing of it may reach the result."""
    out = partial_after_kill(bed, bed.folder / "spoilt")
    partial = out.with_name("out.partial")
    for path in partial.glob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:-1000])
    assert run_cli(command_for(bed, out)) == 0
    assert contents(out) == expected


def test_changed_expert_is_not_mixed_into_a_resumed_merge(bed: Bed, tmp_path: Path):
    copy = bed.copy(tmp_path / "bed")
    out = partial_after_kill(copy, tmp_path / "changed")
    shard = max(copy.experts["a"].glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-4:] = b"\0\0\x80\x3f"  # the last float32 becomes 1
    shard.write_bytes(data)
    assert run_cli(command_for(copy, out)) == 0
    fresh = tmp_path / "fresh" / "out"
    fresh.parent.mkdir()
    assert run_cli(command_for(copy, fresh)) == 0
    assert contents(out) == contents(fresh)


def test_two_merges_into_one_folder_at_once(bed: Bed, expected):
    """One of them wins or both refuse; the folder is never a mixture."""
    out = bed.folder / "twice" / "out"
    out.parent.mkdir()
    processes = [start(command_for(bed, out)) for _ in range(2)]
    for process in processes:
        process.join()
    codes = [process.exitcode for process in processes]
    assert set(codes) <= {0, 2}
    assert 0 in codes
    assert contents(out) == expected


INTERRUPTED = """
import os, signal, sys, threading, time
from hf_merge.checkpoints.folder import OutputFolder
from hf_merge.cli import main

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs inherit that it is ignored
complete, fill_part, left = OutputFolder.complete, OutputFolder.fill_part, int(sys.argv.pop(1))
begun, filled = threading.Event(), []

def filling(folder, key, *given):  # the merge is not over when the interrupts come
    filled.append(key)
    if key != filled[0]:
        begun.wait()
        while left:
            time.sleep(0.001)
    fill_part(folder, key, *given)

def interrupted(*given):
    global left
    complete(*given)
    begun.set()
    while left:
        left -= 1
        handler = signal.getsignal(signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        while signal.getsignal(signal.SIGINT) is handler:
            time.sleep(0.001)

OutputFolder.complete, OutputFolder.fill_part = interrupted, filling
main()
"""


@pytest.mark.parametrize("count", [1, 2])
def test_interrupt_is_reported_without_a_traceback(bed: Bed, expected, count: int):
    """Ctrl-C in the middle of the merge, after the first group of tensors; a second one does not wait for the clean-up."""
    out = bed.folder / f"interrupted{count}" / "out"
    out.parent.mkdir()
    done = run_process([sys.executable, "-c", INTERRUPTED, str(count), *command_for(bed, out), "--num-proc", "1"])
    assert done.returncode == 130, done.stderr[-1000:]
    assert "Traceback" not in done.stderr
    assert ("run the same command again" in done.stderr) == (count == 1)
    assert not out.exists()
    assert run_cli(command_for(bed, out)) == 0
    assert contents(out) == expected
