"""Several processes merge into one folder: the bytes of one process, one error for all, and a state that can be continued."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import sys
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from hf_merge import DareConfig, LinearConfig, MergeConfig, MergeError, Merger, RankLostError
from hf_merge.checkpoints import shards
from hf_merge.engines import ranks
from hf_merge.engines.division import divide
from hf_merge.engines.placement import Placement
from hf_merge.engines.ranks import all_ranks
from hf_merge.training.callback import on_main_process

from ..processes import contents, free_port, launch
from ..testing_utils import (
    Bed,
    assert_nothing_left,
    classifier_bed,
    llama_bed,
    make_bed,
    run_cli,
    run_process,
)
from ..zoo import ZOO


MANY, ONE = ["--max-shard-size", "20KB"], []
"""A dozen weight files, and a single one."""
CASES = {
    "linear": ["linear"],
    "ties over the model": ["ties", "--set", "scope=model", "--set", "density=0.3"],
    "dare": ["dare"],
    "wudi": ["wudi"],
    "wudi with equal norms": ["wudi", "--set", "equalize_norms=true"],
}


def command(bed: Bed, out: Path, method: Sequence[str], *extra: str) -> list[str]:
    arguments = bed.command(*method[1:], *extra, method=method[0])
    arguments[arguments.index("--out") + 1] = str(out)
    return arguments


@pytest.fixture(scope="module")
def bed(tmp_path_factory: pytest.TempPathFactory) -> Bed:
    return llama_bed(tmp_path_factory.mktemp("bed"))


@pytest.fixture(scope="module")
def alone(bed: Bed) -> Callable[[str, list[str]], Path]:
    """The folder that one process writes."""

    def folder(case: str, shards: list[str]) -> Path:
        out = bed.folder / f"{case} {len(shards)}".replace(" ", "_") / "out"
        if not out.exists():
            out.parent.mkdir()
            assert run_cli(command(bed, out, CASES[case], *shards)) == 0
        return out

    return folder


@pytest.mark.parametrize(
    ("case", "size"),
    [
        *((case, 2) for case in CASES),
        ("ties over the model", 4),
        *(pytest.param(case, 4, marks=pytest.mark.slow) for case in CASES if not case.startswith("ties")),
    ],
)
def test_any_number_of_ranks_writes_the_same_bytes(bed: Bed, alone, tmp_path: Path, case: str, size: int):
    expected = alone(case, MANY)
    out = tmp_path / "out"
    codes, logs = launch(command(bed, out, CASES[case], *MANY), size, tmp_path / "logs")
    assert codes == [0] * size, logs
    assert contents(out) == contents(expected)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["logs", "out"]
    assert "Merged 3 models" in logs[0]
    assert logs[1:] == [""] * (size - 1), "only rank 0 prints"
    report, report_alone = (json.loads((folder / "merge_report.json").read_text()) for folder in (out, expected))
    assert report["parameters"] == report_alone["parameters"]
    assert list(report["parameters"]) == list(report_alone["parameters"])
    assert report["notes"] == report_alone["notes"]
    assert report["peak_memory_bytes"] == max(rank["peak_memory_bytes"] for rank in report["ranks"])
    assert all(rank["parameters"] < len(report["parameters"]) for rank in report["ranks"])


def test_fewer_files_than_ranks(bed: Bed, alone, tmp_path: Path):
    out = tmp_path / "out"
    codes, logs = launch(command(bed, out, CASES["dare"], *ONE), 2, tmp_path / "logs")
    assert codes == [0, 0]
    assert contents(out) == contents(alone("dare", ONE))
    assert "max_shard_size" in logs[0], "who starts ranks for nothing is told"


def test_heads_and_stacked_experts(tmp_path: Path):
    """Heads are written by rank 0; parameters whose tensors lie in two ranks' files are converted by both."""
    heads = classifier_bed(tmp_path / "heads")
    mixture = make_bed(ZOO["mixtral"], tmp_path / "mixture")
    for bed, shard_size in ((heads, "20KB"), (mixture, "3KB")):
        assert run_cli(command(bed, bed.out, ["wudi"], "--max-shard-size", shard_size)) == 0
        ranked = bed.folder / "ranked" / "out"
        codes, logs = launch(command(bed, ranked, ["wudi"], "--max-shard-size", shard_size), 2, bed.folder / "logs")
        assert codes == [0, 0], logs
        assert contents(ranked) == contents(bed.out)
    assert {path.name for path in (heads.folder / "ranked" / "out" / "heads").iterdir()} == {
        "spam",
        "movies",
        "emotion",
    }


