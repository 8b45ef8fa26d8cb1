"""The report: its tables say what merge_report.json says, it needs nothing but itself, and it shows what there is."""

from __future__ import annotations

import json
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from hf_merge import (
    CheckpointError,
    ConfigError,
    LinearConfig,
    MissingDependencyError,
    OutputError,
    ProDistillConfig,
    WudiConfig,
)
from hf_merge.evaluation import compare_merges, evaluate_merge
from hf_merge.evaluation.report import write_report
from hf_merge.evaluation.report.data import by_module

from .helpers import Place, rows, tasks


pytest.importorskip("matplotlib")


class Page(HTMLParser):
    """The tables of a page: by id the titles and, for each row, its cells, numbers in full."""

    def __init__(self, text: str):
        super().__init__()
        self.tables: dict[str, tuple[list[str], list[list[object]]]] = {}
        self.addresses: list[str] = []
        self._table: tuple[list[str], list[list[object]]] = ([], [])
        self._cell: list[str] | None = None
        self._value: str | None = None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        known = dict(attributes)
        self.addresses += [known[key] for key in ("src", "href") if key in known]
        if tag == "table":
            self._table = self.tables[known["id"].removeprefix("table-")] = ([], [])
        elif tag == "tr":
            self._table[1].append([])
        elif tag in ("td", "th"):
            self._cell, self._value = [], known.get("data-value")

    def handle_data(self, data):
        if self._cell is not None:
            self._cell.append(data)

    def handle_endtag(self, tag):
        if tag == "th":
            self._table[0].append("".join(self._cell))
        elif tag == "td":
            text = "".join(self._cell)
            self._table[1][-1].append(json.loads(self._value) if self._value is not None else text)
            if self._value is not None and text != self._value:
                assert float(text) == pytest.approx(json.loads(self._value), rel=1e-3), "shown and full number differ"
        if tag in ("td", "th"):
            self._cell = None

    def rows(self, table: str) -> dict[str, dict[str, object]]:
        """The rows of a table by their first cell; cells without a value are left out."""
        titles, rows_ = self.tables[table]
        return {
            row[0]: {key: cell for key, cell in zip(titles[1:], row[1:], strict=True) if cell != "-"}
            for row in rows_
            if row
        }


def report_of(place: Place, config=None, data=None, **kwargs) -> tuple[Page, dict, Path]:
    folder = place.folder / "reported"
    place.merger(config or WudiConfig()).save_pretrained(folder, data=data)
    path = write_report(folder, **kwargs)
    return Page(path.read_text(encoding="utf-8")), json.loads((folder / "merge_report.json").read_text()), folder


def test_tables_equal_the_files(place: Place):
    page, report, _ = report_of(place)
    shown = page.rows("parameters")
    assert list(shown) == list(report["parameters"])
    for name, row in report["parameters"].items():
        expected = {
            key: value for key, value in row.items() if value is not None and not isinstance(value, (dict, list))
        }
        assert shown[name] == expected
    seconds = page.rows("seconds")
    assert seconds.pop("all phases")["seconds"] == pytest.approx(sum(report["seconds"].values()))
    assert {phase: row["seconds"] for phase, row in seconds.items()} == report["seconds"]
    assert not page.tables.get("evaluation")


def test_evaluation_and_comparison_are_shown(place: Place, tmp_path: Path):
    results = tmp_path / "results.jsonl"
    comparison = compare_merges(
        place.experts, [LinearConfig(), WudiConfig()], tasks(), base_model=place.base, num_samples=5, results=results
    )
    result = evaluate_merge(place.merged, tasks())
    result.save(place.merged)
    page = Page(write_report(place.merged, comparison=results).read_text(encoding="utf-8"))
    shown = page.rows("evaluation")
    assert list(shown) == [*result.tasks, "mean"]
    for name, score in result.tasks.items():
        assert shown[name]["merged"] == score.value
        assert shown[name]["expert"] == score.expert
        assert shown[name]["samples"] == score.count
    assert shown["mean"]["merged"] == result.mean
    assert {name: row["mean"] for name, row in page.rows("comparison").items() if name != "individual"} == {
        row.name: row.mean for row in comparison.rows
    }
    figures = {path.stem for path in (place.merged / "merge_report").iterdir()}
    assert {"quality", "comparison", "task_vectors", "conflicts", "cost"} <= figures


