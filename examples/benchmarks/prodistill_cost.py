"""ProDistill against its published loop: seconds per epoch and peak memory, each side in a process of its own; and the peak
memory of a merge against that of holding all models in float32.

    python prodistill_cost.py loop VISION_DATA
    python prodistill_cost.py memory MODELS --layers 12 24

VISION_DATA holds a folder `base` with a ViT classifier, and for every task a folder with its expert and a file `<task>.npz` with
`calibration_images` (n, height, width) of unsigned bytes. `memory` builds Llamas of 0.5 billion parameters in MODELS.
"""

from __future__ import annotations

import argparse
import copy
import json
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import AutoModelForImageClassification, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from hf_merge import Merger, ProDistillArguments, ProDistillConfig
from hf_merge.engines.report import peak_memory_bytes


SEED = 0


def tasks_of(data: Path) -> list[str]:
    return sorted(path.stem for path in data.glob("*.npz"))


def images_of(data: Path, task: str, count: int) -> Tensor:
    """(count, 1, height, width) in [-1, 1]."""
    images = np.load(data / f"{task}.npz")["calibration_images"]
    rows = np.random.default_rng(SEED).permutation(len(images))[:count]
    return torch.from_numpy(images[rows]).float().div(127.5).sub(1)[:, None]


# -- the published loop -----------------------------------------------------------------------------------------------


class PublishedBlock(nn.Module):
    """Σ_i α_i ∘ (θ_i − θ_0) + θ_0 with autograd through every α_i, as the paper's code computes it at every step."""

    def __init__(self, base: nn.Module, experts: list[nn.Module], scale: float):
        super().__init__()
        self.base, self.experts = base, experts
        self.alphas = nn.ParameterList(
            nn.Parameter(torch.full_like(parameter, scale)) for expert in experts for parameter in expert.parameters()
        )

    def weights(self) -> dict[str, Tensor]:
        merged = {}
        names = [name for name, _ in self.base.named_parameters()]
        for index, name in enumerate(names):
            start = self.base.get_parameter(name)
            total = torch.zeros_like(start)
            for number, expert in enumerate(self.experts):
                total = total + self.alphas[number * len(names) + index] * (expert.get_parameter(name) - start)
            merged[name] = total + start
        return merged

    def forward(self, hidden: Tensor) -> Tensor:
        return functional_call(self.base, self.weights(), (hidden,))


def published_loop(data: Path, epochs: int, samples: int, batch: int) -> None:
    """All models in memory; mixed batches of all tasks' samples; at every step all teachers run on the whole batch."""
    load = AutoModelForImageClassification.from_pretrained
    base = load(data / "base", dtype=torch.float32).eval().requires_grad_(False)
    experts = [load(data / task, dtype=torch.float32).eval().requires_grad_(False) for task in tasks_of(data)]
    student = copy.deepcopy(base)
    with torch.no_grad():
        for name, parameter in student.vit.named_parameters():
            for expert in experts:
                parameter.add_(expert.vit.get_parameter(name) - base.vit.get_parameter(name), alpha=0.3)
        images = [images_of(data, task, samples) for task in tasks_of(data)]
        owner = torch.arange(len(experts)).repeat_interleave(samples)
        inputs = torch.cat([student.vit.embeddings(one) for one in images])
        theirs = torch.cat([expert.vit.embeddings(one) for expert, one in zip(experts, images, strict=True)])
    for index in range(len(base.vit.layers)):
        block = PublishedBlock(base.vit.layers[index], [expert.vit.layers[index] for expert in experts], 0.3)
        optimizer = torch.optim.Adam(block.alphas, lr=0.01)
        for _ in range(epochs):
            for rows in torch.randperm(len(inputs)).split(batch * len(experts)):
                optimizer.zero_grad()
                output, loss = block(inputs[rows]), 0.0
                for task, expert in enumerate(block.experts):
                    with torch.no_grad():
                        target = expert(theirs[rows])
                    error = (output - target).square().flatten(1).sum(1)
                    loss = loss + (error * (owner[rows] == task)).sum()
                loss.backward()
                optimizer.step()
        with torch.no_grad():
            inputs = block(inputs)
            theirs = torch.cat([expert(theirs[owner == task]) for task, expert in enumerate(block.experts)])


def library(data: Path, epochs: int, samples: int, batch: int, bf16: bool = False) -> None:
    tasks = tasks_of(data)
    config = ProDistillConfig(epochs=epochs, batch_size=batch, loss="sse")
    merger = Merger.from_pretrained(
        {task: data / task for task in tasks}, config, base_model=data / "base", dtype="float32"
    )
    images = {task: {"pixel_values": images_of(data, task, samples)} for task in tasks}
    merger.merge(images, args=ProDistillArguments(bf16=bf16))


