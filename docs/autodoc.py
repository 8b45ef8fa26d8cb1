"""What the pages under docs/source say in Hugging Face's dialect: `[[autodoc]]` directives, `_toctree.yml` and short
cross-references. Shared by the MkDocs hook, the griffe extension and the coverage check; needs no heavy import."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml


SOURCE = Path(__file__).parent / "source"
_DIRECTIVE = re.compile(r"^\[\[autodoc\]\] (?P<name>[\w.]+)\n?(?P<members>(?:^ +- \w+\n?)*)", re.MULTILINE)
_REFERENCE = re.compile(r"\[`(?P<tilde>~?)(?P<name>[A-Za-z_][\w.]*)`\](?![(\[])")
_FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Directive:
    """One `[[autodoc]] name`, with the members listed under it."""

    name: str
    members: tuple[str, ...] = ()

    @property
    def path(self) -> str:
        """Where the object is defined: `hf_merge.merger.Merger` for `Merger`."""
        found = definition(self.name)
        if found is None:
            raise ValueError(f"[[autodoc]] {self.name}: hf_merge has no object of this name.")
        return found


def directives(text: str) -> Iterator[Directive]:
    """The `[[autodoc]]` directives of a page."""
    for match in _DIRECTIVE.finditer(text):
        yield Directive(match["name"], tuple(re.findall(r"- (\w+)", match["members"])))


def replace_directives(text: str, render: Any) -> str:
    """Replaces each directive of a page by what `render(directive)` returns."""

    def replacement(match: re.Match) -> str:
        return render(Directive(match["name"], tuple(re.findall(r"- (\w+)", match["members"])))) + "\n"

    return _DIRECTIVE.sub(replacement, text)


def definition(name: str) -> str | None:
    """The full path of a name relative to `hf_merge` (`Merger`, `Merger.merge`, `methods.base.TensorMethod`), or `None`."""
    obj: Any = importlib.import_module("hf_merge")
    for part in name.split("."):
        try:
            obj = getattr(obj, part)
        except AttributeError:
            try:
                obj = importlib.import_module(f"{obj.__name__}.{part}")
            except (ImportError, AttributeError):
                return None
    return f"{obj.__module__}.{obj.__qualname__}" if hasattr(obj, "__qualname__") else None


def link_references(text: str, documented: dict[str, str]) -> str:
    """Turns [`Merger`] and [`~Merger.merge`] into links, where the object is documented, and into code where it is not.

    Args:
        text (`str`): Markdown; fenced code is left alone.
        documented (`dict[str, str]`): The full path of each documented name.
    """

    def replacement(match: re.Match) -> str:
        name = match["name"]
        shown = name.split(".")[-1] if match["tilde"] else name
        target = documented.get(name) or documented.get(name.split(".")[0])
        return f"[`{shown}`][{target}]" if target else f"`{shown}`"

    parts, last = [], 0
    for fence in _FENCE.finditer(text):
        parts += [_REFERENCE.sub(replacement, text[last : fence.start()]), fence.group()]
        last = fence.end()
    return "".join([*parts, _REFERENCE.sub(replacement, text[last:])])


def documented_objects(source: Path = SOURCE) -> dict[str, list[str]]:
    """The documented names, each with the pages that have its `[[autodoc]]`."""
    found: dict[str, list[str]] = {}
    for page in sorted(source.rglob("*.md")):
        for directive in directives(page.read_text(encoding="utf-8")):
            found.setdefault(directive.name, []).append(page.relative_to(source).as_posix())
    return found


def toctree(source: Path = SOURCE) -> list[dict[str, Any]]:
    """The content of `_toctree.yml`: sections with a `title`, pages with `local` (a path without suffix) and `title`."""
    return yaml.safe_load((source / "_toctree.yml").read_text(encoding="utf-8"))


def toctree_pages(entries: list[dict[str, Any]]) -> list[str]:
    """The pages of a table of contents, without suffix, in order."""
    return [
        page
        for entry in entries
        for page in (toctree_pages(entry["sections"]) if "sections" in entry else [entry["local"]])
    ]
