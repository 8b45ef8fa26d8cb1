"""The rules of the page "Security": nothing that a model, an adapter or a recipe says makes code run or reaches a file outside of its
folder. Pickles and names in weight indices have their tests in `spoilers.py`, damaged files in `faults/`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from hf_merge import AutoMergedModel, CheckpointError, ConfigError, LinearConfig, MergeError, Merger, OutputError
from hf_merge.checkpoints.processors import chat_template_of, processor_files
from hf_merge.checkpoints.tokenizers import load_tokenizer
from hf_merge.engines.block_store import BlockStore
from hf_merge.evaluation.tasks import read_dataset

from .adapters.helpers import KINDS, make_adapters
from .spoilers import Payload
from .testing_utils import Bed, assert_nothing_left, classifier_bed, llama_bed, run_cli
from .zoo import edit_json


@pytest.fixture
def bed(tmp_path: Path) -> Bed:
    return llama_bed(tmp_path / "bed")


@pytest.fixture
def trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that importing the module `hostile` makes; the module can be imported."""
    trace = tmp_path / "trace"
    (tmp_path / "hostile.py").write_text(f"open({str(trace)!r}, 'w').close()\nclass Hostile: ...\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield trace
    assert not trace.exists(), "a name in a file was imported"
    assert "hostile" not in sys.modules


# -- code ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["os.system", "hostile.Hostile", "pipeline", "Trainer", "AutoModel", "logging", "__class__", "LlamaConfig"]
)
def test_architectures_name_models_of_transformers_only(name: str, bed: Bed, trace: Path):
    edit_json(bed.experts["b"] / "config.json", architectures=[name])
    with pytest.raises(MergeError, match="config.json"):
        bed.merge(LinearConfig())
    assert_nothing_left(bed.out)


