"""Damaged and hostile files: a `MergeError` or a good result, whatever they say. No file outside of their folder is opened, nothing is
unpickled, and what is read of a damaged checkpoint is what safetensors itself reads.

`make test` tries some hundreds of inputs, `make slow` twenty thousand.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import sysconfig
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from random import Random

import pytest
import torch
from huggingface_hub.constants import HF_HOME
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from hf_merge import MergeConfig, MergeError, Merger, TiesConfig
from hf_merge.adapters.opening import find_adapter
from hf_merge.checkpoints.opening import load_config, load_generation_config
from hf_merge.checkpoints.processors import chat_template_of, processor_files, vocabulary_of
from hf_merge.checkpoints.storage import SafetensorsStorage, open_storage
from hf_merge.cli_recipes import build_config
from hf_merge.engines.opening import Opening, base_of_card
from hf_merge.modeling.shell import model_class_of

from ..interop.recipes import RECIPES
from ..testing_utils import llama_bed
from .mutations import mutated_bytes, mutated_json, mutated_yaml


NAME = "model.layers.1.mlp.up_proj.weight"
QUICK, THOROUGH = 25, 1900


# -- what is read -------------------------------------------------------------------------------------------------


def read_header(folder: Path) -> None:
    path = folder / "model.safetensors"
    storage = SafetensorsStorage({path.name: path})
    with safe_open(path, framework="pt") as file:
        assert set(storage.infos) == set(file.keys())
        for key in storage.infos:
            expected, found = file.get_tensor(key), storage.read(key)
            assert expected.shape == found.shape and expected.dtype == found.dtype
            assert torch.equal(expected.reshape(-1).view(torch.uint8), found.reshape(-1).view(torch.uint8))


def read_index(folder: Path) -> None:
    storage = open_storage(folder)
    for key in storage.infos:
        storage.read(key)


def _use(config: MergeConfig) -> None:
    """What a plan asks a recipe."""
    config.selects(NAME)
    config.unmatched([NAME])
    config.overruled([NAME])
    experts = config.experts if isinstance(config.experts, dict) else {}
    names = list(experts) if experts and all(isinstance(name, str) for name in experts) else ["a", "b", "c"]
    config.resolve(NAME, 0.5, names)
    for recipe in config.next_recipes():
        recipe.resolve(NAME, 0.5, ["merged"])
    if config.experts:
        with suppress(MergeError):
            Opening().models(config.experts, config.base_model, infer=True)
    assert type(MergeConfig.from_dict(json.loads(config.to_json_string()))) is type(config)


def read_merge_config(folder: Path) -> None:
    _use(MergeConfig.from_pretrained(folder))


def read_recipe_of_command(folder: Path) -> None:
    _use(build_config(folder / "recipe.yaml", None, {}))


def read_json_recipe_of_command(folder: Path) -> None:
    _use(build_config(folder / "recipe.json", None, {}))


def read_model_config(folder: Path) -> None:
    model_class_of(load_config(folder, "'x'"), "'x'")


def read_generation_config(folder: Path) -> None:
    load_generation_config(folder)


def read_adapter_config(folder: Path) -> None:
    adapter = find_adapter("x", str(folder), {})
    assert adapter is not None
    adapter.base_name, adapter.needs_base_values  # noqa: B018


def read_processors(folder: Path) -> None:
    for path in processor_files(folder):
        assert not path.is_absolute() and ".." not in path.parts
    vocabulary_of(folder)
    chat_template_of(folder)


def read_card(folder: Path) -> None:
    base_of_card(folder)


def plan_with(folder: Path) -> None:
    """What is read alone may not go with the other files, nor with the other models."""
    experts = {name: folder.parent / name for name in "abc"}
    config = TiesConfig(tokenizer="union") if (folder / "tokenizer.json").exists() else TiesConfig()
    Merger.from_pretrained(experts, config, base_model=folder.parent / "base").check()


# -- valid files to begin with ------------------------------------------------------------------------------------

MERGE_CONFIG = TiesConfig(
    density=0.3,
    weights={"a": 1.0, "b": {"gradient": [0, 1]}, "c": 0.5},
    include=["mlp"],
    exclude=[r"bias$"],
    rules=[
        {"match": "up_proj", "density": {"gradient": [0.1, 0.9]}},
        {"match": "down", "merge_type": "linear", "weights": 2},
    ],
    then=[{"merge_type": "wise_ft", "alpha": 0.8}],
    tokens={"<x>": {"source": {"model": "a", "token_id": 3}, "force": True}},
    experts={
        "a": {"model": "x/a"},
        "b": {"model": "./b", "revision": "main"},
        "c": {"merge": {"merge_type": "linear"}},
    },
    base_model={"model": "x/base"},
).to_json_string()
ADAPTER_CONFIG = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": "x/base",
    "r": 4,
    "lora_alpha": 8,
    "target_modules": ["q_proj", "v_proj"],
    "rank_pattern": {"q_proj": 2},
    "modules_to_save": None,
    "bias": "none",
    "init_lora_weights": True,
    "auto_mapping": {"base_model_class": "LlamaForCausalLM", "parent_library": "transformers"},
    "peft_version": "0.18.0",
}
GENERATION_CONFIG = {"do_sample": True, "temperature": 0.7, "eos_token_id": [1, 2], "transformers_version": "5.0.0"}
ADDED = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
PARTS = ("normalizer", "pre_tokenizer", "post_processor", "decoder", "truncation", "padding")
TOKENIZER = {
    "version": "1.0",
    **dict.fromkeys(PARTS),
    "added_tokens": [{"id": 3, "content": "<x>", **ADDED}],
    "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"]},
}
TOKENIZER_CONFIG = {"chat_template": [{"name": "default", "template": "{{ x }}"}], "model_max_length": 10**30}
MODULES = [
    {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
    {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
]
CARD = b"---\nbase_model:\n- x/base\nlicense: mit\ntags: [merge, x]\n---\n# A model\n"
OWN_RECIPE = json.dumps(json.loads(MERGE_CONFIG), indent=1).encode()


def _json(content: object) -> bytes:
    return json.dumps(content, indent=1).encode()


@dataclass
class Target:
    """A kind of file.

    Args:
        name (`str`): Which file is changed.
        read (`Callable`): Reads it, with the others in its folder.
        mutate (`Callable`): Changes it.
        seeds (`list[bytes]`): Valid contents; that of the sample model's file when empty.
    """

    name: str
    read: Callable[[Path], None]
    mutate: Callable[[Random, bytes], bytes]
    seeds: list[bytes]


def mutated_model_config(draw: Random, data: bytes) -> bytes:
    """Without models so large that planning them takes long, which is their right."""
    changed = mutated_json(draw, data)
    return (
        data
        if re.search(rb"[0-9]{4}|[0-9][eE]\+?[0-9]", re.sub(rb"transformers_version.*", b"", changed))
        else changed
    )


def mutated_safetensors(draw: Random, data: bytes) -> bytes:
    """Changes of the header, with its length corrected or not, and of the file as a whole."""
    end = 8 + int.from_bytes(data[:8], "little")
    if draw.random() < 0.3:
        return mutated_bytes(draw, data[:end]) + data[end:]
    header = mutated_json(draw, data[8:end])
    length = len(header) if draw.random() < 0.9 else draw.choice([0, 1, 2**20, 2**40, 2**63, 2**64 - 1])
    return length.to_bytes(8, "little") + header + data[end:]


TARGETS = {
    "header": Target("model.safetensors", read_header, mutated_safetensors, []),
    "index": Target("model.safetensors.index.json", read_index, mutated_json, []),
    "merge_config": Target("merge_config.json", read_merge_config, mutated_json, [MERGE_CONFIG.encode()]),
    "yaml_recipe": Target("recipe.yaml", read_recipe_of_command, mutated_yaml, [OWN_RECIPE]),
    "json_recipe": Target("recipe.json", read_json_recipe_of_command, mutated_json, [OWN_RECIPE]),
    "mergekit": Target(
        "recipe.yaml", read_recipe_of_command, mutated_yaml, [text.encode() for text in RECIPES.values()]
    ),
    "config": Target("config.json", read_model_config, mutated_json, []),
    "generation_config": Target(
        "generation_config.json", read_generation_config, mutated_json, [_json(GENERATION_CONFIG)]
    ),
    "adapter_config": Target("adapter_config.json", read_adapter_config, mutated_json, [_json(ADAPTER_CONFIG)]),
    "tokenizer": Target("tokenizer.json", read_processors, mutated_json, [_json(TOKENIZER)]),
    "tokenizer_config": Target("tokenizer_config.json", read_processors, mutated_json, [_json(TOKENIZER_CONFIG)]),
    "modules": Target("modules.json", read_processors, mutated_json, [_json(MODULES)]),
    "plan": Target("config.json", plan_with, mutated_model_config, []),
    "plan_of_union": Target("tokenizer.json", plan_with, mutated_json, [_json(TOKENIZER)]),
    "card": Target("README.md", read_card, mutated_bytes, [CARD]),
}


# -- who is watching ----------------------------------------------------------------------------------------------

_PLACES = (sys.prefix, sys.base_prefix, HF_HOME, *sysconfig.get_paths().values())  # the Hub's client looks for a token
_LIBRARIES = tuple({os.path.realpath(path) for path in _PLACES})
_OWN = str(Path(__file__).resolve().parents[2])


class Watch:
    """Sees every file that this thread opens and every class that it unpickles, while it is told to. Libraries may be loaded, and the memory of
    the process measured."""

    def __init__(self):
        self.folder: str | None = None
        self.thread = 0
        self.seen: list[str] = []
        sys.addaudithook(self._audit)

    def _audit(self, event: str, arguments: tuple) -> None:
        if self.folder is None or threading.get_ident() != self.thread:
            return
        if event in ("pickle.find_class", "os.system", "subprocess.Popen", "socket.connect"):
            self.seen.append(f"{event} {arguments}")
        elif event == "open" and isinstance(arguments[0], (str, bytes, os.PathLike)):
            path = os.path.abspath(os.fsdecode(arguments[0]))
            inside = path.startswith(self.folder + os.sep) or path == self.folder
            code = path.startswith(_LIBRARIES) or path.startswith(os.path.join(_OWN, "hf_merge"))
            if not inside and not code and not path.startswith("/proc/self/stat"):  # the memory of this process
                self.seen.append(f"open {path}")

    @contextmanager
    def over(self, folder: Path) -> Iterator[None]:
        self.seen.clear()
        self.folder, self.thread = str(folder), threading.get_ident()
        try:
            yield
        finally:
            self.folder = None
        assert not self.seen, self.seen


@pytest.fixture(scope="module")
def watch() -> Watch:
    return Watch()


def smallest_shard(folder: Path) -> Path:
    return min(folder.glob("model*.safetensors"), key=lambda path: path.stat().st_size)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A sharded Llama and, one level higher, files that hostile names could point to."""
    bed = llama_bed(tmp_path / "bed")
    (tmp_path / "bed" / "outside").write_text("{}")
    (bed.experts["b"] / "1_Pooling").mkdir()
    (bed.experts["b"] / "1_Pooling" / "config.json").write_text("{}")
    shutil.copy(smallest_shard(bed.experts["b"]), bed.experts["b"] / "adapter_model.safetensors")
    return bed.experts["b"]