def test_what_is_not_divided_is_done_by_rank_0(bed: Bed, tmp_path: Path):
    """What only one process can do is done by rank 0, and the others wait for it."""
    arguments = [word for name in ("a", "b") for word in ("--expert", f"{name}={bed.experts[name]}")]
    arguments = ["run", "--method", "moe", *arguments, "--base", str(bed.base), "--set", "gate_mode=random"]
    codes = [run_cli([*arguments, "--out", str(tmp_path / "alone")])]
    ranks, logs = launch([*arguments, "--out", str(tmp_path / "ranked")], 2, tmp_path / "logs")
    assert [*codes, *ranks] == [0, 0, 0], logs
    assert contents(tmp_path / "ranked") == contents(tmp_path / "alone")


# -- failures ---------------------------------------------------------------------------------------------------------


def fail_at(victim: int, count: int, action: Callable[[], None], rank: int) -> None:
    """Lets a rank do something when it writes its tensor number `count`."""
    if rank != victim:
        return
    write, left = shards._ShardFile.write, [count]

    def failing(self, key, entries, start) -> None:
        left[0] -= 1
        if left[0] == 0:
            action()
        write(self, key, entries, start)

    shards._ShardFile.write = failing


def fill_disk() -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def bug() -> None:
    raise RuntimeError("a bug")


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("action", [fill_disk, bug])
def test_error_on_one_rank_is_one_error_on_all(bed: Bed, tmp_path: Path, victim: int, action):
    out = tmp_path / "merges" / "out"
    out.parent.mkdir()
    codes, logs = launch(
        command(bed, out, CASES["ties over the model"], *MANY),
        3,
        tmp_path / "logs",
        partial(fail_at, victim, 3, action),
    )
    assert codes == [2 if action is fill_disk or rank != victim else 1 for rank in range(3)], logs
    assert_nothing_left(out)
    if victim == 1 or action is fill_disk:
        assert ("disk is full" if action is fill_disk else "a bug") in logs[0]
        assert ("Rank 1" in logs[0]) == (victim == 1)
        assert len(logs[0].strip().splitlines()) == 1
    assert logs[2] == ""


def test_bad_recipe_is_refused_once(bed: Bed, tmp_path: Path):
    codes, logs = launch(command(bed, tmp_path / "out", ["ties", "--set", "density=3"]), 2, tmp_path / "logs")
    assert codes == [2, 2]
    assert "density" in logs[0]
    assert logs[1] == ""
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    codes, logs = launch(command(bed, tmp_path / "full", ["linear"]), 2, tmp_path / "logs")
    assert codes == [2, 2]
    assert "not empty" in logs[0]
    assert logs[1] == ""


def other_seed(rank: int) -> None:
    """One rank is given another recipe."""
    if rank == 1:
        from hf_merge import config

        resolve = config.MergeConfig.from_dict.__func__
        config.MergeConfig.from_dict = classmethod(
            lambda cls, data, **given: resolve(cls, data | {"seed": 7}, **given)
        )


def test_ranks_with_different_recipes(bed: Bed, tmp_path: Path):
    codes, logs = launch(command(bed, tmp_path / "m" / "out", ["dare"]), 2, tmp_path / "logs", other_seed)
    assert codes == [2, 2]
    assert "another merge" in logs[0]
    assert not list((tmp_path / "m").iterdir())


def check_kill(bed: Bed, expected: Path, folder: Path, victim: int, count: int, sizes: tuple[int, int]) -> None:
    out = folder / "merges" / "out"
    out.parent.mkdir(parents=True)
    arguments = command(bed, out, CASES["ties over the model"], *MANY)
    codes, logs = launch(arguments, sizes[0], folder / "logs", partial(fail_at, victim, count, kill))
    assert codes[victim] == -signal.SIGKILL
    assert not out.exists()
    survivors = [code for rank, code in enumerate(codes) if rank != victim]
    assert survivors == [2] * len(survivors), logs
    finished = {path.name: path.stat().st_ino for path in out.with_name("out.partial").glob("*.safetensors")}
    assert finished, "the other ranks had finished their parts"
    codes, logs = launch(arguments, sizes[1], folder / "again") if sizes[1] > 1 else ([run_cli(arguments)], [])
    assert set(codes) == {0}, logs
    assert contents(out) == contents(expected)
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    assert {name: (out / name).stat().st_ino for name in finished} == finished, "finished files are kept"
    rows, others = (json.loads((path / "merge_report.json").read_text())["parameters"] for path in (out, expected))
    assert list(rows.items()) == list(others.items()), "so are their rows of the report"


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this system has no SIGKILL")
@pytest.mark.parametrize(("victim", "sizes"), [(1, (2, 3)), (0, (3, 1))])
def test_killed_rank_leaves_what_can_be_continued(bed: Bed, alone, tmp_path: Path, victim: int, sizes):
    check_kill(bed, alone("ties over the model", MANY), tmp_path, victim, 4, sizes)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this system has no SIGKILL")
@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("victim", range(4))
def test_kills_at_many_moments(bed: Bed, alone, tmp_path: Path, victim: int, count: int):
    check_kill(bed, alone("ties over the model", MANY), tmp_path, victim, count, (4, 1 + count % 4))


# -- in Python --------------------------------------------------------------------------------------------------------


