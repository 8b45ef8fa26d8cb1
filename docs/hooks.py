"""MkDocs hooks: the navigation from `_toctree.yml`, and `[[autodoc]]` rendered by mkdocstrings."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any


sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

import autodoc  # noqa: E402


def on_config(config: Any) -> Any:
    config.nav = _navigation(autodoc.toctree(Path(config.docs_dir)))
    return config


def _navigation(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {entry["title"]: _navigation(entry["sections"]) if "sections" in entry else f"{entry['local']}.md"}
        for entry in entries
    ]


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Any) -> str:
    documented = {name: autodoc.definition(name) for name in autodoc.documented_objects()}
    return autodoc.link_references(autodoc.replace_directives(markdown, _render), documented)


def _render(directive: autodoc.Directive) -> str:
    lines = [f"::: {directive.path}"]
    if directive.members:
        lines += ["    options:", "      members:", *(f"        - {member}" for member in directive.members)]
    return "\n".join(lines)
