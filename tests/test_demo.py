"""The demo: end to end on a few images, and (slow) whole, with the order of methods that it is meant to show."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoModelForImageClassification

from hf_merge import AutoMergedModelForImageClassification, MissingDependencyError, OutputError
from hf_merge import demo as demo_module
from hf_merge.demo import METHODS, RESULTS_NAME, TASKS, DemoResult, examples, load_digits, run_demo


@pytest.fixture
def few_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """A smaller model, and 264 images, 64 of them to train on."""
    images, digits = load_digits()
    monkeypatch.setattr(demo_module, "load_digits", lambda: (images[:264], digits[:264]))
    monkeypatch.setattr(demo_module, "TRAINING_IMAGES", 64)
    monkeypatch.setattr(demo_module, "HIDDEN_SIZE", 32)


def test_end_to_end(few_images: None, tmp_path: Path) -> None:
    lines: list[str] = []
    result = run_demo(tmp_path / "out", echo=lines.append)
    assert list(result.accuracies) == ["individual", *METHODS]
    assert all(set(values) == {task.name for task in TASKS} for values in result.accuracies.values())
    assert json.loads((tmp_path / "out" / RESULTS_NAME).read_text()) == result.accuracies
    assert f'from_pretrained("{result.folder.as_posix()}")' in "\n".join(lines)
    AutoModelForImageClassification.from_pretrained(result.folder)
    for task in TASKS:
        model = AutoMergedModelForImageClassification.from_pretrained(result.folder, task=task.name)
        assert tuple(model.config.id2label.values()) == task.labels


def test_same_numbers_again_and_former_demo_replaced(few_images: None, tmp_path: Path) -> None:
    first = run_demo(tmp_path, echo=lambda line: None)
    leftover = tmp_path / "merged" / "leftover.txt"
    leftover.write_text("")
    assert run_demo(tmp_path, echo=lambda line: None).accuracies == first.accuracies
    assert not leftover.exists()


def test_foreign_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("my only copy")
    with pytest.raises(OutputError, match="no former demo"):
        run_demo(tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "my only copy"


def test_missing_scikit_learn_names_the_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(MissingDependencyError, match=r'pip install "hf_merge\[demo\]"'):
        run_demo(tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_examples_are_what_the_task_says(task: demo_module.Task) -> None:
    images, digits = load_digits()
    pixels, classes = examples(task, images[:20], digits[:20])
    assert pixels.shape == (20, 1, 8, 8) and pixels.min() >= -1 and pixels.max() <= 1
    assert set(classes.tolist()) <= set(range(len(task.labels)))


def test_table() -> None:
    result = DemoResult({"individual": {"a": 0.8, "b": 0.5}, "average": {"a": 0.4, "b": 0.5}})
    assert result.mean("average") == pytest.approx(0.45)
    assert result.normalized("average") == pytest.approx(0.75)
    header, *rows = result.table().splitlines()
    assert header.split() == ["accuracy", "a", "b", "mean", "normalized"]
    assert [row.split() for row in rows] == [
        ["individual", "0.800", "0.500", "0.650", "1.000"],
        ["average", "0.400", "0.500", "0.450", "0.750"],
    ]
    assert len({len(line) for line in (header, *rows)}) == 1


@pytest.mark.slow
def test_merging_costs_less_with_better_methods(tmp_path: Path) -> None:
    result = run_demo(tmp_path, echo=lambda line: None)
    assert min(result.accuracies["individual"].values()) > 0.85
    assert result.mean("average") < result.mean("individual") - 0.15
    assert result.mean("WUDI") > result.mean("average") + 0.05
    assert result.mean("WUDI") > max(result.mean("task arithmetic"), result.mean("TIES"))
    assert np.isclose(result.normalized("individual"), 1)
