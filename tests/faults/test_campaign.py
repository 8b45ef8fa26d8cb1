"""Whatever happens to a merge, the disk or the clock: no folder that loads with wrong weights, ever. A merge ends in a complete
folder, or in one clear message with nothing left behind, or it was killed and the same command completes it to the same bits.

Each fault is drawn from its seed: which file, which byte, which operation. `make test` runs one seed of each, `make slow` the rest.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from ..processes import contents, kill_after, start
from ..testing_utils import Bed, classifier_bed, dense_average, llama_bed, run_process
from ..zoo import edit_json
from .injection import (
    CHANGE,
    READ,
    REMOVE,
    JumpingClock,
    Replacement,
    SmallFiles,
    broken,
    die,
    no_space,
    read_only,
)
from .scene import Scene


SEEDS = 10

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs signals and limits of POSIX")


@pytest.fixture(autouse=True)
def no_power_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """Merges that nothing happens to need not wait for the disk."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture(scope="module")
def classifiers(tmp_path_factory: pytest.TempPathFactory) -> Bed:
    return classifier_bed(tmp_path_factory.mktemp("classifiers"), max_shard_size="20KB")


@pytest.fixture(scope="module")
def llamas(tmp_path_factory: pytest.TempPathFactory) -> Bed:
    return llama_bed(tmp_path_factory.mktemp("llamas"))


def flipped(data: bytes, position: int, bit: int) -> bytes:
    changed = bytearray(data)
    changed[position] ^= 1 << bit
    return bytes(changed)


def header_end(data: bytes) -> int:
    return 8 + int.from_bytes(data[:8], "little")


def other_values(data: bytes) -> bytes:
    """A shard like this one with the last bit of every float32 flipped: other values, all finite."""
    end = header_end(data)
    return data[:end] + bytes(byte ^ (index % 4 == 0) for index, byte in enumerate(data[end:]))


# -- faults while the merge runs ----------------------------------------------------------------------------------


def killed_at_an_operation(scene: Scene) -> None:
    expected, everything = scene.fresh(), (READ, CHANGE, REMOVE)
    scene.check(scene.struck(scene.disk(scene.inputs, everything, die)), [expected])
    scene.check_resumed(expected)


def killed_at_a_time(scene: Scene) -> None:
    expected = scene.fresh()
    begin = time.perf_counter()
    scene.fresh()
    delay = scene.draw.uniform(0, time.perf_counter() - begin)
    process = start(scene.command(), log=scene.log)
    kill_after(process, scene.out, delay)
    scene.check(process.exitcode, [expected])
    scene.check_resumed(expected)


def killed_many_times(scene: Scene) -> None:
    expected = scene.fresh()
    for _ in range(4):
        if not scene.out.exists():
            code = scene.struck(scene.disk(scene.out.parent, (CHANGE, REMOVE), die))
            scene.check(code, [expected])
    scene.check_resumed(expected)


def disk_full(scene: Scene) -> None:
    expected = scene.fresh()
    scene.check(scene.struck(scene.disk(scene.out.parent, (CHANGE,), no_space, lasting=True)), [expected])
    scene.check_resumed(expected)


def write_error(scene: Scene) -> None:
    expected = scene.fresh()
    scene.check(scene.struck(scene.disk(scene.out.parent, (CHANGE,), broken)), [expected])
    scene.check_resumed(expected)


def file_size_limit(scene: Scene) -> None:
    expected = scene.fresh()
    scene.check(scene.struck(SmallFiles(scene.draw.randrange(100, 40_000))), [expected])
    scene.check_resumed(expected)


def read_error(scene: Scene) -> None:
    expected = scene.fresh()
    scene.check(scene.struck(scene.disk(scene.inputs, (READ,), broken)), [expected])
    scene.check_resumed(expected)


def read_only_disk(scene: Scene) -> None:
    """Nothing can be removed either, so that the unfinished part stays."""
    expected = scene.fresh()
    fault = scene.disk(scene.out.parent, (CHANGE, REMOVE), read_only, lasting=True)
    scene.check(scene.struck(fault), [expected], resumable=True)
    scene.check_resumed(expected)


def jumping_clock(scene: Scene) -> None:
    expected = scene.fresh()
    scene.check(scene.struck(JumpingClock(scene.draw.randrange(1000))), [expected])
    scene.check_resumed(expected)


def _change_while_running(scene: Scene, change: Callable[[bytes], bytes | None], in_place: bool) -> Path:
    before = scene.fresh()
    path = scene.draw.choice(scene.shards())
    replacement = Replacement(path, change(path.read_bytes()), in_place)
    code = scene.struck(scene.disk(scene.inputs, (READ,), replacement))
    after = None
    if replacement.content is not None and len(replacement.content) == path.stat().st_size:
        readable = replacement.content[:8] == path.read_bytes()[:8]
        after = scene.fresh() if readable and _loads(path) else None
    scene.check(code, [before] if after is None else [before, after])
    return path