def test_nothing_is_loaded_from_elsewhere(place: Place):
    page, _, folder = report_of(place)
    assert page.addresses
    assert all(address.startswith("data:image/png;base64,") for address in page.addresses)
    text = (folder / "merge_report.html").read_text(encoding="utf-8")
    assert "<link" not in text
    assert "@import" not in text
    assert "fetch(" not in text


def test_wudi_and_prodistill_have_figures_of_their_own(place: Place):
    _, _, folder = report_of(place)
    assert (folder / "merge_report" / "wudi.png").is_file()
    data = {name: [{"input_ids": row["input_ids"]} for row in one] for name, one in rows(8).items()}
    other = Place(place.folder / "again")
    place.merger(ProDistillConfig(epochs=2)).save_pretrained(other.folder, data=data)
    page = Page(write_report(other.folder).read_text(encoding="utf-8"))
    report = json.loads((other.folder / "merge_report.json").read_text())
    assert {path.stem for path in (other.folder / "merge_report").iterdir()} >= {"blocks", "coefficients"}
    for block, row in report["blocks"].items():
        assert page.rows("blocks")[block] == row


def test_spread_of_coefficients_is_theirs(place: Place):
    data = {name: [{"input_ids": row["input_ids"]} for row in one] for name, one in rows(8).items()}
    merger = place.merger(ProDistillConfig(epochs=1, granularity="tensor"))
    merger.merge(data)
    changes = [row["coefficient_changes"] for row in merger.report.parameters.values() if "coefficient_changes" in row]
    assert changes
    assert all(len(one["mean"]) == len(one["std"]) == 2 for one in changes)
    assert all(one["std"] == [0.0, 0.0] for one in changes)  # one coefficient per tensor has no spread
    assert any(value for one in changes for value in one["mean"])


def test_models_that_are_gone_are_a_remark(place: Place, tmp_path: Path):
    folder = place.folder / "moved"
    place.merger().save_pretrained(folder)
    for name in ("a", "b", "base"):
        (place.folder / name).rename(tmp_path / f"gone-{name}")
    path = write_report(folder)
    assert "The task vectors were not compared" in path.read_text(encoding="utf-8")
    assert not (folder / "merge_report" / "conflicts.png").exists()


def test_names_are_escaped(place: Place):
    page = write_report(place.merged, place.folder / "<b>out").read_text(encoding="utf-8")
    assert "<b>out" not in page
    moved = place.folder / "a<script>b"
    place.merger().save_pretrained(moved)
    assert "a<script>b" not in write_report(moved, models=False).read_text(encoding="utf-8")


def test_table_of_modules_and_blocks():
    modules, blocks, cells = by_module(
        {"x.0.q.weight": 1.0, "x.2.q.weight": 3.0, "x.2.k.weight": 4.0, "head.weight": 9.0}
    )
    assert (modules, blocks) == (["q", "k"], [0, 2])
    assert cells[0] == [1.0, 3.0]
    assert cells[1][1] == 4.0
    assert cells[1][0] != cells[1][0]  # NaN


def test_errors(place: Place, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    with pytest.raises(CheckpointError, match=r"merge_config\.json"):
        write_report(place.folder / "a")
    with pytest.raises(ConfigError, match="no file"):
        write_report(place.merged, comparison=tmp_path / "absent.jsonl")
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(OutputError, match="cannot be written"):
        write_report(place.merged, blocked, models=False)
    (place.merged / "merge_report.json").write_text('{"parameters": []}', encoding="utf-8")
    with pytest.raises(ConfigError, match="parameters"):
        write_report(place.merged)
    (place.merged / "merge_report.json").unlink()
    with pytest.raises(CheckpointError, match=r"no merge_report\.json"):
        write_report(place.merged)
    place.merger().save_pretrained(place.folder / "fresh")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingDependencyError, match=r"hf_merge\[report\]"):
        write_report(place.folder / "fresh")
