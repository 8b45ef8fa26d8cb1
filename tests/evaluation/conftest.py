from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from .helpers import Place, build_place


@pytest.fixture(scope="session")
def _place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return build_place(tmp_path_factory.mktemp("evaluation"))


@pytest.fixture
def place(_place: Place, tmp_path: Path) -> Place:
    """A copy to write into; the merged model's recipe names the models of the original."""
    shutil.copytree(_place.folder, tmp_path, dirs_exist_ok=True)
    return Place(tmp_path)
