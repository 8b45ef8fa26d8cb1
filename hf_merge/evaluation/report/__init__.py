"""The report of a merge: one HTML file, and its figures as PNG files."""

from __future__ import annotations

from pathlib import Path

from ...errors import OutputError
from ...hub import fetch_folder
from .data import ReportData, read_folder
from .figures import all_figures
from .page import png, render


PAGE_NAME = "merge_report.html"
FIGURES_FOLDER = "merge_report"

__all__ = ["FIGURES_FOLDER", "PAGE_NAME", "ReportData", "write_report"]


def write_report(
    folder: str | Path,
    out: str | Path | None = None,
    *,
    comparison: str | Path | None = None,
    models: bool = True,
    trust_remote_code: bool = False,
) -> Path:
    """Writes `merge_report.html`, a page that needs no network and no other file, and its figures into `merge_report/`.

    Args:
        folder (`str` or `Path`): A folder written by [`Merger.save_pretrained`]. What [`EvaluationResult.save`] left there is shown too.
        out (`str` or `Path`, *optional*): Where to write; `folder` by default.
        comparison (`str` or `Path`, *optional*): The file of results of [`compare_merges`].
        models (`bool`): Whether base and experts are read again for the cosines and sign conflicts of their task vectors. Nothing is
            downloaded for that.
        trust_remote_code (`bool`): Whether code from the models' repositories may run.

    Returns:
        `Path`: The page.

    Raises:
        CheckpointError: The folder is no merged model.
        MissingDependencyError: matplotlib is not installed.
        OutputError: The files cannot be written.
    """
    folder, _ = fetch_folder(folder, weights=False)
    data = read_folder(folder, Path(comparison) if comparison is not None else None, models, trust_remote_code)
    figures = list(all_figures(data))
    target = Path(out) if out is not None else folder
    try:
        (target / FIGURES_FOLDER).mkdir(parents=True, exist_ok=True)
        for figure in figures:
            (target / FIGURES_FOLDER / f"{figure.name}.png").write_bytes(png(figure))
        page = target / PAGE_NAME
        page.write_text(render(data, figures), encoding="utf-8")
    except OSError as error:
        raise OutputError(f"The report cannot be written to '{target}': {error}") from error
    return page
