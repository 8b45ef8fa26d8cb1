"""One merge of the campaign: its models, the process that is struck, and what must hold afterwards."""

from __future__ import annotations

import random
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..processes import contents, start
from ..testing_utils import Bed, assert_nothing_left, run_cli
from .injection import CHANGE, Disk, Note, Strike, die


SHARDS = ("--max-shard-size", "20KB")
ALONE = ("--num-proc", "1")
"""For faults at an operation that is counted: which fork does what is not the same each time."""
PATIENCE = 120
"""Seconds after which a merge of a hundred kilobytes hangs."""

_COUNTS: dict[tuple, int] = {}


@dataclass
class Scene:
    """A merge that something happens to.

    Args:
        bed (`Bed`): The models, free to be spoiled.
        draw (`random.Random`): Decides what happens where.
        method (`str`): The merge method.
    """

    bed: Bed
    draw: random.Random
    method: str = "ties"
    _fresh: int = field(default=0, repr=False)

    @property
    def out(self) -> Path:
        """In a folder of its own, where nothing else may be left."""
        return self.bed.folder / "results" / "out"

    @property
    def inputs(self) -> Path:
        return self.bed.folder

    @property
    def log(self) -> Path:
        return self.bed.folder / "log.txt"

    def command(self, out: Path | None = None, *extra: str) -> list[str]:
        """The arguments of `hf-merge`."""
        out = self.out if out is None else out
        out.parent.mkdir(exist_ok=True)
        arguments = self.bed.command(*SHARDS, *extra, method=self.method)
        arguments[arguments.index("--out") + 1] = str(out)
        return arguments

    def shards(self) -> list[Path]:
        """The weight files of the experts and the base."""
        folders = [*self.bed.experts.values(), self.bed.base]
        return sorted(path for folder in folders for path in folder.glob("*.safetensors"))

    def fresh(self) -> dict[str, bytes]:
        """What a merge writes that nothing happens to."""
        self._fresh += 1
        out = self.bed.folder / f"fresh{self._fresh}" / "out"
        assert run_cli(self.command(out)) == 0
        return contents(out)

    def struck(self, prepare: Callable[[], None] | None, *extra: str) -> int:
        """The exit code of a process that `prepare` happens to."""
        alone = ALONE if isinstance(prepare, Disk) else ()
        process = start(self.command(None, *extra, *alone), prepare=prepare, log=self.log)
        process.join(PATIENCE)
        if process.is_alive():
            process.kill()
            raise AssertionError("the merge hangs")
        return process.exitcode

    def operations(self, root: Path, kinds: tuple[str, ...]) -> int:
        """How many operations there are below a folder when nothing happens."""
        key = (self.bed.model_class, str(root.relative_to(self.bed.folder)), kinds)
        if key not in _COUNTS:
            _COUNTS[key] = self._rehearse(root, kinds)
        return _COUNTS[key]

    def _rehearse(self, root: Path, kinds: tuple[str, ...]) -> int:
        note = self.bed.folder.parent / "operations.txt"
        out = self.bed.folder / "rehearsal" / "out"
        root = out.parent if root == self.out.parent else root
        prepare = Disk(root, kinds, Note(note), 0, lasting=True)
        process = start(self.command(out, *ALONE), prepare=prepare, log=self.log)
        process.join(PATIENCE)
        assert process.exitcode == 0, self.log.read_text(encoding="utf-8")[-2000:]
        return int(note.read_text())

    def disk(self, root: Path, kinds: tuple[str, ...], strike: Strike, lasting: bool = False) -> Disk:
        """A fault at a random operation below a folder."""
        return Disk(root, kinds, strike, self.draw.randrange(self.operations(root, kinds)), lasting)

    # -- what must hold -------------------------------------------------------------------------------------------

    def check(self, code: int, valid: Sequence[Mapping[str, bytes]], *, resumable: bool = False) -> None:
        """The folder is complete, or absent with one clear message; after a kill there is no message.

        Args:
            code (`int`): The exit code.
            valid (`Sequence[Mapping]`): What a complete folder may hold.
            resumable (`bool`): Whether a part of the result may be left beside it.
        """
        message = self.log.read_text(encoding="utf-8")
        assert "Traceback" not in message, message[-3000:]
        assert code in (0, 2, -signal.SIGKILL), f"exit code {code}: {message[-2000:]}"
        if self.out.exists():
            assert code != 2, f"complete, but called a failure: {message[-2000:]}"
            assert contents(self.out) in list(valid), "the folder holds something else than a merge of its inputs"
            return
        assert code != 0, "called a success without a folder"
        if code == 2:
            assert [line for line in message.splitlines() if line.startswith("error: ")], message[-2000:]
            assert_nothing_left(self.out, resumable=resumable)

    def check_resumed(self, expected: Mapping[str, bytes]) -> None:
        """Once nothing happens any more, the same command completes the folder."""
        if not self.out.exists():
            assert run_cli(self.command()) == 0
        assert contents(self.out) == expected
        left = [path.name for path in self.out.parent.iterdir() if path != self.out]
        assert left in ([], ["out.partial.lock"]), left

    def killed(self) -> None:
        """Leaves the part of a merge that a kill at a random moment leaves; sometimes there is none."""
        code = self.struck(self.disk(self.out.parent, (CHANGE,), die))
        assert code == -signal.SIGKILL
        assert not self.out.exists() or contents(self.out)
