"""Every fence of the README and of docs/source runs as printed: python, `hf-merge` commands, and recipes in YAML."""

from __future__ import annotations

import re
import shlex
import sys
import types
from dataclasses import dataclass
from pathlib import Path

import pytest

from hf_merge import registry

from ..testing_utils import run_cli
from .hub import build_hub


ROOT = Path(__file__).parents[2]
PAGES = {
    path.relative_to(ROOT).as_posix(): path
    for path in [ROOT / "README.md", *sorted((ROOT / "docs/source").rglob("*.md"))]
}
_FENCE = re.compile(r"^```(?P<language>python|bash|yaml)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Fence:
    """A fenced block of a page, with the line that its content starts at."""

    language: str
    text: str
    line: int


def fences_of(path: Path) -> list[Fence]:
    content = path.read_text(encoding="utf-8")
    return [
        Fence(match["language"], match["text"], content.count("\n", 0, match.start("text")))
        for match in _FENCE.finditer(content)
    ]


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub")
    build_hub(folder)
    return folder


@pytest.fixture
def workplace(hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder in which the Hub's ids are folders; methods that a page registers are forgotten afterwards."""
    for owner in hub.iterdir():
        (tmp_path / owner.name).symlink_to(owner)
    monkeypatch.chdir(tmp_path)
    registry.available_merge_methods()
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))
    return tmp_path


@pytest.mark.parametrize("page", [page for page, path in PAGES.items() if fences_of(path)])
def test_fences_run(page: str, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A real module, since dataclasses look up the module that they are defined in.
    module = types.ModuleType("page")
    monkeypatch.setitem(sys.modules, "page", module)
    for fence in fences_of(PAGES[page]):
        if fence.language == "python":
            # As many empty lines as precede it on the page: a traceback then points at the page's line.
            exec(compile("\n" * fence.line + fence.text, str(PAGES[page]), "exec"), vars(module))  # noqa: S102
        elif fence.language == "yaml":
            name = re.match(r"# (\S+\.yaml)\n", fence.text)
            assert name, f"{page}:{fence.line}: a recipe starts with a comment that names its file"
            Path(name[1]).write_text(fence.text, encoding="utf-8")
        else:
            run_commands(fence.text)


def run_commands(text: str) -> None:
    """Runs the `hf-merge` commands of a fence in this process; other commands (`pip`, `make`, `git`) and the demo are left out."""
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words[:1] == ["hf-merge"] and words[1:] != ["demo"]:
            code = run_cli(words[1:])
            assert code == 0, f"{line} exited with {code}"


def test_pages_show_code() -> None:
    """The pattern that finds fences still finds them."""
    assert sum(len(fences_of(path)) for path in PAGES.values()) > 10
    assert fences_of(ROOT / "README.md")
