"""Wall time of a merge on 1, 2 and 4 ranks, and whether they write the same bytes.

    python scaling.py --layers 8 --hidden 1024 --method ties --ranks 1 2 4

A Llama with random weights and three fine-tunes of it are written to a temporary folder. Each merge runs under `torchrun` in fresh
processes with one thread each. Two times are given: of the whole command, imports and all, and of the merge, which the ranks divide.
The efficiency is the merge's time on one rank, divided by the ranks and by their time; it cannot be near 1 on fewer cores than ranks.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM


EXPERTS = 3


@dataclass
class Run:
    """A merge on some ranks.

    Args:
        ranks (`int`): How many.
        total, merge (`float`): Seconds of the command, and of the merge without imports and planning.
        nbytes, files (`int`): The size and the number of the weight files.
        digest (`str`): Of the bytes of the weight files.
        memory (`int`): The largest resident set of a rank, in bytes.
    """

    ranks: int
    total: float
    merge: float
    nbytes: int
    files: int
    digest: str
    memory: int


def write_models(folder: Path, layers: int, hidden: int) -> None:
    """A base model and its fine-tunes, in bfloat16."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=hidden,
        intermediate_size=hidden * 3,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=max(1, hidden // 256),
        dtype="bfloat16",
    )
    base = LlamaForCausalLM(config).bfloat16()
    base.save_pretrained(folder / "base")
    start = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    for number in range(EXPERTS):
        for name, tensor in base.state_dict().items():
            tensor.copy_(start[name] + 1e-2 * torch.randn_like(start[name]))
        base.save_pretrained(folder / f"expert{number}")


def merge(folder: Path, out: Path, method: str, ranks: int, shard_size: str) -> Run:
    """Merges on so many ranks."""
    experts = [word for number in range(EXPERTS) for word in ("--expert", str(folder / f"expert{number}"))]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command = ["-m", "hf_merge", "run", "--method", method, *experts, "--base", str(folder / "base")]
    start = time.perf_counter()
    subprocess.run(
        [*launcher, *command, "--out", str(out), "--max-shard-size", shard_size],
        check=True,
        stdout=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"},
    )
    total = time.perf_counter() - start
    files = sorted(out.glob("*.safetensors"))
    digest = hashlib.sha256()
    for path in files:
        digest.update(path.read_bytes())
    report = json.loads((out / "merge_report.json").read_text())
    return Run(
        ranks,
        total,
        sum(report["seconds"].values()),
        sum(path.stat().st_size for path in files),
        len(files),
        digest.hexdigest(),
        report["peak_memory_bytes"],
    )


def table(runs: list[Run]) -> str:
    """The runs as markdown."""
    lines = ["| ranks | whole command | merge | efficiency | memory of a rank | weights | same bytes |"]
    lines.append("| --- " * 7 + "|")
    first = runs[0]
    for run in runs:
        efficiency = first.merge * first.ranks / (run.merge * run.ranks)
        lines.append(
            f"| {run.ranks} | {run.total:.1f} s | {run.merge:.1f} s | {efficiency:.2f} | {run.memory / 1e6:.0f} MB | "
            f"{run.nbytes / 1e6:.0f} MB in {run.files} files | {'yes' if run.digest == first.digest else 'NO'} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--method", default="ties")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--files", type=int, default=12, help="About how many weight files are written.")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_models(folder, args.layers, args.hidden)
        nbytes = sum(path.stat().st_size for path in (folder / "base").glob("*.safetensors"))
        runs = [
            merge(folder, folder / f"merged{ranks}", args.method, ranks, str(nbytes // args.files))
            for ranks in args.ranks
        ]
    print(table(runs))


if __name__ == "__main__":
    main()
