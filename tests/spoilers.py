"""Ways to spoil the folder of one expert. Each takes a sharded Llama checkpoint and returns a word that the error must say."""

from __future__ import annotations

import json
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from .zoo import ZOO, edit_json, save_zoo_model


WEIGHT = "model.layers.0.mlp.up_proj.weight"


def shard_of(folder: Path, index: int = 1) -> Path:
    return sorted(folder.glob("*.safetensors"))[index]


def single_file(folder: Path) -> Path:
    """Makes one file of the shards."""
    tensors = {name: t for path in folder.glob("*.safetensors") for name, t in load_file(path).items()}
    for path in [*folder.glob("*.safetensors"), folder / "model.safetensors.index.json"]:
        path.unlink()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder / "model.safetensors"


def missing_shard(folder: Path) -> str:
    path = shard_of(folder)
    path.unlink()
    return path.name


def empty_file(folder: Path) -> str:
    path = single_file(folder)
    path.write_bytes(b"")
    return path.name


def truncated_file(folder: Path) -> str:
    path = shard_of(folder)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return path.name


def truncated_by_one_byte(folder: Path) -> str:
    path = single_file(folder)
    path.write_bytes(path.read_bytes()[:-1])
    return path.name


def longer_than_its_header_says(folder: Path) -> str:
    path = single_file(folder)
    path.write_bytes(path.read_bytes() + b"\0" * 100)
    return path.name


def header_that_claims_a_huge_length(folder: Path) -> str:
    path = single_file(folder)
    path.write_bytes(struct.pack("<Q", 2**60) + path.read_bytes()[8:])
    return path.name


def edit_header(path: Path, change: Callable[[dict], None]) -> None:
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def header_with_a_wrong_shape(folder: Path) -> str:
    path = single_file(folder)
    edit_header(path, lambda header: header[WEIGHT].update(shape=[1000, 1000]))
    return path.name


def header_with_offsets_beyond_the_file(folder: Path) -> str:
    path = single_file(folder)

    def change(header: dict) -> None:
        start, end = header[WEIGHT]["data_offsets"]
        header[WEIGHT]["data_offsets"] = [start + 10**9, end + 10**9]

    edit_header(path, change)
    return path.name


def header_with_overlapping_tensors(folder: Path) -> str:
    path = single_file(folder)
    other = WEIGHT.replace("layers.0", "layers.1")
    edit_header(path, lambda header: header[WEIGHT].update(data_offsets=header[other]["data_offsets"]))
    return path.name


def header_with_another_dtype(folder: Path) -> str:
    path = single_file(folder)
    edit_header(path, lambda header: header[WEIGHT].update(dtype="F16"))
    return path.name


def header_that_is_no_json(folder: Path) -> str:
    path = single_file(folder)
    path.write_bytes(struct.pack("<Q", 4) + b"spam" + b"\0" * 64)
    return path.name


def edit_weight_map(folder: Path, change: Callable[[dict], None]) -> str:
    index = folder / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    change(weight_map)
    edit_json(index, weight_map=weight_map)
    return index.name


def index_that_points_to_the_parent(folder: Path) -> str:
    shutil.copy(shard_of(folder), folder.parent / "x.safetensors")
    edit_weight_map(folder, lambda weights: weights.update({WEIGHT: "../x.safetensors"}))
    return "../x.safetensors"


def index_that_points_to_an_absolute_path(folder: Path) -> str:
    target = folder.parent / "x.safetensors"
    shutil.copy(shard_of(folder), target)
    edit_weight_map(folder, lambda weights: weights.update({WEIGHT: str(target)}))
    return target.name


def index_that_points_to_a_windows_path(folder: Path) -> str:
    edit_weight_map(folder, lambda weights: weights.update({WEIGHT: "..\\x.safetensors"}))
    return "x.safetensors"


def index_with_a_number_for_a_file(folder: Path) -> str:
    return edit_weight_map(folder, lambda weights: weights.update({WEIGHT: 7}))


