"""Bad input: one clear `MergeError` each, exit code 2 and one line from the command line, and no output folder."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from hf_merge import ConfigError, MergeConfig, MergeError, Merger, NonFiniteError

from .spoilers import (
    SPOILERS,
    WEIGHT,
    WITH_SEVERAL_PROBLEMS,
    malformed_config,
    missing_folder,
    missing_shard,
    missing_tensor,
    quantised,
    truncated_file,
)
from .testing_utils import Bed, assert_nothing_left, assert_one_line_error, llama_bed, run_cli


@pytest.fixture
def bed(tmp_path: Path) -> Bed:
    return llama_bed(tmp_path / "bed")


def linear(**settings) -> MergeConfig:
    return MergeConfig.from_merge_type("linear", **settings)


# -- checkpoints ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spoil", [*SPOILERS, *WITH_SEVERAL_PROBLEMS], ids=lambda spoil: spoil.__name__)
def test_spoilt_expert_is_refused_by_name(spoil: Callable[[Path], str], bed: Bed):
    fragment = spoil(bed.experts["b"])
    with pytest.raises(MergeError) as caught:
        bed.merge(linear())
    message = str(caught.value)
    assert fragment.lower() in message.lower(), message
    assert "'b'" in message or str(bed.experts["b"]) in message or "b/" in message, f"which expert? {message}"
    assert_nothing_left(bed.out)
    assert not (bed.folder / "trace").exists(), "code from a pickle was executed"


@pytest.mark.parametrize("spoil", SPOILERS, ids=lambda spoil: spoil.__name__)
def test_spoilt_expert_on_the_command_line(spoil: Callable[[Path], str], bed: Bed, capsys):
    fragment = spoil(bed.experts["b"])
    assert_one_line_error(capsys, run_cli(bed.command()), fragment)
    assert_nothing_left(bed.out)


@pytest.mark.parametrize(
    "spoil", [missing_shard, malformed_config, truncated_file, missing_folder], ids=lambda s: s.__name__
)
def test_spoilt_base_is_refused(spoil: Callable[[Path], str], bed: Bed):
    bed.base, bed.experts["b"] = bed.experts["b"], bed.base
    fragment = spoil(bed.base)
    with pytest.raises(MergeError, match=fragment.replace(".", r"\.")):
        bed.merge(linear())
    assert_nothing_left(bed.out)


def test_problems_of_several_experts_are_listed_together(bed: Bed):
    fragments = [spoil(bed.experts[name]) for spoil, name in ((quantised, "a"), (missing_tensor, "b"))]
    with pytest.raises(MergeError) as caught:
        bed.merge(linear(exclude=["attenshun"]))
    assert all(fragment in str(caught.value) for fragment in [*fragments, "attenshun"])


@pytest.mark.parametrize("seed", range(20))
def test_flipped_byte_in_a_header_is_harmless_or_refused(seed: int, bed: Bed):
    path = bed.experts["a"] / "model.safetensors"
    data, draw = bytearray(path.read_bytes()), random.Random(seed)
    position = draw.randrange(8 + int.from_bytes(data[:8], "little"))
    data[position] = draw.choice([draw.randrange(256), *b'09"-\0'])
    path.write_bytes(data)
    try:
        bed.merge(linear())
    except MergeError:
        assert_nothing_left(bed.out)


def test_not_a_number_in_an_expert_names_the_parameter(bed: Bed):
    path = bed.experts["a"] / "model.safetensors"
    tensors = load_file(path)
    tensors[WEIGHT][3, 4] = float("nan")
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(NonFiniteError, match=WEIGHT):
        bed.merge(linear())
    assert_nothing_left(bed.out)


def test_overflow_of_the_output_dtype_names_the_parameter(bed: Bed):
    path = bed.experts["a"] / "model.safetensors"
    tensors = load_file(path)
    tensors[WEIGHT][3, 4] = 1e6
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(NonFiniteError, match=WEIGHT):
        bed.merge(linear(), dtype="float16")
    assert_nothing_left(bed.out)


def test_symbolic_links_into_a_cache_are_followed(bed: Bed):
    """A snapshot of the Hub's cache is made of links to files in another folder."""
    blobs = bed.folder / "blobs"
    blobs.mkdir()
    for path in bed.experts["b"].iterdir():
        path.rename(blobs / path.name)
        path.symlink_to(blobs / path.name)
    assert (bed.merge(linear()) / "model.safetensors").is_file()


