"""What is generated from other sources is current, and the notebook is one."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import hf_merge


ROOT = Path(__file__).parents[2]


def test_generated_files_are_current() -> None:
    assert runpy.run_path(str(ROOT / "docs" / "make_pages.py"))["outdated"]() == [], "run `make pages`"


def test_notebook_has_the_code_of_the_page() -> None:
    notebook = json.loads((ROOT / "docs" / "notebooks" / "quicktour.ipynb").read_text(encoding="utf-8"))
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    ids = [cell["id"] for cell in notebook["cells"]]
    assert len(set(ids)) == len(ids)
    code = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    page = (ROOT / "docs" / "source" / "quicktour.md").read_text(encoding="utf-8")
    assert len(code) == page.count("```python\n") + 1
    for cell in code[1:]:
        assert f"```python\n{cell}\n```" in page
        compile(cell, "quicktour.ipynb", "exec")
    text = "".join("".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "markdown")
    assert "](methods/" not in text, "links lead out of the notebook's folder"


def test_paper_index_names_every_method() -> None:
    text = (ROOT / "docs" / "source" / "methods" / "papers.md").read_text(encoding="utf-8")
    for name, entry in hf_merge.available_merge_methods().items():
        assert f"`{name}`" in text
        assert all(paper in text for paper in entry.config_cls.papers)