def _loads(path: Path) -> bool:
    try:
        load_file(path)
    except (SafetensorError, OSError):
        return False
    return True


def input_replaced(scene: Scene) -> None:
    _change_while_running(scene, other_values, in_place=False)
    shutil.rmtree(scene.out, ignore_errors=True)
    scene.check_resumed(scene.fresh())


def input_overwritten(scene: Scene) -> None:
    _change_while_running(scene, other_values, in_place=True)
    shutil.rmtree(scene.out, ignore_errors=True)
    scene.check_resumed(scene.fresh())


def input_removed(scene: Scene) -> None:
    _change_while_running(scene, lambda data: None, in_place=False)


def input_truncated(scene: Scene) -> None:
    _change_while_running(scene, lambda data: data[: scene.draw.randrange(len(data))], in_place=True)


# -- changes between a kill and the second run --------------------------------------------------------------------


def _resume_after(scene: Scene, change: Callable[[], None]) -> None:
    scene.killed()
    shutil.rmtree(scene.out, ignore_errors=True)
    change()
    scene.check_resumed(scene.fresh())


def replaced_before_resuming(scene: Scene) -> None:
    path = scene.draw.choice(scene.shards())
    _resume_after(scene, Replacement(path, other_values(path.read_bytes()), in_place=scene.draw.random() < 0.5))


def replaced_under_the_same_time(scene: Scene) -> None:
    """As `cp -p` and `rsync -t` do: the size and the time of the last change are those of the old file."""
    path = scene.draw.choice(scene.shards())
    state = path.stat()
    replacement = Replacement(path, other_values(path.read_bytes()), in_place=scene.draw.random() < 0.5)

    def change() -> None:
        replacement()
        os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))

    _resume_after(scene, change)


def config_changed_before_resuming(scene: Scene) -> None:
    key = "rms_norm_eps" if "rms_norm_eps" in (scene.bed.base / "config.json").read_text() else "layer_norm_eps"
    folders = [*scene.bed.experts.values(), scene.bed.base]
    _resume_after(scene, lambda: [edit_json(folder / "config.json", **{key: 0.25}) for folder in folders])


def removed_before_resuming(scene: Scene) -> None:
    expected = scene.fresh()
    path = scene.draw.choice(scene.shards())
    content = path.read_bytes()
    scene.killed()
    shutil.rmtree(scene.out, ignore_errors=True)
    path.unlink()
    scene.check(scene.struck(None), [], resumable=True)
    path.write_bytes(content)
    scene.check_resumed(expected)


def touched_before_resuming(scene: Scene) -> None:
    """Times in the past and in the future."""
    seconds = scene.draw.choice([0, 1, 2**31 - 1, 2**33, int(time.time()) + 10**7])
    _resume_after(scene, lambda: [os.utime(path, (seconds, seconds)) for path in scene.shards()])


def partial_of_another_recipe(scene: Scene) -> None:
    expected = scene.fresh()
    code = scene.struck(scene.disk(scene.out.parent, (CHANGE,), die), "--set", "density=0.5")
    assert code == -signal.SIGKILL
    shutil.rmtree(scene.out, ignore_errors=True)
    scene.check_resumed(expected)


def damaged_partial(scene: Scene) -> None:
    expected = scene.fresh()
    scene.killed()
    partial = scene.out.with_name("out.partial")
    files = sorted(path for path in partial.rglob("*") if path.is_file()) if partial.is_dir() else []
    for path in files:
        data = path.read_bytes()
        if scene.draw.random() < 0.5 and data:
            # Ends early, as a file that was not synced when the power went; or has room and no content.
            cut = scene.draw.randrange(len(data))
            path.write_bytes(
                data[:cut] if path.suffix != ".safetensors" or scene.draw.random() < 0.5 else bytes(len(data))
            )
    scene.check_resumed(expected)


# -- damaged inputs -----------------------------------------------------------------------------------------------


def _expected_average(bed: Bed) -> dict[str, torch.Tensor]:
    """The mean of the experts by names on disk; heads that differ are the first expert's."""
    states = [
        {key: value for path in sorted(folder.glob("*.safetensors")) for key, value in load_file(path).items()}
        for folder in bed.experts.values()
    ]
    heads = {key: value for key, value in states[0].items() if key.startswith("classifier.")}
    shared = [{key: value for key, value in state.items() if key not in heads} for state in states]
    return dense_average(shared) | heads


