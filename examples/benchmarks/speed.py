"""Wall time and peak memory of whole merges, side by side with mergekit, each through the same YAML recipe.

    python speed.py --mergekit-bin VENV/bin [--methods linear ties] [--repeats 3] [--models FOLDER]

mergekit (`pip install mergekit==0.1.5`) lives in an environment of its own, whose bin folder is given. The models are a base and three
fine-tunes of a Llama with 0.48 billion parameters, in bfloat16 and shards of 500 MB, which the script builds (4 GB) unless `--models` names a
folder that has them. Every merge is a process of its own, start-up included; the tools take turns, and the table has the medians. The floor
is a process that reads all inputs and writes the output once with safetensors. Modules of both tools are compiled, as `pip` does when it
installs them. hf_merge keeps what it finds out about an architecture (`HF_MERGE_CACHE`); "first" is a merge that finds nothing kept.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
import yaml


EXPERTS = ("a", "b", "c")
SHARDS = "500MB"
LOOKS = 0.02
"""Seconds between two looks at the memory."""

FLOOR = """
import sys
from pathlib import Path
from safetensors import safe_open
from safetensors.torch import load_file, save_file
*inputs, output = map(Path, sys.argv[1:])
Path(output).mkdir()
for index, folder in enumerate(inputs):
    for path in sorted(folder.glob("*.safetensors")):
        tensors = load_file(path)
        if index == 0:
            save_file(tensors, output / path.name)
"""


def recipes() -> dict[str, dict]:
    """The recipes by method, in mergekit's format."""

    def of(
        method: str,
        models: tuple[str, ...] = EXPERTS,
        base: str | None = "base",
        top: dict | None = None,
        **parameters,
    ):
        entries = [{"model": name, "parameters": parameters} for name in models]
        recipe = {"merge_method": method, "models": entries, "parameters": top or {}, "dtype": "bfloat16"}
        return recipe | ({"base_model": base} if base else {})

    return {
        "linear": of("linear", base=None, weight=1.0),
        "task_arithmetic": of("task_arithmetic", weight=0.4),
        "slerp": of("slerp", ("a", "b"), "a", {"t": 0.5}),
        "model_stock": of("model_stock"),
        "dare_ties": of("dare_ties", weight=0.4, density=0.5),
        "ties": of("ties", weight=1.0, density=0.2),
        "breadcrumbs": of("breadcrumbs", weight=0.4, density=0.9, gamma=0.01),
        "della": of("della", weight=0.4, density=0.5, epsilon=0.1),
    }


def build_models(folder: Path) -> None:
    """A base and three fine-tunes."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    heads = {"num_attention_heads": 16, "num_key_value_heads": 16}
    config = LlamaConfig(hidden_size=1024, intermediate_size=2816, num_hidden_layers=32, vocab_size=32000, **heads)
    model = LlamaForCausalLM(config)
    base = {name: value.clone() for name, value in model.state_dict().items()}
    model.save_pretrained(folder / "base", max_shard_size=SHARDS)
    for name in EXPERTS:
        model.load_state_dict({key: value + 1e-3 * torch.randn_like(value) for key, value in base.items()})
        model.save_pretrained(folder / name, max_shard_size=SHARDS)


def measure(
    command: list[str], cwd: Path, look: Callable[[psutil.Process], None] | None = None, cache: str = ""
) -> float:
    """Wall time of a command in seconds.

    Args:
        command (`list[str]`): The command.
        cwd (`Path`): Where it runs.
        look (`Callable`, *optional*): Called again and again with its process, which takes time.
        cache (`str`): Where hf_merge keeps what it finds out; nowhere by default.
    """
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_MERGE_CACHE": cache}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    with tempfile.TemporaryFile("w+") as output:
        start = time.perf_counter()
        process = psutil.Popen(command, cwd=cwd, env=environment, stdout=output, stderr=output)
        while look is not None and process.poll() is None:
            look(process)
            time.sleep(LOOKS)
        status = process.wait()
        seconds = time.perf_counter() - start
        if status != 0:
            output.seek(0)
            sys.exit(f"{' '.join(command)} failed:\n{output.read()[-2000:]}")
    return seconds


class Peak:
    """The most memory that a process and its children held when it was looked at: what they share counts once (PSS), in MB."""

    def __init__(self):
        self.megabytes = 0.0

    def __call__(self, process: psutil.Process) -> None:
        held = 0
        with suppress(psutil.Error):
            held += process.memory_full_info().pss
            for child in process.children(recursive=True):
                held += child.memory_full_info().pss
        self.megabytes = max(self.megabytes, held / 2**20)


def side_by_side(method: str, recipe: dict, models: Path, mergekit: Path, repeats: int) -> str:
    """One row of the table."""
    path, ours, theirs, floor = models / "recipe.yml", models / "ours", models / "theirs", models / "floor"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    inputs = [entry["model"] for entry in recipe["models"]] + (
        [recipe["base_model"]] if "base_model" in recipe else []
    )
    command = [sys.executable, "-m", "hf_merge", "run", path, "--out", ours, "--max-shard-size", SHARDS]
    commands = {
        "hf_merge": command,
        "first": command,
        "mergekit": [mergekit / "mergekit-yaml", path, theirs, "--out-shard-size", "500M", "--no-write-model-card"],
        "floor": [sys.executable, "-c", FLOOR, *[models / name for name in dict.fromkeys(inputs)], floor],
    }
    found: dict[str, list[float]] = {name: [] for name in commands}
    peaks = {name: Peak() for name in commands}
    for turn in range(repeats + 1):  # memory is looked at in a turn of its own
        for name, command in commands.items():
            cache = str(models / "cache") if name == "hf_merge" else ""
            taken = measure([str(part) for part in command], models, peaks[name] if turn == 0 else None, cache)
            if turn > 0:
                found[name].append(taken)
            for folder in (ours, theirs, floor):
                shutil.rmtree(folder, ignore_errors=True)
    seconds = {name: statistics.median(runs) for name, runs in found.items()}
    memory = {name: peak.megabytes for name, peak in peaks.items()}
    return (
        f"| `{method}` | {seconds['mergekit']:.1f} s | {seconds['hf_merge']:.1f} s | "
        f"**{seconds['mergekit'] / seconds['hf_merge']:.1f}×** | {seconds['first']:.1f} s | {seconds['floor']:.1f} s | "
        f"{memory['mergekit']:,.0f} MB | {memory['hf_merge']:,.0f} MB |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mergekit-bin", type=Path, required=True)
    parser.add_argument("--models", type=Path, help="a folder with base, a, b and c; built when not given")
    parser.add_argument("--methods", nargs="+", choices=list(recipes()), default=list(recipes()))
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="hf_merge_speed_") as temporary:
        models = Path(temporary)
        if arguments.models is None:
            build_models(models)
        else:
            for name in ("base", *EXPERTS):
                (models / name).symlink_to(arguments.models.absolute() / name)
        print("| method | mergekit | hf_merge | faster | first | floor | mergekit's memory | hf_merge's memory |")
        print("| --- | --- | --- | --- | --- | --- | --- | --- |")
        for method in arguments.methods:
            recipe = recipes()[method]
            print(side_by_side(method, recipe, models, arguments.mergekit_bin, arguments.repeats), flush=True)


if __name__ == "__main__":
    main()
