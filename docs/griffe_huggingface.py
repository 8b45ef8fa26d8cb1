"""Griffe extension: docstrings in Hugging Face's dialect become what mkdocstrings renders well."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import griffe


sys.path.insert(0, str(Path(__file__).parent))

import autodoc


_ARGUMENT = re.compile(r"^(?P<name> +[\w*, ]+) \((?P<type>[^\n]*)\):(?= |$)", re.MULTILINE)
_ATTRIBUTE = re.compile(r"^(?P<indent> +)- (?P<names>\*\*[\w*, ]+\*\*) (?P<type>\([^\n]*?\)) -- ", re.MULTILINE)
_LINK = re.compile(r"\[`~?([\w.]+)`\]")


class HuggingFaceDocstrings(griffe.Extension):
    """Rewrites every docstring as it is collected: arguments and attributes become those of Google's style, with plain types,
    and the short cross-references, [`Merger`], become links."""

    def __init__(self):
        self.documented = {name: autodoc.definition(name) for name in autodoc.documented_objects()}

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = autodoc.link_references(google_style(obj.docstring.value), self.documented)


def google_style(text: str) -> str:
    """``name (`type`, *optional*):`` as `name (type, optional):`, and the list under `**Attributes**:` as such a section."""
    text = text.replace("**Attributes**:", "Attributes:")
    text = _ATTRIBUTE.sub(lambda item: f"{item['indent']}{_plain(item['names'])} {item['type']}: ", text)
    return _ARGUMENT.sub(lambda item: f"{item['name']} ({_plain(item['type'])}):", text)


def _plain(markdown: str) -> str:
    return _LINK.sub(r"\1", markdown).replace("`", "").replace("*", "")
