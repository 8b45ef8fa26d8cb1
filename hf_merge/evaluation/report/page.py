"""The page of a report: one HTML file that needs nothing else."""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

from ... import __version__
from ..results import RESULT_HEADER
from ..tables import show_bytes
from .data import ReportData
from .figures import Figure


STYLE = """
:root { --ink: #0f172a; --soft: #64748b; --line: #e2e8f0; --back: #f8fafc; --blue: #2563eb; }
* { box-sizing: border-box; }
body { margin: 0; font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--back); }
main { max-width: 1040px; margin: 0 auto; padding: 32px 20px 80px; }
h1 { font-size: 26px; margin: 0; } h2 { font-size: 18px; margin: 0 0 12px; }
.lead { color: var(--soft); margin: 4px 0 24px; }
section { background: #fff; border: 1px solid var(--line); border-radius: 10px; padding: 20px 24px; margin: 0 0 20px; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px; margin: 0 0 20px; }
.tile { background: #fff; border: 1px solid var(--line); border-radius: 10px; padding: 14px 18px; }
.tile b { display: block; font-size: 24px; line-height: 1.2; } .tile span { color: var(--soft); font-size: 13px; }
figure { margin: 16px 0 4px; } figure img { max-width: 100%; height: auto; display: block; }
figcaption { color: var(--soft); font-size: 13px; margin-top: 6px; }
.scroll { overflow-x: auto; max-height: 70vh; }
table { border-collapse: collapse; font-size: 13px; width: 100%; }
th, td { text-align: right; padding: 5px 10px; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { position: sticky; top: 0; background: #fff; cursor: pointer; color: var(--soft); font-weight: 600; }
th:first-child, td:first-child, .text { text-align: left; }
tbody tr:hover { background: var(--back); }
tr.total td { font-weight: 600; border-top: 2px solid var(--line); }
details summary { cursor: pointer; color: var(--blue); } details[open] summary { margin-bottom: 10px; }
pre { background: var(--back); padding: 12px; border-radius: 8px; overflow-x: auto; font-size: 12px; }
footer { color: var(--soft); font-size: 13px; }
"""

SORT = """
document.querySelectorAll("table.sortable th").forEach(head => head.addEventListener("click", () => {
  const body = head.closest("table").tBodies[0], column = head.cellIndex, down = head.dataset.down !== "1";
  head.dataset.down = down ? "1" : "0";
  const key = row => { const cell = row.cells[column]; const number = parseFloat(cell.dataset.value);
    return isNaN(number) ? cell.textContent : number; };
  [...body.rows].sort((a, b) => { const x = key(a), y = key(b);
    const order = typeof x === typeof y ? (x < y ? -1 : x > y ? 1 : 0) : typeof x === "number" ? -1 : 1;
    return down ? -order : order; }).forEach(row => body.appendChild(row));
}));
"""


def render(data: ReportData, figures: Sequence[Figure]) -> str:
    """The HTML text.

    Args:
        data ([`ReportData`]): What it shows.
        figures (`Sequence[Figure]`): The drawings, which become part of the file.
    """
    images = {figure.name: _figure(figure) for figure in figures}
    sections = [
        _section("Quality", _quality(data), images, "quality"),
        _section("Comparison of recipes", _comparison(data), images, "comparison"),
        _section("Task vectors", "", images, "task_vectors", "conflicts"),
        _section("Interference", "", images, "wudi"),
        _section("Blocks", _blocks(data), images, "blocks", "coefficients"),
        _section("Heads that were fitted", _rows_table("head", data.report["heads"]), images),
        _section("Time and memory", _cost(data), images, "cost"),
        _section("Notes", _notes(data), images),
        _section("Parameters", _parameters(data), images),
        _section(
            "Recipe", _details("merge_config.json", f"<pre>{html.escape(data.recipe.to_json_string())}</pre>"), images
        ),
    ]
    title = html.escape(data.title)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}: merge report</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        f"<h1>{title}</h1>\n<p class=lead>{_lead(data)}</p>\n{_tiles(data)}\n{''.join(sections)}"
        f"<footer>hf_merge {__version__}</footer>\n</main>\n<script>{SORT}</script>\n</body>\n</html>\n"
    )


def png(figure: Figure) -> bytes:
    """A figure as a PNG file."""
    target = io.BytesIO()
    figure.canvas.savefig(target, format="png", metadata={"Software": None})
    return target.getvalue()


def _figure(figure: Figure) -> str:
    content = base64.b64encode(png(figure)).decode("ascii")
    caption = html.escape(figure.caption)
    return (
        f'<figure><img alt="{html.escape(figure.name)}" src="data:image/png;base64,{content}">'
        f"<figcaption>{caption}</figcaption></figure>\n"
    )


def _section(title: str, content: str, images: Mapping[str, str], *names: str) -> str:
    """A section with its figures; nothing when it would be empty."""
    content = "".join(images.get(name, "") for name in names) + content
    return f'<section id="{title.split()[0].lower()}">\n<h2>{title}</h2>\n{content}</section>\n' if content else ""