# -- recipes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("extra", "fragment"),
    [
        (["--set", "densty=0.2"], "density"),
        (["--set", "density=5"], "density"),
        (["--set", "density=-1"], "density"),
        (["--set", "density=much"], "density"),
        (["--set", "density"], "density"),
        (["--set", 'rules=[{"match": "mlp", "densty": 0.5}]'], "densty"),
        (["--set", 'rules=[{"mach": "mlp", "density": 0.5}]'], "match"),
        (["--set", 'rules=[{"match": "attenshun", "density": 0.5}]'], "attenshun"),
        (["--set", 'rules=[{"match": "(", "density": 0.5}]'], "regular expression"),
        (["--set", 'exclude=["attenshun"]'], "attenshun"),
        (["--set", 'include=["attenshun"]'], "attenshun"),
        (["--set", "weights=[1,2]"], "weights"),
        (["--set", 'weights={"a":1,"b":1,"x":1}'], "'x'"),
        (["--set", "dtype=float31"], "float31"),
        (["--set", "tokenizer=nobody"], "nobody"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else None,
)
def test_bad_settings_on_the_command_line(extra: list[str], fragment: str, bed: Bed, capsys):
    assert_one_line_error(capsys, run_cli(bed.command(*extra, method="ties")), fragment)
    assert_nothing_left(bed.out)


def test_unknown_method_on_the_command_line(bed: Bed, capsys):
    assert_one_line_error(capsys, run_cli(bed.command(method="tiez")), "ties")
    assert_nothing_left(bed.out)


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"merge_type": "tiez"}', '{"density": 0.2}', '{"merge_type": "ties", "densty": 1}']
)
def test_bad_recipe_file(text: str, bed: Bed, capsys):
    recipe = bed.folder / "recipe.json"
    recipe.write_text(text)
    code = run_cli(["run", str(recipe), *bed.command()[3:]])
    assert_one_line_error(capsys, code)
    assert_nothing_left(bed.out)


def test_missing_recipe_file(bed: Bed, capsys):
    assert_one_line_error(capsys, run_cli(["run", str(bed.folder / "none.json"), "--out", str(bed.out)]), "none.json")


def test_good_command_succeeds_and_json_is_json(bed: Bed, capsys):
    assert run_cli(bed.command("--json")) == 0
    json.loads(capsys.readouterr().out)
    assert (bed.out / "config.json").is_file()


@pytest.mark.parametrize("experts", [{}, []], ids=["dictionary", "list"])
def test_no_expert(experts, bed: Bed):
    with pytest.raises(MergeError, match="expert"):
        Merger.from_pretrained(experts, linear(), base_model=bed.base).save_pretrained(bed.out)
    assert_nothing_left(bed.out)


@pytest.mark.parametrize("name", ["../evil", "a/b", "", ".", "..", "a\0b", "a\\b"])
def test_names_of_experts_cannot_be_paths(name: str, bed: Bed):
    """They become folder names under `heads/`."""
    with pytest.raises(MergeError, match="name"):
        Merger.from_pretrained({name: bed.experts["a"], "b": bed.experts["b"]}, linear()).check()


def test_config_of_another_type_is_refused(bed: Bed):
    with pytest.raises((MergeError, TypeError)):
        Merger.from_pretrained(bed.experts, {"merge_type": "linear"}, base_model=bed.base).check()


def test_wrong_types_are_config_errors():
    with pytest.raises(ConfigError):
        MergeConfig.from_dict({"merge_type": "linear", "rules": {"match": "x"}})
    with pytest.raises(ConfigError):
        MergeConfig.from_dict({"merge_type": 3})
