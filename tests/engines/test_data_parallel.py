"""Ranks that hold a part of the calibration samples each: the result of one process, one error for all, and a state to continue."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import TrainerCallback

from hf_merge import (
    MatsConfig,
    MergeConfig,
    MergeError,
    Merger,
    ProDistillArguments,
    ProDistillConfig,
    RankLostError,
    RegMeanConfig,
    RegMeanPlusPlusConfig,
)
from hf_merge.data.batching import Batch
from hf_merge.engines.choice import is_divisible
from hf_merge.engines.data_parallel import own_batches
from hf_merge.engines.ranks import Ranks
from hf_merge.methods.block_base import BlockMethod
from hf_merge.methods.prodistill import ProDistill
from hf_merge.methods.prodistill.coefficients import ElementCoefficients
from hf_merge.methods.regmean import RegMean

from ..processes import launch
from ..testing_utils import Bed, assert_nothing_left, classifier_bed, make_bed
from ..zoo import ZOO, tensors_on_disk


TASKS = ("a", "b")
DISTILLED = ProDistillConfig(epochs=3, batch_size=4, lr_scheduler="cosine")
FEW, MANY = 2, 7
"""Samples of a task: fewer than ranks, and a number that nothing divides."""


@pytest.fixture(scope="module")
def beds(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Bed]:
    found: dict[str, Bed] = {}

    def bed(family: str) -> Bed:
        if family not in found:
            folder = tmp_path_factory.mktemp(family.replace(" ", "_"))
            found[family] = (
                classifier_bed(folder) if family == "classifiers" else make_bed(ZOO[family], folder, names=TASKS)
            )
        return found[family]

    return bed


def samples(bed: Bed, count: int) -> dict[str, list[dict[str, Tensor]]]:
    """Token sequences of uneven length, so that batches are padded."""
    generator = torch.Generator().manual_seed(3)
    return {
        task: [{"input_ids": torch.randint(5, 60, (4 + index % 3,), generator=generator)} for index in range(count)]
        for task in bed.experts
    }


def save(
    bed: Bed, config: MergeConfig, count: int, out: Path, arguments: dict | None = None, callbacks: Sequence = ()
) -> Merger:
    """The call of a script."""
    merger = Merger.from_pretrained(bed.experts, config, base_model=bed.base)
    args = ProDistillArguments(**(arguments or {}))
    data = samples(bed, count)
    merger.save_pretrained(out, data=data, args=args, callbacks=callbacks, max_shard_size="20KB")
    return merger


def save_on_ranks(
    bed: Bed, config: MergeConfig, count: int, out: Path, arguments: dict | None = None, rank: int = 0
) -> None:
    """The same call on every rank, and its report for the test."""
    merger = save(bed, config, count, out, arguments)
    assert (out / "config.json").exists()
    (out.parent / f"report{rank}.json").write_text(json.dumps(merger.report.to_dict()))


def assert_same_merge(bed: Bed, found: Path, expected: Path) -> None:
    """To a thousandth of what the merge changes: Adam makes steps out of gradients whatever their size."""
    weights, base = tensors_on_disk(found), tensors_on_disk(bed.base)
    for name, tensor in tensors_on_disk(expected).items():
        size = float((tensor - base[name]).abs().max()) if name in base else 1.0
        difference = float((weights[name] - tensor).abs().max())
        assert difference <= 1e-3 * size + 1e-7, f"{name} differs by {difference}"


CASES = {
    "prodistill": ("bert", DISTILLED, 2, MANY, None),
    "prodistill, 3 ranks": ("bert", DISTILLED, 3, FEW, None),
    "one coefficient per tensor, accumulated": (
        "bert",
        ProDistillConfig(epochs=3, batch_size=2, granularity="tensor", loss="sse", adam_epsilon=1e-3),
        2,
        MANY,
        {"gradient_accumulation_steps": 2},
    ),
    "prodistill after regmean++": (
        "bert",
        ProDistillConfig(epochs=2, batch_size=4, init="regmean_pp", skip_blocks=1, early_stopping_patience=1),
        3,
        FEW,
        None,
    ),
    "regmean": ("bert", RegMeanConfig(batch_size=4), 2, MANY, None),
    "regmean++ after ties over the model": (
        "bert",
        RegMeanPlusPlusConfig(batch_size=4, init={"merge_type": "ties", "scope": "model"}),
        3,
        FEW,
        None,
    ),
    "mats": ("llama", MatsConfig(batch_size=1), 2, MANY, None),
    "mixture": ("mixtral", RegMeanConfig(), 2, MANY, None),
    "encoder and decoder": ("t5", DISTILLED, 2, MANY, {"activation_cache": "disk"}),
    "heads": ("classifiers", ProDistillConfig(epochs=2, fit_heads=True, fit_poolers=True), 3, FEW, None),
}


@pytest.mark.parametrize("case", CASES)
def test_ranks_give_the_result_of_one_process(beds, tmp_path: Path, case: str):
    family, config, size, count, arguments = CASES[case]
    bed, alone, out = beds(family), tmp_path / "alone", tmp_path / "out"
    expected = save(bed, config, count, alone, arguments).report.to_dict()
    _, logs = launch(["--version"], size, tmp_path, partial(save_on_ranks, bed, config, count, out, arguments))
    assert (out / "config.json").exists(), logs
    assert_same_merge(bed, out, alone)
    for head in sorted(path.name for path in (alone / "heads").glob("*")):
        weights = tensors_on_disk(out / "heads" / head)
        for name, tensor in tensors_on_disk(alone / "heads" / head).items():
            torch.testing.assert_close(weights[name], tensor, rtol=1e-3, atol=1e-5)
    reports = [json.loads((tmp_path / f"report{rank}.json").read_text()) for rank in range(size)]
    for report in reports:
        assert report["parameters"].keys() == expected["parameters"].keys()
        assert report["heads"] == expected["heads"]
        assert len(report["ranks"]) == size
        for block, row in expected["blocks"].items():
            assert report["blocks"][block] == pytest.approx(row, rel=1e-3)
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith("out")) == ["out"]
    assert all("Rank 0 merges" not in log for log in logs)


def test_callbacks_are_those_of_rank_0(beds, tmp_path: Path):
    bed, alone, out = beds("bert"), tmp_path / "alone", tmp_path / "out"
    expected = save(bed, DISTILLED, MANY, alone, callbacks=[StopAfterSteps()]).report
    assert {row["epochs"] for row in expected.blocks.values()} == {1}
    job = partial(save_with_callback_on_rank_0, bed, out)
    launch(["--version"], 2, tmp_path, job)
    assert_same_merge(bed, out, alone)


class StopAfterSteps(TrainerCallback):
    """Ends every block after its first pass."""

    def on_epoch_end(self, args, state, control, **kwargs):
        control.should_training_stop = True


class Unwanted(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        raise RuntimeError("rank 0 speaks for all")


def save_with_callback_on_rank_0(bed: Bed, out: Path, rank: int) -> None:
    save(bed, DISTILLED, MANY, out, callbacks=[Unwanted() if rank else StopAfterSteps()])


# -- failures ---------------------------------------------------------------------------------------------------------


def act_at_block(number: int, action: Callable[[], None]) -> None:
    """Does something in the training of a block, after its first update."""
    update, blocks = ElementCoefficients.update, set()

    def acting(self, gradients) -> None:
        update(self, gradients)
        blocks.add(id(self.optimizer))
        if len(blocks) == number:
            action()

    ElementCoefficients.update = acting


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def bug() -> None:
    raise ValueError("out of memory")


def fail_on(bed: Bed, out: Path, victim: int, action: Callable[[], None], rank: int) -> None:
    if rank == victim:
        act_at_block(2, action)
    with pytest.raises(Exception) as caught:
        save(bed, DISTILLED, MANY, out)
    (out.parent.parent / f"error{rank}.json").write_text(json.dumps([type(caught.value).__name__, str(caught.value)]))


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this system has no SIGKILL")
@pytest.mark.parametrize(("victim", "again"), [(1, 1), (0, 3)])
def test_killed_rank_leaves_finished_blocks(beds, tmp_path: Path, victim: int, again: int):
    bed, alone, out = beds("bert"), tmp_path / "alone", tmp_path / "merges" / "out"
    out.parent.mkdir()
    codes, logs = launch(["--version"], 2, tmp_path, partial(fail_on, bed, out, victim, kill))
    assert codes[victim] == -signal.SIGKILL, logs
    name, message = json.loads((tmp_path / f"error{1 - victim}.json").read_text())
    assert name == RankLostError.__name__
    assert "continues the merge" in message
    assert not out.exists()
    finished = sorted(out.with_name("out.work").glob("*.safetensors"))
    assert [path.name for path in finished] == ["bert.encoder.layer.0.safetensors"]
    launch(["--version"], again, tmp_path / "again", partial(count_blocks, bed, out))
    trained = [(tmp_path / f"blocks{rank}").read_text() for rank in range(again)]
    assert trained == ["2"] * again, "the finished block is kept"
    save(bed, DISTILLED, MANY, alone)
    assert_same_merge(bed, out, alone)
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def kill_in_sum(bed: Bed, out: Path, victim: int, count: int, rank: int) -> None:
    """A rank dies while the others sum tensors with it, after some tensors of its own."""
    one_sum, left = Ranks._sum, [count]

    def dying(self, *args) -> Tensor:
        left[0] -= 1
        if left[0] == 0:
            kill()
        return one_sum(self, *args)

    if rank == victim:
        Ranks._sum = dying
    with pytest.raises(RankLostError):
        save(bed, DISTILLED, MANY, out)
    (out.parent.parent / f"lost{rank}").touch()


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this system has no SIGKILL")
@pytest.mark.parametrize("count", [1, 5, 40, 120])
@pytest.mark.parametrize("victim", range(3))
def test_kills_in_the_middle_of_sums(beds, tmp_path: Path, victim: int, count: int):
    bed, out = beds("bert"), tmp_path / "merges" / "out"
    out.parent.mkdir()
    codes, logs = launch(["--version"], 3, tmp_path, partial(kill_in_sum, bed, out, victim, count))
    assert codes[victim] == -signal.SIGKILL, logs
    assert all((tmp_path / f"lost{rank}").exists() for rank in range(3) if rank != victim), logs
    save(bed, DISTILLED, MANY, out)
    save(bed, DISTILLED, MANY, tmp_path / "alone")
    assert_same_merge(bed, out, tmp_path / "alone")
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def count_blocks(bed: Bed, out: Path, rank: int) -> None:
    merge_block, count = ProDistill.merge_block, [0]

    def counting(self, block) -> None:
        count[0] += 1
        merge_block(self, block)

    ProDistill.merge_block = counting
    save(bed, DISTILLED, MANY, out)
    (out.parent.parent / f"blocks{rank}").write_text(str(count[0]))


@pytest.mark.parametrize("victim", [0, 1])
def test_error_on_one_rank_is_one_error_on_all(beds, tmp_path: Path, victim: int):
    out = tmp_path / "merges" / "out"
    out.parent.mkdir()
    launch(["--version"], 3, tmp_path, partial(fail_on, beds("bert"), out, victim, bug))
    for rank in range(3):
        name, message = json.loads((tmp_path / f"error{rank}.json").read_text())
        assert name == ("ValueError" if rank == victim else MergeError.__name__)
        assert "out of memory" in message
        assert (f"Rank {victim}" in message) == (rank != victim)
    assert_nothing_left(out)
    assert not list(out.parent.iterdir())


def fail_in_a_sum(bed: Bed, out: Path, rank: int) -> None:
    """The memory of a rank does not suffice when all of them are summing."""
    if rank == 1:
        Ranks._sum = lambda self, *args: bug()
    with pytest.raises(ValueError if rank == 1 else RankLostError):
        save(bed, DISTILLED, MANY, out)
    (out.parent.parent / f"ended{rank}").touch()


def test_error_in_the_middle_of_a_sum_ends_the_merge(beds, tmp_path: Path):
    out = tmp_path / "merges" / "out"
    out.parent.mkdir()
    _, logs = launch(["--version"], 3, tmp_path, partial(fail_in_a_sum, beds("bert"), out))
    assert all((tmp_path / f"ended{rank}").exists() for rank in range(3)), logs
    assert not out.exists()


def save_other_samples(bed: Bed, out: Path, rank: int) -> None:
    with pytest.raises(MergeError, match="Rank 1 was given other calibration samples than rank 0"):
        save(bed, DISTILLED, MANY - rank, out)
    (out.parent.parent / f"refused{rank}").touch()


def save_with_other_options(bed: Bed, out: Path, rank: int) -> None:
    with pytest.raises(MergeError, match="'gradient_accumulation_steps': 1, 2"):
        save(bed, DISTILLED, MANY, out, {"gradient_accumulation_steps": 1 + rank})
    (out.parent.parent / f"refused{rank}").touch()


@pytest.mark.parametrize("call", [save_other_samples, save_with_other_options])
def test_other_samples_or_options_on_a_rank_are_refused(beds, tmp_path: Path, call: Callable):
    out = tmp_path / "merges" / "out"
    out.parent.mkdir()
    _, logs = launch(["--version"], 2, tmp_path, partial(call, beds("bert"), out))
    assert all((tmp_path / f"refused{rank}").exists() for rank in range(2)), logs
    assert not list(out.parent.iterdir())


# -- the parts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("counts", [[[4, 4, 3], [4, 1]], [[1, 1, 1, 1], [1, 1, 1, 1]], [[1]]])
@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_ranks_divide_every_batch(counts: list[list[int]], size: int):
    batches = [
        [Batch({"input_ids": torch.arange(count) + 10 * index}, count) for index, count in enumerate(one)]
        for one in counts
    ]
    parts = [own_batches(Ranks(rank, size), batches) for rank in range(size)]
    for task, one in enumerate(batches):
        for index, batch in enumerate(one):
            held = [part[task, index] for part in parts if (task, index) in part]
            assert sum(part.count for part in held) == batch.count
            assert sorted(torch.cat([part.inputs["input_ids"] for part in held]).tolist()) == (
                batch.inputs["input_ids"].tolist()
            )
            assert max(part.count for part in held) - min(part.count for part in held) <= 1
            assert len(held) == min(size, batch.count)
    totals = [sum(batch.count for batch in part.values()) for part in parts]
    assert max(totals) - min(totals) <= 1
    assert (0, 0) in parts[0], "rank 0 has a sample to check the models with"


def test_a_method_says_whether_it_divides_samples(beds, monkeypatch: pytest.MonkeyPatch):
    """One that does not know of ranks is run by rank 0 alone, also where it is the start of another."""
    bed = beds("bert")

    def divisible(config: MergeConfig) -> bool:
        return is_divisible(Merger.from_pretrained(bed.experts, config, base_model=bed.base).plan)

    after_regmean = ProDistillConfig(init="regmean")
    assert divisible(RegMeanConfig()) and divisible(after_regmean)
    monkeypatch.setattr(RegMean, "divides_samples", BlockMethod.divides_samples)
    assert not divisible(RegMeanConfig()) and not divisible(after_regmean)
    assert divisible(DISTILLED)
