"""Checks that the documentation is complete: `python docs/check_coverage.py`, exit code 1 with one line for each gap."""

from __future__ import annotations

import sys
from pathlib import Path


sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

import autodoc  # noqa: E402

import hf_merge  # noqa: E402


def problems(source: Path = autodoc.SOURCE) -> list[str]:
    """Public objects without an `[[autodoc]]`, directives that name nothing public, and pages that the table of contents and
    the folder do not agree on."""
    documented = autodoc.documented_objects(source)
    listed = autodoc.toctree_pages(autodoc.toctree(source))
    present = {page.relative_to(source).with_suffix("").as_posix() for page in source.rglob("*.md")}
    return [
        *(f"hf_merge.{name} has no [[autodoc]] in docs/source" for name in hf_merge.__all__ if name not in documented),
        *(
            f"{pages[0]}: [[autodoc]] {name} names no object of hf_merge"
            for name, pages in documented.items()
            if autodoc.definition(name) is None
        ),
        *(
            f"[[autodoc]] {name} occurs {len(pages)} times: {', '.join(pages)}"
            for name, pages in documented.items()
            if len(pages) > 1
        ),
        *(f"docs/source/{page}.md is not listed in _toctree.yml" for page in sorted(present - set(listed))),
        *(f"_toctree.yml lists '{page}', which does not exist" for page in listed if page not in present),
    ]


if __name__ == "__main__":
    found = problems()
    if found:
        sys.exit("\n".join(found))
    print(f"{len(hf_merge.__all__)} public objects are documented.")
