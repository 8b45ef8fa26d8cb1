"""Time and memory of merging adapters of an 8 B model into an adapter, without the model.

    python adapters.py --experts 5 --rank 16 --method wudi

Adapters with random factors for all linear layers of a Llama of 8 B parameters are written to a temporary folder, with the model's
config and none of its weights. The merge runs in a fresh process; its wall time and peak resident memory (imports and all) are printed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from peft import LoraConfig
from safetensors.torch import save_file
from transformers import LlamaConfig


def config_8b() -> LlamaConfig:
    """Llama 3.1 8B's shapes."""
    return LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )


def linear_shapes(config: LlamaConfig) -> dict[str, tuple[int, int]]:
    """(out, in) of the linear layers of the blocks."""
    hidden, inner = config.hidden_size, config.intermediate_size
    keys = hidden // config.num_attention_heads * config.num_key_value_heads
    shapes = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    return {
        f"model.layers.{layer}.{name}": shape
        for layer in range(config.num_hidden_layers)
        for name, shape in shapes.items()
    }


def write_adapter(folder: Path, base: Path, shapes: dict[str, tuple[int, int]], rank: int, seed: int) -> None:
    """A PEFT adapter with random factors."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, (rows, columns) in shapes.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = (
            torch.randn(rank, columns, generator=generator) / columns**0.5
        )
        tensors[f"base_model.model.{name}.lora_B.weight"] = torch.randn(rows, rank, generator=generator) * 1e-3
    targets = sorted({name.rpartition(".")[2] for name in shapes})
    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_modules=targets,
        task_type="CAUSAL_LM",
        base_model_name_or_path=str(base),
        inference_mode=True,
    )
    config.save_pretrained(str(folder))
    save_file(tensors, folder / "adapter_model.safetensors")


def merge(folder: Path, method: str, settings: dict) -> None:
    """What is measured, in a process of its own."""
    start = time.perf_counter()
    from hf_merge import MergeConfig, Merger

    experts = sorted(path for path in folder.glob("expert_*"))
    config = MergeConfig.from_merge_type(method, output="adapter", **settings)
    merger = Merger.from_pretrained(experts, config)
    merger.save_pretrained(folder / "merged")
    seconds = time.perf_counter() - start
    print(
        json.dumps(
            {"seconds": seconds, "peak_bytes": merger.report.peak_memory_bytes, "result": str(merger.plan.adapter)}
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, default=5)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--method", default="wudi")
    parser.add_argument("--settings", type=json.loads, default={}, help="settings of the method, as JSON")
    parser.add_argument("--layers", type=int, help="fewer layers than 32")
    parser.add_argument("--merge", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.merge is not None:
        merge(args.merge, args.method, args.settings)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = config_8b()
        config.num_hidden_layers = args.layers or config.num_hidden_layers
        config.save_pretrained(folder / "base")
        for seed in range(args.experts):
            write_adapter(folder / f"expert_{seed}", folder / "base", linear_shapes(config), args.rank, seed)
        command = [sys.executable, __file__, "--merge", name, "--method", args.method]
        result = subprocess.run(
            [*command, "--settings", json.dumps(args.settings)], check=True, stdout=subprocess.PIPE, text=True
        )
    found = json.loads(result.stdout.splitlines()[-1])
    print(
        f"{args.experts} adapters of rank {args.rank} by '{args.method}': {found['seconds']:.1f} s, peak "
        f"{found['peak_bytes'] / 1e9:.2f} GB, {found['result']}"
    )


if __name__ == "__main__":
    main()
