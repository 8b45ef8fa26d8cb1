"""Every public object has a docstring and a place in the documentation, and every method its page."""

from __future__ import annotations

import dataclasses
import inspect
import runpy
from pathlib import Path

import pytest

import hf_merge
from hf_merge.settings import settings_of


DOCS = Path(__file__).parents[2] / "docs"
METHODS = sorted(hf_merge.available_merge_methods())


def test_documentation_is_complete() -> None:
    check = runpy.run_path(str(DOCS / "check_coverage.py"))
    assert check["problems"]() == []


def test_all_is_what_can_be_imported() -> None:
    assert len(set(hf_merge.__all__)) == len(hf_merge.__all__)
    for name in hf_merge.__all__:
        assert getattr(hf_merge, name).__name__ == name


@pytest.mark.parametrize("name", hf_merge.__all__)
def test_public_object_has_docstrings(name: str) -> None:
    obj = getattr(hf_merge, name)
    # Not inspect.getdoc, which would find the docstring of a base class.
    assert (obj.__doc__ or "").strip(), f"{name} has no docstring"
    assert not obj.__doc__.startswith(f"{name}("), f"{name} has only the docstring that dataclasses make"
    if not inspect.isclass(obj):
        return
    for member, value in vars(obj).items():
        function = value.__func__ if isinstance(value, (classmethod, staticmethod)) else value
        if not member.startswith("_") and (inspect.isfunction(function) or isinstance(function, property)):
            assert inspect.getdoc(getattr(obj, member)), f"{name}.{member} has no docstring"


@pytest.mark.parametrize("method", METHODS)
def test_method_has_a_page(method: str) -> None:
    entry = hf_merge.available_merge_methods()[method]
    page = DOCS / "source" / "methods" / f"{method}.md"
    assert page.is_file(), f"docs/source/methods/{method}.md is missing"
    text = page.read_text(encoding="utf-8")
    assert f"[[autodoc]] {entry.config_cls.__name__}" in text
    for heading in ("When to use it", "Example"):
        assert heading in text, f"{page.name} has no section '{heading}'"
    toctree = (DOCS / "source" / "_toctree.yml").read_text(encoding="utf-8")
    assert f"local: methods/{method}\n" in toctree


@pytest.mark.parametrize("method", METHODS)
def test_every_setting_is_described(method: str) -> None:
    config_cls = hf_merge.available_merge_methods()[method].config_cls
    documentation = "".join(cls.__doc__ or "" for cls in config_cls.__mro__)
    for field in dataclasses.fields(config_cls):
        assert field.metadata.get("help"), f"{config_cls.__name__}.{field.name} has no help text"
        assert field.name in documentation, f"{config_cls.__name__}.{field.name} is not in the docstring"
    assert settings_of(config_cls)


@pytest.mark.parametrize("place", ["README.md", "docs/source/methods/overview.md"])
def test_tables_list_every_method(place: str) -> None:
    text = (DOCS.parent / place).read_text(encoding="utf-8")
    for method in METHODS:
        assert f"`{method}`" in text, f"{place} does not mention '{method}'"