def test_code_of_a_tokenizer_does_not_run(tmp_path: Path, trace: Path, monkeypatch: pytest.MonkeyPatch):
    """Not even after a question at the terminal, which transformers would ask."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    (tmp_path / "code.py").write_text("import hostile\n")
    content = {"tokenizer_class": "Hostile", "auto_map": {"AutoTokenizer": ["code.Hostile", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="tokenizer"):
        load_tokenizer(tmp_path)


def test_remote_code_must_be_a_model(bed: Bed, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.get_class_from_dynamic_module", lambda *_: Path)
    auto_map = {"AutoModelForCausalLM": "code.Hostile"}
    edit_json(bed.experts["b"] / "config.json", architectures=["Hostile"], auto_map=auto_map)
    with pytest.raises(MergeError, match="no PreTrainedModel"):
        Merger.from_pretrained(bed.experts, LinearConfig(), trust_remote_code=True)


def merge_adapters(folder: Path, **changes) -> Path:
    """Merges two adapters, the first of them with another config."""
    bed = make_adapters(KINDS["lora"], folder / "adapters", 2)
    edit_json(next(iter(bed.adapters.values())) / "adapter_config.json", **changes)
    out = folder / "out"
    Merger.from_pretrained(bed.adapters, LinearConfig(output="adapter"), base_model=bed.base).save_pretrained(out)
    return out


def test_library_of_an_adapter_is_not_imported(tmp_path: Path, trace: Path):
    auto_mapping = {"base_model_class": "Hostile", "parent_library": "hostile"}
    assert (merge_adapters(tmp_path, auto_mapping=auto_mapping) / "adapter_model.safetensors").is_file()


def test_module_of_an_adapter_is_not_imported(tmp_path: Path, trace: Path):
    with pytest.raises(MergeError, match="PEFT would import a module"):
        merge_adapters(tmp_path, megatron_config={"x": 1}, megatron_core="hostile")
    assert_nothing_left(tmp_path / "out")


def test_pickled_adapter_does_not_run_code(tmp_path: Path, trace: Path):
    bed = make_adapters(KINDS["lora"], tmp_path / "adapters", 2)
    folder = next(iter(bed.adapters.values()))
    (folder / "adapter_model.safetensors").unlink()
    torch.save({"x": Payload(trace)}, folder / "adapter_model.bin")
    with pytest.raises(MergeError, match=r"adapter_model\.bin.*without executing code"):
        Merger.from_pretrained(bed.adapters, LinearConfig(output="adapter"), base_model=bed.base).check()


def test_types_of_sentence_transformers_are_not_imported(bed: Bed, trace: Path):
    for folder in bed.experts.values():
        (folder / "modules.json").write_text(json.dumps([{"path": "1_X", "type": "hostile.Hostile"}]))
        (folder / "1_X").mkdir()
    bed.merge(LinearConfig())


def test_chat_templates_are_text(bed: Bed):
    text = "{{ 1 / 0 }}{{ ''.__class__.__mro__ }}"
    (bed.experts["a"] / "tokenizer.json").write_text(json.dumps({"model": {"type": "BPE", "vocab": {}}}))
    out = bed.merge(LinearConfig(chat_template=text))
    assert (out / "chat_template.jinja").read_text() == text


@pytest.mark.parametrize("text", ["!!python/object/apply:os.system ['x']", "merge_type: !!python/name:os.system"])
def test_yaml_makes_plain_data_only(text: str, tmp_path: Path, capsys):
    (tmp_path / "recipe.yaml").write_text(text)
    assert run_cli(["plan", str(tmp_path / "recipe.yaml")]) == 2
    assert "Cannot read the recipe" in capsys.readouterr().err


def test_data_are_no_scripts(tmp_path: Path, trace: Path):
    (tmp_path / "data.py").write_text("import hostile\n")
    with pytest.raises(ConfigError, match="ending"):
        read_dataset("data.py", tmp_path, "task")


# -- paths --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("subfolder", ["..", "../base", "x/../../base", "/etc", "C:\\x", "a\\..\\b"])
def test_subfolders_stay_inside(subfolder: str, bed: Bed):
    reference = {"model": str(bed.experts["a"]), "subfolder": subfolder}
    with pytest.raises(ConfigError, match="subfolder"):
        Merger.from_pretrained({"a": reference}, LinearConfig())
    with pytest.raises(ConfigError, match="subfolder"):
        LinearConfig.from_pretrained(bed.experts["a"], subfolder=subfolder)


@pytest.mark.parametrize("task", ["..", "../../bed/base", "/etc", "spam/../movies", ""])
def test_tasks_are_no_paths(task: str, tmp_path: Path):
    out = classifier_bed(tmp_path).merge(LinearConfig())
    with pytest.raises(ConfigError, match="no head for the task"):
        AutoMergedModel.from_pretrained(out, task=task)


def link(path: Path, target: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    path.symlink_to(target)


@pytest.mark.parametrize("name", ["merges.txt", "tokenizer_config.json", "additional_chat_templates/x.jinja"])
def test_links_out_of_a_folder_are_not_copied(name: str, bed: Bed):
    secret = bed.folder / "secret"
    secret.write_text("{}")
    for folder in bed.experts.values():
        link(folder / name, secret)
    with pytest.raises(CheckpointError, match=r"is a link to .*secret"):
        bed.merge(LinearConfig())
    assert_nothing_left(bed.out)


def test_code_is_not_copied_through_links(bed: Bed):
    (bed.folder / "secret").write_text("x = 1")
    link(bed.experts["a"] / "code.py", bed.folder / "secret")
    edit_json(bed.experts["a"] / "config.json", auto_map={"AutoConfig": "code.C"})
    (bed.experts["a"] / "tokenizer_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"code\.py' is a link"):
        bed.merge(LinearConfig())
    assert_nothing_left(bed.out)


def test_folders_of_templates_are_no_links(bed: Bed):
    secrets = bed.folder / "secrets"
    secrets.mkdir()
    (secrets / "key").write_text("secret")
    (bed.experts["a"] / "additional_chat_templates").symlink_to(secrets)
    with pytest.raises(CheckpointError, match="is a link"):
        processor_files(bed.experts["a"])


def test_links_of_the_cache_are_followed(bed: Bed):
    """A snapshot of the Hub's cache is made of links to the repository's blobs."""
    repository = bed.folder / "models--me--x"
    snapshot = repository / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    (bed.experts["a"] / "chat_template.jinja").write_text("text")
    for path in bed.experts["a"].iterdir():
        path.rename(repository / "blobs" / path.name)
        (snapshot / path.name).symlink_to(Path("../../blobs") / path.name)
    bed.experts["a"] = snapshot
    assert chat_template_of(snapshot) == "text"
    assert (bed.merge(LinearConfig()) / "chat_template.jinja").read_text() == "text"


def test_links_inside_of_a_folder_are_followed(bed: Bed):
    (bed.experts["a"] / "text").write_text("x")
    link(bed.experts["a"] / "merges.txt", Path("text"))
    assert (bed.merge(LinearConfig()) / "merges.txt").read_text() == "x"


# -- what a merge goes on with -------------------------------------------------------------------------------------


def test_partial_folder_of_somebody_else_stays_as_it_is(bed: Bed):
    partial = bed.out.with_name("out.partial")
    partial.mkdir()
    (partial / "thesis.txt").write_text("x")
    with pytest.raises(OutputError, match="was not made by a merge"):
        bed.merge(LinearConfig())
    assert (partial / "thesis.txt").read_text() == "x"


@pytest.mark.parametrize("content", [b"", b"spam" * 10])
def test_damaged_block_is_done_again(content: bytes, tmp_path: Path):
    store = BlockStore(tmp_path / "work", "x")
    store.put("layers.0", {"a": torch.ones(2)}, {})
    store.put("layers.1", {"b": torch.ones(2)}, {})
    (tmp_path / "work" / "layers.1.safetensors").write_bytes(content)
    again = BlockStore(tmp_path / "work", "x")
    assert "layers.0" in again and "layers.1" not in again
    assert again.has("a") and not again.has("b")


def test_block_of_another_name_is_not_taken_over(tmp_path: Path):
    BlockStore(tmp_path / "work", "x")
    metadata = {"block": "../outside", "report": "{}"}
    save_file({"a": torch.ones(2)}, tmp_path / "work" / "layers.0.safetensors", metadata=metadata)
    assert not BlockStore(tmp_path / "work", "x").has("a")


def test_record_that_was_cut_off_does_not_lock_the_work_folder(tmp_path: Path):
    BlockStore(tmp_path / "work", "x").put("layers.0", {"a": torch.ones(2)}, {})
    (tmp_path / "work" / "blocks.json").write_text('{"finger')
    assert "layers.0" not in BlockStore(tmp_path / "work", "x")
