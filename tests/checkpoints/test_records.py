"""Records of opened model folders: what they hold is what opening finds out, merges with and without them are the same, and a record that
does not fit is not used."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_merge import LinearConfig, MergeConfig, Merger
from hf_merge.checkpoints import records
from hf_merge.checkpoints.records import MOST_RECORDS, ModelRecord, Recorder, cache_folder

from ..testing_utils import EXPERT_NAMES, Bed, classifier_bed, llama_bed, make_bed, run_process
from ..zoo import ZOO, edit_json


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of the records, as for a process that has not loaded transformers' models."""
    monkeypatch.setattr(records, "_MODELS", "transformers.no_such_module")
    monkeypatch.setenv(records.CACHE_VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache"


def merger_of(bed: Bed, config: MergeConfig | None = None) -> Merger:
    return Merger.from_pretrained(bed.experts, config or LinearConfig(), base_model=bed.base)


def contents(folder: Path) -> dict[str, bytes]:
    """The files of a result, but for times and memory."""
    files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    report = json.loads(files.pop("merge_report.json"))
    return files | {"parameters": json.dumps(report["parameters"]).encode()}


@pytest.mark.parametrize("family", ZOO)
def test_merges_with_and_without_records_are_the_same(family: str, cache: Path, tmp_path: Path):
    bed = make_bed(ZOO[family], tmp_path / "bed", names=EXPERT_NAMES[:2])
    first = merger_of(bed)
    first.save_pretrained(tmp_path / "first")
    assert all(source.record is None for source in first.plan.sources)
    assert len(list(cache.iterdir())) == 1, "models that differ in values have one record"
    second = merger_of(bed)
    assert second.plan.to_dict() == first.plan.to_dict() | {"estimate": None}  # it has the memory of the process
    second.save_pretrained(tmp_path / "second")
    assert contents(tmp_path / "second") == contents(tmp_path / "first")
    for source in second.plan.sources:
        assert source.record is not None
        converts = any(group.patterns for group in source.names.groups)
        assert converts or "config" not in vars(source), "loaded although nothing asks for it"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_configs_are_those_that_transformers_writes(dtype: str, cache: Path, tmp_path: Path):
    bed = llama_bed(tmp_path / "bed")
    for name in ("first", "second"):
        merger_of(bed, LinearConfig(dtype=dtype)).save_pretrained(tmp_path / name)
    assert contents(tmp_path / "second") == contents(tmp_path / "first")
    assert json.loads((tmp_path / "second" / "config.json").read_text())["dtype"] == dtype
    assert (tmp_path / "second" / "generation_config.json").is_file()


def test_heads_per_task_are_saved_from_records(cache: Path, tmp_path: Path):
    bed = classifier_bed(tmp_path / "bed")
    for name in ("first", "second"):
        merger_of(bed).save_pretrained(tmp_path / name)
    assert contents(tmp_path / "second") == contents(tmp_path / "first")


def test_merging_in_memory_loads_what_the_record_stands_for(cache: Path, tmp_path: Path):
    bed = llama_bed(tmp_path / "bed")
    expected = merger_of(bed).merge().state_dict()
    found = merger_of(bed).merge()
    assert type(found) is bed.model_class
    assert all(torch.equal(value, expected[name]) for name, value in found.state_dict().items())


@pytest.mark.parametrize("what", ["config", "generation_config", "headers", "code"])
def test_a_record_is_found_by_all_that_it_depends_on(what: str, cache: Path, tmp_path: Path):
    bed = llama_bed(tmp_path / "bed")
    merger_of(bed).check()
    source = merger_of(bed).experts[0]
    assert source.record is not None
    if what == "config":
        edit_json(bed.experts["a"] / "config.json", rms_norm_eps=1e-3)
    elif what == "generation_config":
        edit_json(bed.experts["a"] / "generation_config.json", top_k=7)
    elif what == "headers":
        bed.model_class.from_pretrained(bed.experts["a"]).to(torch.bfloat16).save_pretrained(bed.experts["a"])
    else:
        (path,) = cache.iterdir()
        content = json.loads(path.read_text().partition("\n")[2])
        for part in ("modeling_llama", "generation/configuration_utils", "hf_merge/kinds"):
            assert any(part in name for name in content["origins"])
        content["origins"][next(name for name in content["origins"] if "modeling_llama" in name)][0] += 1
        text = json.dumps(content)
        path.write_text(f"{records._digest(text)}\n{text}")
    assert merger_of(bed).experts[0].record is None


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_damaged_records_are_not_used(data: st.DataObject, record_text: str):
    """Whatever a part of a record is replaced by, reading it gives an error that the reader expects."""
    digest, _, text = record_text.partition("\n")
    content = json.loads(text)
    junk = st.one_of(st.none(), st.integers(), st.text(max_size=5), st.lists(st.integers(), max_size=3))
    place, key = content, data.draw(st.sampled_from(sorted(content)))
    while isinstance(place[key], (dict, list)) and place[key] and data.draw(st.booleans()):
        place = place[key]
        key = data.draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place))))
    place[key] = data.draw(junk)
    if content != json.loads(text):
        with pytest.raises(ValueError, match="not what was written"):
            ModelRecord.from_json(f"{digest}\n{json.dumps(content)}")


