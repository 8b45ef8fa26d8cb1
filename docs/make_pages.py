"""Writes what is generated from other sources: the paper index, and the quick tour as a notebook. `python docs/make_pages.py`; with
`--check` it writes nothing, and exits with 1 when a file is not current."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path


ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(Path(__file__).parent), str(ROOT)]

import autodoc  # noqa: E402

from hf_merge import available_merge_methods  # noqa: E402
from hf_merge.papers import PAPERS  # noqa: E402


ONLINE = "https://github.com/hf-merge/hf_merge/blob/main/docs/source/"
_CODE = re.compile(r"^```python\n(?P<code>.*?)^```\n?", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\]\((?!https?:)(?P<target>[^)]+)\)")
_REFERENCE = re.compile(r"\[`~?([\w.]+)`\](?!\()")


def paper_index() -> str:
    """The page with every method's papers."""
    lines = [
        "# Paper index",
        "",
        "Where each method comes from. The model card of a merged model cites the papers of its recipe.",
        "",
        "| method | paper | year |",
        "| --- | --- | --- |",
    ]
    without = []
    for name, entry in sorted(available_merge_methods().items()):
        if not entry.config_cls.__module__.startswith("hf_merge."):
            continue
        if not entry.config_cls.papers:
            without.append(f"[`{name}`]({name}.md)")
        for arxiv_id in entry.config_cls.papers:
            paper = PAPERS[arxiv_id]
            title = paper.title.replace("--", "–")
            lines.append(
                f"| [`{name}`]({name}.md) | [{title}](https://arxiv.org/abs/{arxiv_id}) (arXiv {arxiv_id}) | {paper.year} |"
            )
    lines += ["", f"Without a paper of their own, from practice: {', '.join(without)}.", ""]
    return "\n".join(lines)


def notebook(page: str) -> str:
    """A page as a notebook: its Python as code cells, the rest as text.

    Args:
        page (`str`): The page's name, without suffix.
    """
    text = (autodoc.SOURCE / f"{page}.md").read_text(encoding="utf-8")
    cells = [_cell("code", "%pip install -q hf_merge", 0)]
    cells += [_cell(kind, content, index) for index, (kind, content) in enumerate(_parts(text), start=1)]
    content = {
        "cells": cells,
        "metadata": {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
        },
        "nbformat": 4,
        "nbformat_minor": 5,
    }
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def _parts(text: str) -> Iterator[tuple[str, str]]:
    position = 0
    for match in _CODE.finditer(text):
        yield "markdown", text[position : match.start()]
        yield "code", match["code"]
        position = match.end()
    yield "markdown", text[position:]


def _cell(kind: str, text: str, index: int) -> dict:
    text = text.strip("\n")
    if kind == "markdown":
        text = _REFERENCE.sub(r"`\1`", _LINK.sub(lambda link: f"]({ONLINE}{link['target']})", text))
    lines = text.splitlines(keepends=True)
    cell = {"cell_type": kind, "id": f"cell-{index}", "metadata": {}, "source": lines}
    return cell | {"execution_count": None, "outputs": []} if kind == "code" else cell


def generated() -> dict[Path, str]:
    """The generated files and what they should hold."""
    return {
        autodoc.SOURCE / "methods" / "papers.md": paper_index(),
        ROOT / "docs" / "notebooks" / "quicktour.ipynb": notebook("quicktour"),
    }


def outdated() -> list[str]:
    """The generated files that are not current."""
    return [
        path.relative_to(ROOT).as_posix()
        for path, text in generated().items()
        if not path.is_file() or path.read_text(encoding="utf-8") != text
    ]


if __name__ == "__main__":
    if "--check" in sys.argv[1:]:
        found = outdated()
        if found:
            sys.exit(f"Not current: {', '.join(found)}. Run: make pages")
    else:
        for path, text in generated().items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
