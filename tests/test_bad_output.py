"""Output folders that cannot be written: one clear `MergeError`, and everything that was there stays as it was."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from pathlib import Path

import pytest

from hf_merge import LinearConfig, MergeError

from .spoilers import missing_shard
from .testing_utils import Bed, assert_nothing_left, llama_bed, run_process


@pytest.fixture
def bed(tmp_path: Path) -> Bed:
    return llama_bed(tmp_path / "bed")


def unwritable_folder(folder: Path) -> Path:
    """A folder in which nothing can be made, also by root."""
    if hasattr(os, "geteuid") and os.geteuid() != 0:
        locked = folder / "locked"
        locked.mkdir()
        locked.chmod(0o500)
        return locked
    kernel = Path("/proc/sys/kernel")
    if not kernel.is_dir():
        pytest.skip("no folder is read-only for root on this system")
    return kernel


def test_read_only_parent(bed: Bed):
    out = unwritable_folder(bed.folder) / "out"
    with pytest.raises(MergeError, match="out"):
        bed.merge(LinearConfig(), out)
    assert not out.exists()


def test_parent_is_a_file(bed: Bed):
    (bed.folder / "file").write_text("spam")
    with pytest.raises(MergeError, match="file"):
        bed.merge(LinearConfig(), bed.folder / "file" / "out")
    assert (bed.folder / "file").read_text() == "spam"


def test_output_is_a_file(bed: Bed):
    bed.out.write_text("spam")
    with pytest.raises(MergeError, match="out"):
        bed.merge(LinearConfig())
    assert bed.out.read_text() == "spam"


@pytest.mark.parametrize("victim", ["a", "base"])
def test_output_is_an_input(victim: str, bed: Bed):
    folder = bed.base if victim == "base" else bed.experts[victim]
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(MergeError):
        bed.merge(LinearConfig(), folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


LIMITED = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
from hf_merge.cli import main
main()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs RLIMIT_FSIZE")
def test_disk_that_fills_up_in_the_middle(bed: Bed):
    """The file-size limit makes a write fail half-way, after every check has passed."""
    done = run_process([sys.executable, "-c", LIMITED, *bed.command()])
    assert done.returncode == 2, done.stderr[-2000:]
    assert "Traceback" not in done.stderr
    assert_nothing_left(bed.out, resumable=True)


ON_SMALL_DISK = """
set -e
mount -t tmpfs -o size=48k none "$1"
shift
code=0
"$@" || code=$?
ls -A "$DISK"
exit $code
"""


def can_mount() -> bool:
    if sys.platform != "linux" or shutil.which("unshare") is None:
        return False
    script = 'mount -t tmpfs -o size=48k none "$1"'
    probe = ["unshare", "--mount", "sh", "-c", script, "probe", "/mnt"]
    return run_process(probe).returncode == 0


def test_small_disk_is_noticed_before_anything_is_written(bed: Bed):
    if not can_mount():
        pytest.skip("a small tmpfs cannot be mounted here")
    disk = bed.folder / "disk"
    disk.mkdir()
    command = [sys.executable, "-m", "hf_merge", *bed.command()]
    command[command.index("--out") + 1] = str(disk / "out")
    wrapped = ["unshare", "--mount", "sh", "-c", ON_SMALL_DISK, "small", str(disk), *command]
    done = run_process(wrapped, DISK=str(disk))
    assert done.returncode == 2, done.stderr[-2000:]
    assert "space" in done.stderr.lower() and "Traceback" not in done.stderr
    assert done.stdout.split() == [], "files were left on the disk"


def test_command_as_a_process(bed: Bed):
    """Once through a real process: the exit code and the streams are what a shell sees."""
    missing_shard(bed.experts["b"])
    command = [sys.executable, "-m", "hf_merge", *bed.command()]
    done = run_process(command)
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr[:500]


@pytest.mark.parametrize("closed", ["stdout", "stderr"])
def test_closed_streams_change_no_exit_code(bed: Bed, tmp_path: Path, closed: str):
    """The console script ends the process itself, whatever became of its streams."""
    place = {"stdout": ">&-", "stderr": "2>&-"}[closed]
    for out, code in ((tmp_path / "out", 0), (tmp_path / "out", 2)):  # the second time it is not empty
        words = [sys.executable, "-m", "hf_merge", *bed.command(method="linear", base=False)]
        words[words.index("--out") + 1] = str(out)
        done = run_process(["/bin/sh", "-c", f"{shlex.join(words)} {place}"])
        assert done.returncode == code, done.stderr
        assert "Traceback" not in done.stderr