def _lead(data: ReportData) -> str:
    experts = ", ".join(map(html.escape, data.experts))
    base = data.recipe.base_model.get("model") if data.recipe.base_model else None
    over = f" over <code>{html.escape(str(base))}</code>" if base else ""
    return f"{len(data.experts)} experts ({experts}){over}, merged by <b>{html.escape(data.recipe.merge_type)}</b>"


def _tiles(data: ReportData) -> str:
    tiles = []
    if data.evaluation is not None and data.evaluation.mean is not None:
        tiles.append((f"{data.evaluation.mean:.3f}", "mean over the tasks"))
    if data.evaluation is not None and data.evaluation.normalized is not None:
        tiles.append((f"{100 * data.evaluation.normalized:.1f} %", "of the experts"))
    tiles.append((f"{sum(data.report['seconds'].values()):.3g} s", "for the merge"))
    if data.report.get("peak_memory_bytes"):
        tiles.append((show_bytes(data.report["peak_memory_bytes"]), "peak memory of the process"))
    if data.inspection is not None and data.inspection.layers:
        tiles.append((f"{100 * data.inspection.sign_conflict:.1f} %", "of entries in sign conflict"))
    return f"<div class=tiles>{''.join(f'<div class=tile><b>{a}</b><span>{b}</span></div>' for a, b in tiles)}</div>"


def _quality(data: ReportData) -> str:
    if data.evaluation is None:
        return "<p>Not measured yet: <code>hf-merge eval</code> does it.</p>"
    return table("evaluation", RESULT_HEADER, data.evaluation.rows(), total=True)


def _comparison(data: ReportData) -> str:
    return "" if data.comparison is None else table("comparison", *data.comparison.table())


def _blocks(data: ReportData) -> str:
    return _rows_table("block", data.report["blocks"])


def _rows_table(title: str, rows: Mapping[str, Mapping[str, Any]]) -> str:
    """A table of dictionaries by name, one column for each key."""
    if not rows:
        return ""
    keys = list(dict.fromkeys(key for row in rows.values() for key in row))
    return table(f"{title}s", [title, *keys], [[name, *(row.get(key) for key in keys)] for name, row in rows.items()])


def _cost(data: ReportData) -> str:
    rows: list[list[Any]] = [[phase, seconds] for phase, seconds in data.report["seconds"].items()]
    rows.append(["all phases", sum(data.report["seconds"].values())])
    text = table("seconds", ["phase", "seconds"], rows, total=True)
    peak = data.report.get("peak_memory_bytes")
    return text + (
        f'<p>Peak memory of the process: <span data-value="{peak}">{show_bytes(peak)}</span></p>' if peak else ""
    )


def _notes(data: ReportData) -> str:
    notes = [*data.report["notes"], *data.remarks]
    notes += [f"dropped: {', '.join(map(str, entry.values()))}" for entry in data.report["dropped"]]
    return f"<ul>{''.join(f'<li>{html.escape(note)}</li>' for note in notes)}</ul>" if notes else ""


def _parameters(data: ReportData) -> str:
    """Every parameter with what the report says in one word or number."""
    parameters = data.report["parameters"]
    keys = list(dict.fromkeys(key for row in parameters.values() for key in row))
    keys = [key for key in keys if not any(isinstance(row.get(key), (dict, list)) for row in parameters.values())]
    rows = [[name, *(row.get(key) for key in keys)] for name, row in parameters.items()]
    return _details(f"{len(rows)} parameters", table("parameters", ["parameter", *keys], rows))


def _details(summary: str, content: str) -> str:
    return f"<details><summary>{html.escape(summary)}</summary>\n{content}</details>\n"


def table(name: str, header: Sequence[str], rows: Sequence[Sequence[Any]], total: bool = False) -> str:
    """A table whose columns sort on click. Every number stands in full in `data-value`.

    Args:
        name (`str`): Its id.
        header (`Sequence[str]`): The titles.
        rows (`Sequence`): The cells.
        total (`bool`): Whether the last row sums up the others; then nothing is sorted.
    """
    words = {column for row in rows for column, value in enumerate(row) if isinstance(value, (str, list, dict))}
    head = "".join(
        f"<th{' class=text' if column in words else ''}>{html.escape(str(title))}</th>"
        for column, title in enumerate(header)
    )
    body = []
    for index, row in enumerate(rows):
        mark = " class=total" if total and index == len(rows) - 1 else ""
        body.append(f"<tr{mark}>{''.join(map(_cell, row))}</tr>\n")
    kind = "" if total else " class=sortable"
    return (
        f'<div class=scroll><table id="table-{html.escape(name)}"{kind}>\n<thead><tr>{head}</tr></thead>\n'
        f"<tbody>\n{''.join(body)}</tbody></table></div>\n"
    )


def _cell(value: Any) -> str:
    if value is None:
        return "<td>-</td>"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        text = value if isinstance(value, str) else json.dumps(value)
        return f"<td class=text>{html.escape(text)}</td>"
    shown = f"{value:.4g}" if isinstance(value, float) else str(value)
    return f'<td data-value="{value!r}">{shown}</td>'