Side = Callable[[Path, int, int, int], None]
SIDES: dict[str, Side] = {
    "published": published_loop,
    "hf_merge": library,
    "hf_merge, bf16": partial(library, bf16=True),
}


def run_side(name: str, data: Path, epochs: int, samples: int, batch: int) -> None:
    """Prints seconds and bytes above the state before; a short run first, so that what is loaded once does not count."""
    SIDES[name](data, 1, 4, batch)
    before, start = peak_memory_bytes(), time.process_time()
    SIDES[name](data, epochs, samples, batch)
    print(json.dumps({"seconds": time.process_time() - start, "bytes": peak_memory_bytes() - before}))


def compare_loop(data: Path, epochs: int, samples: int, batch: int) -> None:
    """Seconds of one thread per epoch, from the difference of a long and a short run; memory from the long run."""
    options = ["--samples", str(samples), "--batch", str(batch)]
    theirs = (0.0, 0.0)
    for name in SIDES:
        short, long = (_child("side", name, str(data), "--epochs", str(count), *options) for count in (1, 1 + epochs))
        found = ((long["seconds"] - short["seconds"]) / epochs, long["bytes"] / 2**20)
        theirs = found if name == "published" else theirs
        print(
            f"{name:16s} {found[0]:.3f} s per epoch, {theirs[0] / found[0]:.2f} times faster; "
            f"{found[1]:.1f} MiB above the state before, {found[1] / theirs[1]:.2f} of it",
            flush=True,
        )


# -- memory -----------------------------------------------------------------------------------------------------------


def build(folder: Path, layers: int) -> None:
    """A base and two experts; 24 layers hold 0.5 billion parameters, stored as bfloat16."""
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=1280,
        intermediate_size=3456,
        num_hidden_layers=layers,
        num_attention_heads=20,
        num_key_value_heads=20,
        max_position_embeddings=512,
    )
    torch.manual_seed(SEED)
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    print(f"{layers} layers: {sum(p.numel() for p in model.parameters()) / 1e9:.2f} billion parameters", flush=True)
    model.save_pretrained(folder / "base")
    for name in "ab":
        expert = copy.deepcopy(model)
        with torch.no_grad():
            for parameter in expert.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=1e-3)
        expert.save_pretrained(folder / name)


def merge_llama(folder: Path) -> None:
    """Prints seconds, peak bytes and the bytes of three models in float32."""
    rows = {"input_ids": torch.randint(5, 32000, (16, 256), generator=torch.Generator().manual_seed(SEED))}
    config = ProDistillConfig(epochs=1, batch_size=2)
    start = time.perf_counter()
    merger = Merger.from_pretrained({"a": folder / "a", "b": folder / "b"}, config, base_model=folder / "base")
    arguments = ProDistillArguments(bf16=True)
    merger.save_pretrained(folder / "merged", data={"a": rows, "b": rows}, max_shard_size="500MB", args=arguments)
    stored = sum(path.stat().st_size for path in (folder / "base").glob("*.safetensors"))
    seconds = time.perf_counter() - start
    print(json.dumps({"seconds": seconds, "bytes": peak_memory_bytes(), "float32": 3 * 2 * stored}))


def compare_memory(models: Path, layers: list[int]) -> None:
    for count in layers:
        folder = models / str(count)
        if not (folder / "b" / "config.json").exists():
            subprocess.run([sys.executable, __file__, "build", str(folder), "--layers", str(count)], check=True)
        found = _child("merge", str(folder))
        print(
            f"{count} layers: peak {found['bytes'] / 1e9:.2f} GB, base and experts in float32 {found['float32'] / 1e9:.2f} GB: "
            f"{found['bytes'] / found['float32']:.3f} of it; {found['seconds']:.0f} s",
            flush=True,
        )


def _child(*arguments: str) -> dict[str, float]:
    done = subprocess.run([sys.executable, __file__, *arguments], check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("loop", "memory", "side", "build", "merge"))
    parser.add_argument("arguments", nargs="+")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--batch", type=int, default=16, help="samples of each task in one update")
    parser.add_argument("--layers", type=int, nargs="+", default=[12, 24])
    args = parser.parse_args()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    folder = Path(args.arguments[-1])
    if args.what == "loop":
        compare_loop(folder, args.epochs, args.samples, args.batch)
    elif args.what == "memory":
        compare_memory(folder, args.layers)
    elif args.what == "side":
        run_side(args.arguments[0], folder, args.epochs, args.samples, args.batch)
    elif args.what == "build":
        build(folder, args.layers[0])
    else:
        merge_llama(folder)


if __name__ == "__main__":
    main()