def index_that_promises_a_tensor_that_no_shard_has(folder: Path) -> str:
    edit_weight_map(folder, lambda weights: weights.update({"model.extra.weight": weights[WEIGHT]}))
    return "model.extra.weight"


def index_that_is_no_json(folder: Path) -> str:
    (folder / "model.safetensors.index.json").write_text("{")
    return "model.safetensors.index.json"


def index_without_weight_map(folder: Path) -> str:
    (folder / "model.safetensors.index.json").write_text("{}")
    return "model.safetensors.index.json"


def missing_tensor(folder: Path) -> str:
    path = single_file(folder)
    tensors = load_file(path)
    del tensors[WEIGHT]
    save_file(tensors, path, metadata={"format": "pt"})
    return WEIGHT


def unexpected_tensor(folder: Path) -> str:
    path = single_file(folder)
    save_file(load_file(path) | {"model.layers.0.mlp.gate.weight": torch.zeros(3)}, path, metadata={"format": "pt"})
    return "model.layers.0.mlp.gate.weight"


def other_shape(folder: Path) -> str:
    path = single_file(folder)
    save_file(load_file(path) | {WEIGHT: torch.zeros(64, 31)}, path, metadata={"format": "pt"})
    return WEIGHT


def integer_weight(folder: Path) -> str:
    path = single_file(folder)
    tensors = load_file(path)
    save_file(tensors | {WEIGHT: tensors[WEIGHT].to(torch.int8)}, path, metadata={"format": "pt"})
    return WEIGHT


def quantised(folder: Path) -> str:
    edit_json(folder / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    return "quanti"


def other_architecture(folder: Path) -> str:
    shutil.rmtree(folder)
    save_zoo_model(ZOO["bert"].build(), folder)
    return "Bert"


def other_width(folder: Path) -> str:
    shutil.rmtree(folder)
    config = ZOO["llama"].config()
    config.hidden_size, config.head_dim = 48, 12
    save_zoo_model(type(ZOO["llama"].build())(config), folder)
    return "48"


def fewer_layers(folder: Path) -> str:
    shutil.rmtree(folder)
    config = ZOO["llama"].config()
    config.num_hidden_layers = 2
    save_zoo_model(type(ZOO["llama"].build())(config), folder)
    return "layers"


def missing_folder(folder: Path) -> str:
    shutil.rmtree(folder)
    return str(folder)


def no_weights(folder: Path) -> str:
    for path in [*folder.glob("*.safetensors"), folder / "model.safetensors.index.json"]:
        path.unlink()
    return str(folder)


def only_foreign_weights(folder: Path) -> str:
    no_weights(folder)
    (folder / "model-q4.gguf").write_bytes(b"GGUF")
    return str(folder)


def no_config(folder: Path) -> str:
    (folder / "config.json").unlink()
    return "config.json"


def malformed_config(folder: Path) -> str:
    (folder / "config.json").write_text('{"model_type": "llama",')
    return "config.json"


def config_that_is_a_list(folder: Path) -> str:
    (folder / "config.json").write_text("[]")
    return "config.json"


def config_with_an_impossible_value(folder: Path) -> str:
    edit_json(folder / "config.json", hidden_size="wide")
    return "hidden_size"


def config_nested_too_deep(folder: Path) -> str:
    (folder / "config.json").write_text("[" * 100_000)
    return "config.json"


def config_that_no_model_can_be_built_from(folder: Path) -> str:
    edit_json(folder / "config.json", num_key_value_heads=0)
    return "config.json"


def architectures_that_are_no_list(folder: Path) -> str:
    edit_json(folder / "config.json", architectures={"a": 1})
    return "architectures"


def malformed_tokenizer(folder: Path) -> str:
    (folder / "tokenizer.json").write_text('{"model": null}')
    return "tokenizer.json"


def unknown_model_type(folder: Path) -> str:
    edit_json(folder / "config.json", model_type="llamma", architectures=["LlammaForCausalLM"])
    return "llamma"


def unknown_architecture(folder: Path) -> str:
    edit_json(folder / "config.json", architectures=["LlamaForTeaMaking"])
    return "LlamaForTeaMaking"


def remote_code(folder: Path) -> str:
    (folder / "modeling_x.py").write_text("raise SystemExit('this code must not run')")
    auto_map = {"AutoConfig": "modeling_x.XConfig", "AutoModelForCausalLM": "modeling_x.X"}
    edit_json(folder / "config.json", model_type="x", architectures=["X"], auto_map=auto_map)
    return "trust_remote_code"


def adapter_folder(folder: Path) -> str:
    no_weights(folder)
    (folder / "config.json").unlink()
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "x"}')
    save_file({"x.lora_A.weight": torch.zeros(2, 2)}, folder / "adapter_model.safetensors")
    return "adapter"


