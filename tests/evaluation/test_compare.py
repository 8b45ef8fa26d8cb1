"""Comparisons: rows are measured on calibration rows only, kept in a file, and the Pareto front is what its definition says."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from hf_merge import ConfigError, LinearConfig, RegMeanConfig, TiesConfig
from hf_merge.evaluation import EvaluationTask, compare_merges, evaluate_merge, grid
from hf_merge.evaluation import comparison as comparison_module
from hf_merge.evaluation.comparison_results import Comparison, ComparisonRow
from hf_merge.evaluation.fingerprints import fingerprint
from hf_merge.evaluation.memory import PeakMemory

from ..vocabularies import word_piece
from .helpers import Place, rows, tasks


CONFIGS = {"average": LinearConfig(), **grid("task_arithmetic", scaling=[0.2, 0.5])}


def compare(place: Place, configs=CONFIGS, **kwargs) -> Comparison:
    kwargs = {"num_samples": 5, "base_model": place.base} | kwargs
    return compare_merges(place.experts, configs, tasks(), **kwargs)


def test_scores_are_those_of_the_rows_that_are_left_for_choosing(place: Place):
    comparison = compare(place)
    assert [row.name for row in comparison.rows] == list(CONFIGS)
    kept = {}
    for name, task in tasks().items():
        merging, choosing = task.divide_calibration(name, 5)
        assert len(merging) == 5
        assert len(choosing) == 15
        assert sorted(map(str, merging + choosing)) == sorted(map(str, task.calibration))
        kept[name] = EvaluationTask(choosing)
    for row, config in zip(comparison.rows, CONFIGS.values(), strict=True):
        expected = evaluate_merge(place.merger(config), kept)
        assert row.scores == {name: score.value for name, score in expected.tasks.items()}
        assert row.normalized == pytest.approx(expected.normalized)
        assert comparison.individual.scores == {name: score.expert for name, score in expected.tasks.items()}
        assert row.test is None
        assert row.seconds > 0


def test_finished_rows_are_not_measured_again(place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    results = tmp_path / "results.jsonl"
    first = compare(place, results=results)
    merges = []
    original = comparison_module.evaluate_merge
    monkeypatch.setattr(comparison_module, "evaluate_merge", lambda *a, **k: merges.append(a) or original(*a, **k))
    again = compare(place, results=results)
    assert merges == []
    assert again.to_dict() == first.to_dict()
    more = compare(place, {**CONFIGS, "ties": TiesConfig()}, results=results)
    assert len(merges) == 1
    assert len(more.rows) == 4
    compare(place, num_samples=6, results=results)  # other rows to choose by: everything is new
    assert len(merges) == 1 + len(CONFIGS)


def always(value: float):
    return lambda predictions, references: value


def test_what_measures_is_identified_by_content(tmp_path: Path):
    rows_, module = [{"text": "a"}], tmp_path / "score.py"

    def of(metric="accuracy", rows=rows_, **options) -> str:
        task = EvaluationTask(rows)
        task.metric = metric
        return fingerprint(rows, replace(task, metric="accuracy", **options) if options else task)

    assert of(always(1.0)) == of(always(1.0)) != of(always(2.0))
    assert of(predict=always(1.0)) == of(predict=always(1.0)) != of()
    assert of(max) != of(max)  # no source: never taken over
    written = []
    for text in ("a", "b", "a"):
        module.write_text(text)
        written.append(of(str(module)))
    assert written[0] == written[2] != written[1]
    tokenizers = [word_piece(words) for words in (["a", "b"], ["b", "a"], ["a", "b"])]
    tokenizers[2](["a", "a b"], padding=True)  # what a call leaves behind is no difference
    first, other, again = (of(processor=tokenizer) for tokenizer in tokenizers)
    assert first == again != other
    ragged = [[{"x": np.array([text, None], dtype=object)}] for text in ("long text", "long" + " text", "other")]
    assert of(rows=ragged[0]) == of(rows=ragged[1]) != of(rows=ragged[2])


def test_a_line_that_was_cut_off_is_measured_again(place: Place, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    results = tmp_path / "results.jsonl"
    first = compare(place, results=results)
    text = results.read_text(encoding="utf-8")
    results.write_text(text[:-40], encoding="utf-8")
    again = compare(place, results=results)
    assert "incomplete" in caplog.text
    assert [row.scores for row in again.rows] == [row.scores for row in first.rows]
    assert all(json.loads(line) for line in results.read_text(encoding="utf-8").splitlines())


def test_a_foreign_file_is_left_alone(place: Place, tmp_path: Path):
    results = tmp_path / "notes.txt"
    results.write_text("a\nb\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="Line 1 .*no row of a comparison"):
        compare(place, results=results)
    assert results.read_text(encoding="utf-8") == "a\nb\n"


def test_methods_with_samples_merge_with_their_share(place: Place, monkeypatch: pytest.MonkeyPatch):
    seen = {}
    original = comparison_module.CalibrationData
    monkeypatch.setattr(
        comparison_module, "CalibrationData", lambda samples, **k: seen.update(samples) or original(samples, **k)
    )
    comparison = compare(place, [RegMeanConfig()], test=True)
    for name, task in tasks().items():
        assert seen[name] == task.divide_calibration(name, 5)[0]
    assert comparison.rows[0].test_mean is not None
    failed = compare(place, [RegMeanConfig(), LinearConfig()], num_samples=0)
    assert list(failed.failed) == ["regmean"]
    assert "num_samples" in str(failed)
    assert [row.name for row in failed.rows] == ["linear"]


def test_front_and_best():
    def row(name: str, quality: float, seconds: float, memory: int) -> ComparisonRow:
        return ComparisonRow(name, name, {"a": quality}, quality, quality, None, seconds, memory)

    rows_ = [row("slow", 0.9, 10, 5), row("quick", 0.8, 1, 9), row("beaten", 0.8, 2, 5), row("small", 0.7, 20, 1)]
    comparison = Comparison(rows_, row("individual", 1.0, 0, 0))
    assert comparison.best.name == "slow"
    assert comparison.front("seconds") == ["slow", "quick"]
    assert comparison.front("peak_memory_bytes") == ["slow", "small"]
    assert "best on the calibration rows: slow" in str(comparison)


def test_equal_candidates_are_both_on_the_front():
    same = [ComparisonRow(name, name, {"a": 0.5}, 0.5, 0.5, None, 1.0, 1) for name in ("x", "y")]
    assert Comparison(same, same[0]).front("seconds") == ["x", "y"]


def test_grid_is_the_product():
    variants = grid(TiesConfig(scaling=2.0), density=[0.1, 0.2], merge=["mean", "sum"])
    assert len(variants) == 4
    assert variants['ties density=0.1 merge="sum"'].merge == "sum"
    assert all(one.scaling == 2.0 for one in variants.values())
    with pytest.raises(ConfigError, match="method 'ties' has no setting 'densty'.*Did you mean 'density'"):
        grid("ties", densty=[1])


@pytest.mark.parametrize(
    ("configs", "said"),
    [([], "no recipes"), (["wudi"], "must be a MergeConfig"), ({"individual": LinearConfig()}, "experts' own row")],
)
def test_bad_recipes(configs, said: str, place: Place):
    with pytest.raises(ConfigError, match=said):
        compare(place, configs)


def test_rows_to_choose_by_are_needed(place: Place):
    with pytest.raises(ConfigError, match="no calibration rows"):
        compare_merges(place.experts, [LinearConfig()], {"a": EvaluationTask(rows(3)["a"])}, base_model=place.base)
    with pytest.raises(ConfigError, match="none are left"):
        compare(place, num_samples=20)
    with pytest.raises(ConfigError, match="num_samples"):
        compare(place, num_samples=-1)


def test_memory_is_the_growth_of_a_piece_of_work():
    with PeakMemory() as memory:
        content = bytearray(50_000_000)
        content[::4096] = b"x" * len(content[::4096])
    assert 45_000_000 < memory.nbytes < 150_000_000
