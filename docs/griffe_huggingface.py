"""Griffe extension: the short cross-references in docstrings, [`Merger`], become links."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import griffe


sys.path.insert(0, str(Path(__file__).parent))

import autodoc


class HuggingFaceReferences(griffe.Extension):
    """Rewrites every docstring as it is collected."""

    def __init__(self):
        self.documented = {name: autodoc.definition(name) for name in autodoc.documented_objects()}

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = autodoc.link_references(obj.docstring.value, self.documented)