def fuzz(target: Target, folder: Path, watch: Watch, count: int) -> None:
    path = folder / target.name
    if target.name == "model.safetensors":
        path = folder / "shard" / target.name
        path.parent.mkdir()
        shutil.copy(smallest_shard(folder), path)
    seeds = target.seeds or [path.read_bytes()]
    for content in seeds:
        path.write_bytes(content)
        target.read(path.parent)  # what is changed was valid

    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.randoms(use_true_random=True))
    def attempt(draw: Random) -> None:
        content = target.mutate(draw, draw.choice(seeds))
        path.write_bytes(content)
        with warnings.catch_warnings(), watch.over(path.parent.parent if target.read is plan_with else path.parent):
            warnings.simplefilter("ignore")
            try:
                target.read(path.parent)
            except MergeError as error:
                assert str(error).strip()
            except Exception as error:
                raise AssertionError(f"{type(error).__name__}: {error} for {content[:3000]!r}") from error

    attempt()


@pytest.mark.parametrize("kind", TARGETS)
def test_damaged_file(kind: str, folder: Path, watch: Watch):
    fuzz(TARGETS[kind], folder, watch, QUICK if not kind.startswith("plan") else QUICK // 5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", TARGETS)
def test_many_damaged_files(kind: str, folder: Path, watch: Watch):
    fuzz(TARGETS[kind], folder, watch, THOROUGH if not kind.startswith("plan") else THOROUGH // 5)