def _check_average(scene: Scene, code: int) -> None:
    """The result has the values that safetensors reads from the damaged files, or they were refused."""
    if code == 2:
        scene.check(code, [])
        return
    assert code == 0
    merged = {k: v for path in sorted(scene.out.glob("*.safetensors")) for k, v in load_file(path).items()}
    expected = _expected_average(scene.bed)
    assert merged.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.isfinite(value).all(), f"'{key}' is not finite and was not refused"
        assert torch.equal(merged[key], value), key
    for task, folder in scene.bed.experts.items():
        if (scene.out / "heads").exists():
            state = {k: v for path in folder.glob("*.safetensors") for k, v in load_file(path).items()}
            for key, value in load_file(scene.out / "heads" / task / "model.safetensors").items():
                assert torch.equal(value, state[key]), key


def _damage_expert(scene: Scene, damage: Callable[[bytes], bytes]) -> None:
    scene.method = "linear"
    path = scene.draw.choice([shard for shard in scene.shards() if shard.parent != scene.bed.base])
    path.write_bytes(damage(path.read_bytes()))
    _check_average(scene, scene.struck(None))


def bit_flips_in_data(scene: Scene) -> None:
    def damage(data: bytes) -> bytes:
        for _ in range(scene.draw.choice([1, 1, 50])):
            data = flipped(data, scene.draw.randrange(header_end(data), len(data)), scene.draw.randrange(8))
        return data

    _damage_expert(scene, damage)


def bit_flips_in_a_header(scene: Scene) -> None:
    _damage_expert(scene, lambda data: flipped(data, scene.draw.randrange(header_end(data)), scene.draw.randrange(8)))


def truncated_shard(scene: Scene) -> None:
    scene.method = "linear"
    path = scene.draw.choice(scene.shards())
    path.write_bytes(path.read_bytes()[: scene.draw.randrange(path.stat().st_size)])
    code = scene.struck(None)
    assert code == 2
    scene.check(code, [])


FAULTS = [
    killed_at_an_operation,
    killed_at_a_time,
    killed_many_times,
    disk_full,
    write_error,
    file_size_limit,
    read_error,
    read_only_disk,
    jumping_clock,
    input_replaced,
    input_overwritten,
    input_removed,
    input_truncated,
    replaced_before_resuming,
    replaced_under_the_same_time,
    config_changed_before_resuming,
    removed_before_resuming,
    touched_before_resuming,
    partial_of_another_recipe,
    damaged_partial,
    bit_flips_in_data,
    bit_flips_in_a_header,
    truncated_shard,
]
COVERED = {killed_at_a_time, killed_many_times, input_replaced, replaced_before_resuming, truncated_shard}
"""Left to `make slow` altogether: other tests of `make test` are much like them."""
BEDS = ("llamas", "classifiers")
CASES = [
    pytest.param(
        fault,
        BEDS[(number + seed) % 2],
        seed,
        id=f"{fault.__name__}-{seed}",
        marks=[pytest.mark.slow] if seed or fault in COVERED else [],
    )
    for number, fault in enumerate(FAULTS)
    for seed in range(SEEDS)
]


@pytest.mark.parametrize(("fault", "bed", "seed"), CASES)
def test_fault(fault: Callable[[Scene], None], bed: str, seed: int, tmp_path: Path, request: pytest.FixtureRequest):
    models = request.getfixturevalue(bed).copy(tmp_path / "bed")
    fault(Scene(models, random.Random(f"{fault.__name__}-{seed}")))


# -- languages ----------------------------------------------------------------------------------------------------

ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


@pytest.mark.parametrize(
    "variables",
    [ASCII, pytest.param({"LC_ALL": "tr_TR.UTF-8"}, marks=pytest.mark.slow), pytest.param({}, marks=pytest.mark.slow)],
    ids=["ascii", "turkish", "default"],
)
def test_locale_does_not_reach_the_result(variables: dict[str, str], llamas: Bed, tmp_path: Path):
    """Also where texts beside the weights, and the folders, have letters that the locale does not know: only what the result says
    about the folders may differ."""
    bed = llamas.copy(tmp_path / "İılâ")
    for folder in bed.experts.values():
        (folder / "chat_template.jinja").write_text("{{ 'größer ı' }}", encoding="utf-8")
    scene = Scene(bed, random.Random(0))
    expected = scene.fresh()
    done = run_process([sys.executable, "-m", "hf_merge", *scene.command()], **variables)
    assert done.returncode == 0, done.stderr[-2000:]
    written = contents(scene.out)
    assert {name for name in expected if written[name] != expected[name]} <= {"README.md", "merge_config.json"}
