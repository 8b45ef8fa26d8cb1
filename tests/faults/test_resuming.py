"""What a merge goes on with after a kill: nothing of another adapter, another vocabulary or another fine-tune, whose files may well
have the same sizes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hf_merge import LinearConfig, Merger
from hf_merge.checkpoints.folder import OutputFolder
from hf_merge.engines.extraction import Extraction, extract_lora

from ..adapters.helpers import KINDS, make_adapters
from ..processes import contents
from ..testing_utils import llama_bed
from ..vocabularies import ENGLISH, GERMAN, save_llama, train_bpe
from ..zoo import edit_json


class Killed(BaseException):
    """Ends a merge as a kill does: nothing is cleaned up."""


@pytest.fixture
def dies_at_the_end(monkeypatch: pytest.MonkeyPatch):
    """Merges end when everything but the last rename is done."""

    def die(self) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(OutputFolder, "seal", die)
        yield patch


def test_other_scaling_of_an_adapter(tmp_path: Path, dies_at_the_end: pytest.MonkeyPatch):
    bed = make_adapters(KINDS["lora"], tmp_path / "bed", 2)

    def merge(out: Path) -> None:
        Merger.from_pretrained(bed.adapters, LinearConfig(), base_model=bed.base).save_pretrained(out)

    with pytest.raises(Killed):
        merge(tmp_path / "out")
    dies_at_the_end.undo()
    edit_json(next(iter(bed.adapters.values())) / "adapter_config.json", lora_alpha=64)
    merge(tmp_path / "out")
    merge(tmp_path / "fresh")
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


def test_other_rows_of_a_vocabulary(tmp_path: Path, dies_at_the_end: pytest.MonkeyPatch):
    """Two tokens of one model change places between the runs."""
    folders = {"a": tmp_path / "a", "b": tmp_path / "b"}
    save_llama(folders["a"], train_bpe(ENGLISH, ["<x>"]), 1)
    save_llama(folders["b"], train_bpe(GERMAN, ["<x>"]), 2)

    def merge(out: Path) -> None:
        Merger.from_pretrained(folders, LinearConfig(tokenizer="a")).save_pretrained(out)

    with pytest.raises(Killed):
        merge(tmp_path / "out")
    dies_at_the_end.undo()
    path = folders["b"] / "tokenizer.json"
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["n"] = vocabulary["n"], vocabulary["a"]
    path.write_text(json.dumps(tokenizer), encoding="utf-8")
    merge(tmp_path / "out")
    merge(tmp_path / "fresh")
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


def test_extraction_of_another_model(tmp_path: Path, dies_at_the_end: pytest.MonkeyPatch):
    bed = llama_bed(tmp_path / "bed")
    settings = Extraction(rank=2, include=["q_proj"])
    with pytest.raises(Killed):
        extract_lora(str(bed.experts["a"]), str(bed.base), tmp_path / "out", settings)
    dies_at_the_end.undo()
    extract_lora(str(bed.experts["b"]), str(bed.base), tmp_path / "out", settings)
    extract_lora(str(bed.experts["b"]), str(bed.base), tmp_path / "fresh", settings)
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")