@pytest.fixture(scope="module")
def record_text(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("record")
    return ModelRecord.of(merger_of(llama_bed(folder / "bed")).experts[0]).to_json()


def test_records_are_read_as_they_were_written(record_text: str):
    assert ModelRecord.from_json(record_text).to_json() == record_text


@pytest.mark.parametrize("content", ["", "[1]", "{}", '{"description": {}}', "[" * 100_000])
def test_files_that_are_no_records_are_replaced(content: str, cache: Path, tmp_path: Path):
    bed = llama_bed(tmp_path / "bed")
    merger_of(bed).check()
    (path,) = cache.iterdir()
    path.write_text(content)
    merger_of(bed).check()
    assert merger_of(bed).experts[0].record is not None


def test_a_cache_that_cannot_be_written_is_no_error(cache: Path, tmp_path: Path):
    cache.write_text("a file")
    merger_of(llama_bed(tmp_path / "bed")).save_pretrained(tmp_path / "out")
    assert (tmp_path / "out" / "config.json").is_file()


def test_models_with_code_of_their_own_leave_no_record(cache: Path, tmp_path: Path):
    bed = llama_bed(tmp_path / "bed")
    for folder in (bed.base, *bed.experts.values()):
        edit_json(folder / "config.json", auto_map={"AutoModelForCausalLM": "code.Model"})
    merger_of(bed).check()
    assert not cache.exists()


def test_a_config_that_changes_while_it_is_planned_with_leaves_no_record(cache: Path, tmp_path: Path):
    bed = llama_bed(tmp_path / "bed")
    merger = merger_of(bed)
    for folder in (bed.base, *bed.experts.values()):
        edit_json(folder / "config.json", rms_norm_eps=1e-3)
    merger.check()
    assert not cache.exists()


def test_records_cover_the_parts_of_a_model(tmp_path: Path):
    bed = make_bed(ZOO["llava"], tmp_path / "bed", names=EXPERT_NAMES[:2])
    origins = ModelRecord.of(merger_of(bed).experts[0]).origins
    for part in ("modeling_llava", "modeling_llama", "modeling_clip", "configuration_llama", "configuration_clip"):
        assert any(part in path for path in origins)


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="the system has no owners of files")
@pytest.mark.parametrize("which", ["folder", "record"])
def test_records_that_others_may_write_are_not_used(which: str, cache: Path, tmp_path: Path):
    bed = llama_bed(tmp_path / "bed")
    merger_of(bed).check()
    (path,) = cache.iterdir()
    assert cache.stat().st_mode & 0o777 == 0o700
    assert path.stat().st_mode & 0o777 == 0o600
    assert merger_of(bed).experts[0].record is not None
    os.chmod(cache if which == "folder" else path, 0o770)
    assert merger_of(bed).experts[0].record is None


def test_old_records_go_first_and_other_files_stay(cache: Path, tmp_path: Path):
    cache.mkdir(mode=0o700)
    unfinished = [cache / f"{index:040x}.json.{index:08x}.writing" for index in range(2)]
    for path in (cache / "data.json", *unfinished):
        path.write_text("{}")
        os.utime(path, (0, 0))
    os.utime(unfinished[1])
    for index in range(MOST_RECORDS):
        (cache / f"{index:040x}.json").write_text("{}")
        os.utime(cache / f"{index:040x}.json", (index, index))
    merger_of(llama_bed(tmp_path / "bed")).check()
    assert [path.exists() for path in (cache / "data.json", *unfinished)] == [True, False, True]
    assert len(list(cache.iterdir())) == MOST_RECORDS + 2
    assert not (cache / f"{0:040x}.json").exists()
    assert (cache / f"{1:040x}.json").exists()


def test_who_has_loaded_transformers_uses_no_records():
    assert Recorder().folder is None


def test_where_records_are(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    from huggingface_hub import constants

    monkeypatch.delenv(records.CACHE_VARIABLE, raising=False)
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "hf_merge"
    monkeypatch.setenv(records.CACHE_VARIABLE, "")
    assert cache_folder() is None


# -- processes that start anew ----------------------------------------------------------------------------------------

_RUN = """
import sys
from hf_merge.cli import main
sys.argv = ["hf-merge", *sys.argv[1:]]
try:
    main()
finally:
    print(*(name for name in ("transformers", "peft", "scipy", "accelerate") if name in sys.modules))
"""


def test_the_second_merge_does_not_import_transformers(tmp_path: Path):
    bed = llama_bed(tmp_path / "bed")
    found = []
    for name in ("first", "second"):
        command = [*bed.command(method="ties")[:-1], str(tmp_path / name)]
        done = run_process([sys.executable, "-c", _RUN, *command], HF_MERGE_CACHE=str(tmp_path / "cache"))
        assert done.returncode == 0, done.stderr
        found.append(done.stdout.splitlines()[-1])
    assert "transformers" in found[0]
    assert found[1] == ""
    assert contents(tmp_path / "second") == contents(tmp_path / "first")
