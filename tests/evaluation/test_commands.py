"""`hf-merge eval`, `compare`, `report`, `card` and `push`: what they print, and one clear line for bad input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers.utils import logging as transformers_logging

from hf_merge.evaluation import EvaluationResult, evaluate_merge, read_tasks

from ..testing_utils import assert_one_line_error, run_cli
from .helpers import Place, tasks


def test_eval_prints_and_saves(place: Place, capsys: pytest.CaptureFixture[str]):
    assert run_cli(["eval", str(place.merged), "--tasks", place.tasks, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == evaluate_merge(place.merged, tasks()).to_dict()
    assert EvaluationResult.load(place.merged).to_dict() == printed
    (place.merged / "evaluation.json").unlink()
    assert run_cli(["eval", str(place.merged), "-t", place.tasks, "--no-save", "--no-experts"]) == 0
    assert capsys.readouterr().out.splitlines()[0].split() == [
        "task",
        "metric",
        "merged",
        "expert",
        "normalized",
        "samples",
    ]
    assert EvaluationResult.load(place.merged) is None


def test_compare_sweeps_and_resumes(place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    results = tmp_path / "results.jsonl"
    command = ["compare", "linear", "task_arithmetic", "--sweep", "task_arithmetic.scaling=[0.2, 0.4]", *place.options]
    command += ["--tasks", place.tasks, "--results", str(results), "--num-samples", "4", "--json"]
    assert run_cli(command) == 0
    first = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in first["rows"]] == [
        "linear",
        "task_arithmetic scaling=0.2",
        "task_arithmetic scaling=0.4",
    ]
    assert len(results.read_text().splitlines()) == 4
    assert run_cli(command) == 0
    assert json.loads(capsys.readouterr().out) == first
    assert len(results.read_text().splitlines()) == 4


def test_interrupted_comparison_goes_on(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    results = tmp_path / "results.jsonl"
    command = [
        "compare",
        "linear",
        "ties",
        *place.options,
        "-t",
        place.tasks,
        "-r",
        str(results),
        "--num-samples",
        "4",
    ]

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as context:
        context.setattr("hf_merge.evaluation.comparison.PeakMemory", interrupt)
        assert run_cli(command) == 130
    assert capsys.readouterr().err.strip() == "interrupted: run the same command again to continue"
    assert len(results.read_text().splitlines()) == 1  # the experts' own row
    assert run_cli(command) == 0
    assert len(results.read_text().splitlines()) == 3


def test_compare_takes_recipes_with_their_models(place: Place, capsys: pytest.CaptureFixture[str]):
    recipe = place.merged / "merge_config.json"
    assert run_cli(["compare", str(recipe), "ties", "--tasks", place.tasks, "--num-samples", "4"]) == 0
    printed = capsys.readouterr().out
    assert "merge_config.json: task_arithmetic" in printed
    assert "best on the calibration rows:" in printed


def test_report_and_card(place: Place, capsys: pytest.CaptureFixture[str]):
    pytest.importorskip("matplotlib")
    assert run_cli(["eval", str(place.merged), "-t", place.tasks]) == 0
    assert run_cli(["report", str(place.merged)]) == 0
    assert run_cli(["card", str(place.merged)]) == 0
    assert "merge_report.html" in capsys.readouterr().out
    assert "## Results" in (place.merged / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["eval", "{merged}", "--tasks", "absent.yaml"], "Cannot read the tasks"),
        (["eval", "{merged}", "--tasks", "{bad}"], "'data' is missing"),
        (["eval", "absent/absent/absent", "--tasks", "{tasks}"], "does not exist"),
        (["eval", "{merged}", "--tasks", "{tasks}", "--device", "abacus"], "--device 'abacus'"),
        (["compare", "linear", "--tasks", "{tasks}"], "No experts were given"),
        (["compare", "lineer", "--tasks", "{tasks}"], "Cannot read the recipe 'lineer'"),
        (["compare", "linear", "linear", "--tasks", "{tasks}"], "given twice"),
        (["compare", "linear", "--sweep", "ties.density=[1]", "--tasks", "{tasks}"], "none of the recipes"),
        (["compare", "ties", "--sweep", "ties.density=1", "--tasks", "{tasks}"], "METHOD.KEY=[VALUE"),
        (["compare", "ties", "--sweep", "ties.densty=[1]", "--tasks", "{tasks}"], "Did you mean 'density'"),
        (["compare", "ties", "--tasks", "{tasks}", "--num-samples", "-1", "-e", "{a}", "-e", "{b}"], "num_samples"),
        (["report", "{folder}"], "merge_config.json"),
        (["report", "{merged}", "--comparison", "absent.jsonl"], "no file 'absent.jsonl'"),
        (["card", "{folder}"], "merge_config.json"),
        (["push", "{folder}", "me/x"], "no merged model"),
        (["push", "absent", "me/x"], "does not exist"),
        (["push", "{merged}", "me/x", "--head", "aa"], "Did you mean 'a'"),
    ],
)
def test_bad_input_is_one_line(words: list[str], said: str, place: Place, capsys: pytest.CaptureFixture[str]):
    bad = place.folder / "bad.yaml"
    bad.write_text("a: {metric: accuracy}\n", encoding="utf-8")
    names = {"merged": place.merged, "tasks": place.tasks, "folder": place.folder, "bad": bad, **place.experts}
    code = run_cli([word.format(**names) for word in words])
    assert_one_line_error(capsys, code, said)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("- a\n", "mapping of tasks"),
        ("a: {data: a.jsonl, metrics: f1}\n", "Did you mean 'metric'"),
        ("a: {data: absent.jsonl}\n", "there is no file"),
        ("a: {data: tasks.txt}\n", "its ending"),
        ("a: {data: a.jsonl, metric: acuracy}\n", "Did you mean 'accuracy'"),
        ("a: {data: broken.jsonl}\n", "cannot be read"),
        ("a: [\n", "Cannot read the tasks"),
    ],
)
def test_bad_files_of_tasks(content: str, said: str, place: Place, capsys: pytest.CaptureFixture[str]):
    (place.folder / "tasks.txt").write_text(content, encoding="utf-8")
    (place.folder / "broken.jsonl").write_text('{"a": 1}\n{"a":', encoding="utf-8")
    code = run_cli(["eval", str(place.merged), "--tasks", str(place.folder / "tasks.txt")])
    assert_one_line_error(capsys, code, said)


def test_tasks_are_relative_to_their_file(place: Place, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.chdir(tmp_path)
    assert set(read_tasks(place.tasks)) == {"a", "b"}


@pytest.mark.parametrize(
    ("command", "missing"),
    [("report", "merge_config.json and no merge_report.json"), ("card", "merge_config.json and no config.json")],
)
def test_folder_that_is_not_merged(command: str, missing: str, tmp_path: Path, capsys):
    assert run_cli([command, str(tmp_path)]) == 2
    assert f"holds no {missing}, so it is no merged model: name a folder" in capsys.readouterr().err


def test_eval_shows_no_bars_of_transformers(place: Place, capsys: pytest.CaptureFixture[str]):
    transformers_logging.enable_progress_bar()
    try:
        assert run_cli(["eval", str(place.merged), "--tasks", place.tasks]) == 0
        assert transformers_logging.is_progress_bar_enabled()
    finally:
        transformers_logging.disable_progress_bar()
    shown = capsys.readouterr().err
    assert "Loading weights" not in shown