class Payload:
    """Unpickling this makes a file."""

    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self):
        return (Path.touch, (self.trace,))


def pickle_that_runs_code(folder: Path) -> str:
    no_weights(folder)
    torch.save(
        {WEIGHT: Payload(folder.parent / "trace")},
        folder / "pytorch_model.bin",
        pickle_protocol=pickle.DEFAULT_PROTOCOL,
    )
    return "pytorch_model.bin"


def bin_that_is_no_archive(folder: Path) -> str:
    no_weights(folder)
    (folder / "pytorch_model.bin").write_bytes(b"spam" * 100)
    return "pytorch_model.bin"


def bin_that_is_a_list(folder: Path) -> str:
    no_weights(folder)
    torch.save([torch.zeros(3)], folder / "pytorch_model.bin")
    return "pytorch_model.bin"


def bin_with_numbers_for_names(folder: Path) -> str:
    no_weights(folder)
    torch.save({1: torch.zeros(3)}, folder / "pytorch_model.bin")
    return "pytorch_model.bin"


def bin_with_a_broken_pickle(folder: Path) -> str:
    """Of the format before zip files: the stream ends in the middle."""
    no_weights(folder)
    path = folder / "pytorch_model.bin"
    torch.save({WEIGHT: torch.zeros(3)}, path, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes()[:150])
    return "pytorch_model.bin"


def a_file_for_a_folder(folder: Path) -> str:
    shutil.rmtree(folder)
    folder.write_text("spam")
    return str(folder)


SPOILERS = [
    missing_shard,
    empty_file,
    truncated_file,
    truncated_by_one_byte,
    longer_than_its_header_says,
    header_that_claims_a_huge_length,
    header_with_a_wrong_shape,
    header_with_offsets_beyond_the_file,
    header_with_overlapping_tensors,
    header_with_another_dtype,
    header_that_is_no_json,
    index_that_points_to_the_parent,
    index_that_points_to_an_absolute_path,
    index_that_points_to_a_windows_path,
    index_with_a_number_for_a_file,
    index_that_promises_a_tensor_that_no_shard_has,
    index_that_is_no_json,
    index_without_weight_map,
    missing_tensor,
    unexpected_tensor,
    other_shape,
    integer_weight,
    quantised,
    other_architecture,
    missing_folder,
    no_weights,
    only_foreign_weights,
    no_config,
    malformed_config,
    config_that_is_a_list,
    config_with_an_impossible_value,
    config_nested_too_deep,
    config_that_no_model_can_be_built_from,
    architectures_that_are_no_list,
    malformed_tokenizer,
    unknown_model_type,
    unknown_architecture,
    remote_code,
    adapter_folder,
    pickle_that_runs_code,
    bin_that_is_no_archive,
    bin_that_is_a_list,
    bin_with_numbers_for_names,
    bin_with_a_broken_pickle,
    a_file_for_a_folder,
]
WITH_SEVERAL_PROBLEMS = [other_width, fewer_layers]