def fail() -> None:
    raise ValueError("out of memory")


def interrupt() -> None:
    raise KeyboardInterrupt


def calls_of_a_user(bed: Path, out: Path, rank: int) -> None:
    """What a script does in a job whose process group it initialised itself."""
    dist.init_process_group("gloo")
    world = dist.group.WORLD

    def merger(config: MergeConfig) -> Merger:
        return Merger.from_pretrained({name: bed / name for name in "abc"}, config, base_model=bed / "base")

    dare, linear = merger(DareConfig()), merger(LinearConfig())
    dare.save_pretrained(out / "dare", max_shard_size="20KB")
    assert (out / "dare" / "config.json").exists()
    assert len(dare.report.parameters) == len(dare.plan.parameters)
    assert len(dare.report.ranks) == 2
    linear.merge()  # every rank has a model of its own
    linear.save_pretrained(out / "memory")
    if rank == 0:
        merger(LinearConfig()).save_pretrained(out / "first", distributed=False)
    assert dist.group.WORLD is world, "the user's group is left alone"
    with pytest.raises(ValueError if rank == 0 else MergeError, match="out of memory"):
        on_main_process(fail, rank == 0, "evaluate")
    with pytest.raises(KeyboardInterrupt if rank == 0 else RankLostError):
        on_main_process(interrupt, rank == 0, "evaluate")
    (out / f"done{rank}").touch()


def torchrun(*arguments: str, size: int = 2):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size)]
    return run_process([*launcher, *arguments], OMP_NUM_THREADS="1")


def test_python_calls_in_a_job_of_the_user(bed: Bed, tmp_path: Path):
    job = partial(calls_of_a_user, bed.folder, tmp_path)
    _, logs = launch(["--version"], 2, tmp_path / "logs", job)
    assert all((tmp_path / f"done{rank}").exists() for rank in range(2)), logs
    for name, method, size in (("dare", "dare", MANY), ("memory", "linear", ONE), ("first", "linear", ONE)):
        expected = tmp_path / f"alone-{name}"
        assert run_cli(command(bed, expected, [method], *size)) == 0
        weights = {path.name: path.read_bytes() for path in (tmp_path / name).glob("*.safetensors")}
        assert weights == {path.name: path.read_bytes() for path in expected.glob("*.safetensors")}, name


def never_comes(rank: int) -> None:
    """Rank 1 ends before it reaches the merge."""
    ranks.MEETING = timedelta(seconds=3)
    if rank == 1:
        os._exit(0)


def test_rank_that_does_not_come(bed: Bed, tmp_path: Path):
    codes, logs = launch(command(bed, tmp_path / "m" / "out", ["linear"]), 2, tmp_path / "logs", never_comes)
    assert codes == [2, 0]
    assert "Not all ranks" in logs[0]
    assert "WORLD_SIZE" in logs[0]
    assert not (tmp_path / "m").exists()


@pytest.mark.slow
def test_launchers(bed: Bed, alone, tmp_path: Path):
    out = tmp_path / "torchrun"
    done = torchrun("-m", "hf_merge", *command(bed, out, CASES["wudi"], *MANY))
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(re.findall("Merged 3 models", done.stdout)) == 1
    assert contents(out) == contents(alone("wudi", MANY))
    out = tmp_path / "accelerate"
    launcher = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--cpu",
        "--num_processes",
        "2",
        "--num_machines",
        "1",
    ]
    launcher += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", str(free_port())]
    done = run_process([*launcher, "-m", "hf_merge", *command(bed, out, CASES["wudi"], *MANY)], OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr[-3000:]
    assert contents(out) == contents(alone("wudi", MANY))
    done = torchrun("-m", "hf_merge", *command(bed, tmp_path / "bad", ["ties", "--set", "density=3"]))
    assert done.returncode != 0
    assert done.stderr.count("error: ") == 1


def test_without_a_job_nothing_is_initialised(monkeypatch, bed: Bed, tmp_path: Path):
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    bed.merge(LinearConfig(), tmp_path / "out")
    assert not torch.distributed.is_initialized()
    assert all_ranks().size == 1


# -- the parts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "count", "largest"),
    [
        ([5, 5, 5, 5, 2], 2, 12),
        ([5, 5, 5, 5, 2], 4, 7),
        ([9, 1, 1, 1], 2, 9),
        ([3], 4, 3),
        ([], 2, 0),
        ([0, 0, 4], 2, 4),
    ],
)
def test_divide(sizes: list[int], count: int, largest: int):
    runs = divide(sizes, count)
    assert len(runs) == count
    assert [index for run in runs for index in run] == list(range(len(sizes)))
    assert max(sum(sizes[index] for index in run) for run in runs) == largest


def test_auto_is_the_device_of_the_local_rank(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 4)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert Placement("auto").device_of("any") == torch.device("cuda")
    monkeypatch.setenv("LOCAL_RANK", "5")
    assert Placement("auto").device_of("any") == torch.device("cuda", 1)
