"""Helpers of the tests that merge whole checkpoints: a bed of experts, the dense oracle, reloading, and the command line."""

from __future__ import annotations

import atexit
import functools
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import Tensor
from transformers import BertForSequenceClassification, BertModel, PreTrainedModel

from .zoo import ZOO, ZooEntry, perturbed, save_zoo_model


EXPERT_NAMES = ("a", "b", "c")
TASK_LABELS = {"spam": 2, "movies": 3, "emotion": 6}


@dataclass
class Bed:
    """A base model and its fine-tuned copies, on disk.

    Args:
        folder (`Path`): Holds everything; `out` is a folder in it that does not exist yet.
        model_class (`type`): The class that loads them.
        base (`Path`): The base model's folder.
        experts (`dict[str, Path]`): The experts' folders by name.
    """

    folder: Path
    model_class: type[PreTrainedModel]
    base: Path
    experts: dict[str, Path] = field(default_factory=dict)

    @property
    def out(self) -> Path:
        return self.folder / "out"

    def copy(self, folder: Path) -> Bed:
        """The same files at another place, free to be spoiled."""
        shutil.copytree(self.folder, folder, dirs_exist_ok=True)
        moved = {name: folder / path.relative_to(self.folder) for name, path in self.experts.items()}
        return Bed(folder, self.model_class, folder / self.base.relative_to(self.folder), moved)

    def merge(
        self, config, out: Path | None = None, *, base: bool = True, max_shard_size: str = "5GB", **kwargs
    ) -> Path:
        """Merges from disk to disk and returns the output folder."""
        from hf_merge import Merger

        out = self.out if out is None else out
        merger = Merger.from_pretrained(self.experts, config, base_model=self.base if base else None, **kwargs)
        merger.save_pretrained(out, max_shard_size=max_shard_size)
        return out

    def command(self, *extra: str, method: str = "linear", base: bool = True) -> list[str]:
        """The arguments of `hf-merge` for the same merge."""
        experts = [word for name, path in self.experts.items() for word in ("--expert", f"{name}={path}")]
        with_base = ["--base", str(self.base)] if base else []
        return ["run", "--method", method, *experts, *with_base, "--out", str(self.out), *extra]


def make_bed(
    entry: ZooEntry,
    folder: Path,
    *,
    model: PreTrainedModel | None = None,
    names: Sequence[str] = EXPERT_NAMES,
    options: Callable[[str], Mapping] | None = None,
    **save_options,
) -> Bed:
    """Saves a base model and one perturbed copy for each name.

    Args:
        entry ([`ZooEntry`]): The family.
        folder (`Path`): Where to.
        model (`PreTrainedModel`, *optional*): The base model; the family's when not given.
        names (`Sequence[str]`): The experts' names.
        options (`Callable`, *optional*): Gives more arguments of `save_zoo_model` for one of the folders, by its name.
        save_options: Arguments of `save_zoo_model` for all folders.
    """
    model = entry.build() if model is None else model
    bed = Bed(folder, type(model), folder / "base")

    def save(one: PreTrainedModel, name: str) -> Path:
        more = options(name) if options else {}
        return save_zoo_model(one, folder / name, **{**save_options, **more})

    save(model, "base")
    for seed, name in enumerate(names, start=1):
        bed.experts[name] = save(perturbed(model, seed), name)
    return bed


@functools.cache
def _clean_llama_bed() -> Bed:
    folder = Path(tempfile.mkdtemp(prefix="hf_merge_bed_"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    sharded = {"max_shard_size": "20KB"}
    return make_bed(ZOO["llama"], folder, options=lambda name: sharded if name == "b" else {})


def llama_bed(folder: Path) -> Bed:
    """Three tiny Llamas and their base in `folder`; expert `b` is sharded, the others are single files."""
    return _clean_llama_bed().copy(folder)


def classifier_bed(folder: Path, **save_options) -> Bed:
    """Three classifiers over one BERT, with 2, 3 and 6 labels, and the backbone alone as the base.

    Args:
        folder (`Path`): Where to.
        save_options: Arguments of `save_zoo_model`.
    """
    base = BertModel(ZOO["bert"].config())
    bed = Bed(folder, BertForSequenceClassification, save_zoo_model(base, folder / "base", **save_options))
    for seed, (task, count) in enumerate(TASK_LABELS.items()):
        config = ZOO["bert"].config()
        config.num_labels = count
        config.id2label = {index: f"{task}_{index}" for index in range(count)}
        config.label2id = {label: index for index, label in config.id2label.items()}
        torch.manual_seed(seed)
        model = BertForSequenceClassification(config)
        model.bert.load_state_dict(base.state_dict())
        bed.experts[task] = save_zoo_model(perturbed(model, seed), folder / task, **save_options)
    return bed


def load_clean(model_class: type[PreTrainedModel], folder: Path, **kwargs) -> PreTrainedModel:
    """Loads a checkpoint and asserts that every key was found, none was left over and none had another shape."""
    model, info = model_class.from_pretrained(folder, output_loading_info=True, **kwargs)
    for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        assert not info.get(key), f"{key} of '{folder.name}': {sorted(map(str, info[key]))[:5]}"
    return model


def dense_average(states: Sequence[Mapping[str, Tensor]], weights: Sequence[float] | None = None) -> dict[str, Tensor]:
    """The weighted average of state dicts in float32, summed in the experts' order and rounded once. Integers are left out."""
    weights = [1.0] * len(states) if weights is None else list(weights)
    merged = {}
    for name, first in states[0].items():
        if not first.is_floating_point():
            continue
        total = torch.zeros_like(first, dtype=torch.float32)
        for weight, state in zip(weights, states, strict=True):
            total.add_(state[name].float(), alpha=weight)
        merged[name] = (total / sum(weights)).to(first.dtype)
    return merged


def assert_nothing_left(out: Path, *, resumable: bool = False) -> None:
    """After a failure the output folder is absent, and so is the partial one unless the merge can be resumed from it."""
    assert not out.exists(), f"'{out.name}' was left behind: {sorted(path.name for path in out.iterdir())}"
    if not resumable and out.parent.is_dir():
        leftovers = [path.name for path in out.parent.iterdir() if path.name.startswith(out.name)]
        assert not leftovers, f"left behind: {leftovers}"


def run_cli(arguments: Sequence[str]) -> int:
    """Runs `hf-merge` in this process and returns its exit code."""
    from hf_merge.cli import main

    try:
        with mock.patch.object(sys, "argv", ["hf-merge", *arguments]):
            main()
        return 0
    except SystemExit as stop:
        return stop.code or 0


def assert_one_line_error(capsys: pytest.CaptureFixture[str], code: int, *fragments: str) -> None:
    """The command line failed as promised: exit code 2 and one line on stderr, which holds the fragments."""
    captured = capsys.readouterr()
    assert code == 2, f"exit code {code}, stderr: {captured.err[-2000:]}"
    assert "Traceback" not in captured.err
    lines = [line for line in captured.err.splitlines() if line.strip() and "it/s" not in line and "B/s" not in line]
    assert len(lines) == 1, f"not one line: {lines}"
    for fragment in fragments:
        assert fragment.lower() in lines[0].lower(), f"'{fragment}' is not in: {lines[0]}"


def run_process(command: Sequence[str], **variables: str) -> subprocess.CompletedProcess[str]:
    """Runs a command in which `hf_merge` can be imported, and returns its exit code and streams."""
    root = str(Path(__file__).parent.parent)
    variables = {**os.environ, "PYTHONPATH": root, "HF_HUB_OFFLINE": "1", **variables}
    return subprocess.run(command, check=False, capture_output=True, text=True, env=variables)
