"""Files beside the weights: those of sentence-transformers are found through modules.json, not by their names."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from hf_merge import CheckpointError, LinearConfig, MergeError, Merger
from hf_merge.checkpoints.processors import module_folders, processor_files, vocabulary_of

from ..testing_utils import Bed, make_bed
from ..zoo import ZOO


MODULES = [
    {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
    {"idx": 1, "name": "1", "path": "pooling of mine", "type": "sentence_transformers.models.Pooling"},
    {"idx": 2, "name": "2", "path": "2_Dense", "type": "sentence_transformers.models.Dense"},
]


def write_modules(folder: Path, modules: object = MODULES) -> None:
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "config_sentence_transformers.json").write_text("{}")
    for name in ("pooling of mine", "2_Dense", "3_Unnamed"):
        (folder / name).mkdir(exist_ok=True)
        (folder / name / "config.json").write_text(json.dumps({"from": folder.name, "name": name}))


@pytest.fixture
def bed(tmp_path: Path) -> Bed:
    return make_bed(ZOO["bert"], tmp_path, names=("a", "b"))


def test_modules_are_found_by_modules_json(tmp_path):
    write_modules(tmp_path)
    assert module_folders(tmp_path) == ["pooling of mine", "2_Dense"]
    names = [path.as_posix() for path in processor_files(tmp_path)]
    assert "pooling of mine/config.json" in names
    assert "3_Unnamed/config.json" not in names


def test_modules_are_carried_along(bed):
    for path in bed.experts.values():
        write_modules(path)
    out = bed.merge(LinearConfig(), base=False)
    assert json.loads((out / "modules.json").read_text()) == MODULES
    assert json.loads((out / "pooling of mine" / "config.json").read_text())["from"] == "a"


def test_weights_of_modules_are_copied_and_told(bed):
    for path in bed.experts.values():
        write_modules(path)
        save_file({"linear.weight": torch.eye(2)}, path / "2_Dense" / "model.safetensors")
    plan = Merger.from_pretrained(bed.experts, LinearConfig()).check()
    assert any("2_Dense are copied from 'a'" in note for note in plan.notes)
    assert (bed.merge(LinearConfig(), base=False) / "2_Dense" / "model.safetensors").is_file()


@pytest.mark.parametrize("path", ["../outside", "/etc", "a/../../b", "C:\\x"])
def test_modules_outside_of_the_folder_are_refused(bed, path):
    write_modules(bed.experts["a"], [{"path": path}])
    with pytest.raises(MergeError, match="only folders inside"):
        bed.merge(LinearConfig(), base=False)


@pytest.mark.parametrize("index", [-1, 2**40, "1", True, None, 1.0, [1]])
def test_ids_of_tokens_are_integers(tmp_path, index):
    (tmp_path / "vocab.json").write_text(json.dumps({"a": 0, "b": index}))
    with pytest.raises(CheckpointError, match=r"vocab\.json.*the token 'b'"):
        vocabulary_of(tmp_path)


def test_tables_per_language_are_no_single_vocabulary(tmp_path):
    (tmp_path / "vocab.json").write_text(json.dumps({"deu": {"a": 0}, "fra": {"b": 0}}))
    assert vocabulary_of(tmp_path) is None


@pytest.mark.parametrize("content", [{"path": "x"}, [{"name": "x"}], [{"path": 3}], "text"])
def test_malformed_modules_json(tmp_path, content):
    (tmp_path / "modules.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="modules.json"):
        module_folders(tmp_path)
