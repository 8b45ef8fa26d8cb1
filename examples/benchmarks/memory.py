"""Peak resident memory of a merge by method, each in a process of its own, on Llamas of different depth: it follows the largest
tensors, not the number of layers. Beside it what the plan estimated.

    python memory.py MODELS --layers 24 48 --methods linear ties wudi

MODELS is a folder in which the models are built: a base and two experts, bfloat16.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from hf_merge import MergeConfig, Merger


def build(folder: Path, layers: int) -> None:
    """A base model and two experts."""
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=16,
        max_position_embeddings=512,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    model.save_pretrained(folder / "base")
    for name in "ab":
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                parameter.copy_(start[key]).add_(torch.randn_like(parameter), alpha=1e-3)
        model.save_pretrained(folder / name)


def merge(folder: Path, method: str) -> None:
    """Prints the bytes that were estimated, those that were taken, and the seconds."""
    config = MergeConfig.from_dict({"merge_type": method})
    merger = Merger.from_pretrained([folder / "a", folder / "b"], config, base_model=folder / "base")
    expected = merger.check().estimate.memory["cpu"]
    start = time.perf_counter()
    merger.save_pretrained(folder / "merged", max_shard_size="500MB")
    seconds = time.perf_counter() - start
    shutil.rmtree(folder / "merged")
    print(json.dumps({"expected": expected, "peak": merger.report.peak_memory_bytes, "seconds": seconds}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path)
    parser.add_argument("--layers", type=int, nargs="+", default=[24, 48])
    parser.add_argument("--methods", nargs="+", default=["linear", "slerp", "ties", "dare", "wudi"])
    parser.add_argument("--merge", metavar="METHOD", help="merge the models of MODELS in this process")
    parser.add_argument("--build", type=int, metavar="LAYERS", help="build the models of MODELS in this process")
    args = parser.parse_args()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    if args.merge:
        merge(args.models, args.merge)
        return
    if args.build:
        build(args.models, args.build)
        return
    for layers in args.layers:
        folder = args.models / str(layers)
        if not (folder / "b" / "config.json").exists():
            # In a process of its own: on Linux a child begins with the peak of the process that starts it.
            subprocess.run([sys.executable, __file__, str(folder), "--build", str(layers)], check=True)
        stored = sum(path.stat().st_size for path in (folder / "base").glob("*.safetensors"))
        for method in args.methods:
            command = [sys.executable, __file__, str(folder), "--merge", method]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            found = json.loads(done.stdout.splitlines()[-1])
            print(
                f"{layers} layers, {3 * stored / 1e9:.2f} GB of models, {method:12s} peak {found['peak'] / 1e6:.0f} MB, "
                f"estimated {found['expected'] / 1e6:.0f} MB, {found['seconds']:.0f} s",
                flush=True,
            )


if __name__ == "__main__":
    main()
