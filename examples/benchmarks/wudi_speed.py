"""Compares the time, memory and result of hf_merge's WUDI with FusionBench's on the linear layers of the same experts.

    python wudi_speed.py --base BASE --experts A B C --fusion-bench-python VENV/bin/python

FusionBench (`pip install fusion-bench`) lives in an environment of its own, whose python is given. Each implementation runs in a fresh
process, on the CPU, with one thread, on the same task vectors: the weights of the linear layers of the encoder's blocks. Time is the
processor's, of the solver alone, memory the growth of the process' peak resident size over what it held with the task vectors loaded.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


IMPLEMENTATIONS = ("fusion_bench", "adam", "adaptive")


def read_encoder_weights(folder: Path) -> dict[str, torch.Tensor]:
    """The 2-D weights of the blocks of a checkpoint, by names that do not depend on a task model's prefix."""
    tensors = {}
    for shard in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(shard)
    return {
        name[name.index("encoder.") :]: tensor.float()
        for name, tensor in tensors.items()
        if "encoder." in name and name.endswith(".weight") and tensor.dim() == 2
    }


def peak_megabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def run_fusion_bench(vectors: list[dict[str, torch.Tensor]], steps: int) -> dict[str, torch.Tensor]:
    from fusion_bench.method.wudi.wudi import wudi_merging

    return {name: merged.detach() for name, merged in wudi_merging(vectors, accelerator="cpu", iter_num=steps).items()}


def run_hf_merge(vectors: list[dict[str, torch.Tensor]], steps: int, solver: str) -> dict[str, torch.Tensor]:
    from hf_merge import WudiConfig
    from hf_merge.methods.base import ParameterKind, TensorGroup
    from hf_merge.methods.wudi import Wudi

    config, method = WudiConfig(solver=solver, num_steps=steps, check_norms=False), Wudi()
    names = tuple(f"expert{index}" for index in range(len(vectors)))
    merged = {}
    for name in vectors[0]:
        stored = [vector[name] for vector in vectors]
        settings = config.resolve(name, 0.5, names)
        base = torch.zeros(()).expand_as(stored[0])
        merged[name] = method(TensorGroup(name, ParameterKind.LINEAR, base, stored, names, settings))
    return merged


def work(implementation: str, folder: Path, steps: int) -> None:
    """The child process: reads the task vectors, merges, writes the result and its figures."""
    torch.set_num_threads(1)
    # Copied, because the pages of a mapped file become resident only when they are read.
    vectors = [
        {name: tensor.clone() for name, tensor in load_file(file).items()}
        for file in sorted(folder.glob("vectors-*.safetensors"))
    ]
    names = list(vectors[0])
    # One step on one small matrix: imports and allocators are not what is compared.
    run(implementation, [{"warm": torch.randn(8, 8)} for _ in vectors], 1)
    before, start = peak_megabytes(), time.process_time()
    merged = run(implementation, vectors, steps)
    figures = {"seconds": time.process_time() - start, "megabytes": peak_megabytes() - before}
    save_file({name: merged[name].contiguous() for name in names}, folder / f"{implementation}.safetensors")
    (folder / f"{implementation}.json").write_text(json.dumps(figures))


def run(implementation: str, vectors: list[dict[str, torch.Tensor]], steps: int) -> dict[str, torch.Tensor]:
    if implementation == "fusion_bench":
        return run_fusion_bench(vectors, steps)
    return run_hf_merge(vectors, steps, implementation)


def measure(implementation: str, python: str, folder: Path, steps: int) -> dict[str, float]:
    command = [python, __file__, "--work", implementation, "--folder", str(folder), "--steps", str(steps)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return json.loads((folder / f"{implementation}.json").read_text())


def relative_difference(left: Path, right: Path) -> float:
    """‖left − right‖ / ‖right‖ over all layers."""
    a, b = load_file(left), load_file(right)
    difference = sum(((a[name] - b[name]).double().norm() ** 2).item() for name in b)
    return (difference / sum((b[name].double().norm() ** 2).item() for name in b)) ** 0.5


def report(figures: dict[str, dict[str, float]], difference: float) -> None:
    reference = figures["fusion_bench"]
    write = sys.stdout.write
    for name, figure in figures.items():
        faster, smaller = (reference[key] / max(figure[key], 1e-9) for key in ("seconds", "megabytes"))
        write(f"{name:14s} {figure['seconds']:9.2f} s  {figure['megabytes']:8.1f} MB")
        write(f"   {faster:6.1f} x faster, 1/{smaller:.1f} of the memory\n")
    write(f"relative difference of the Adam results: {difference:.1e}\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, help="Folder of the base model.")
    parser.add_argument("--experts", type=Path, nargs="+", help="Folders of the experts.")
    parser.add_argument("--fusion-bench-python", help="The python of an environment with fusion-bench.")
    parser.add_argument("--steps", type=int, default=300, help="Adam steps.")
    parser.add_argument("--layers", default="", help="Only layers whose name contains this.")
    parser.add_argument("--work", choices=IMPLEMENTATIONS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        work(arguments.work, arguments.folder, arguments.steps)
        return
    if not (arguments.base and arguments.experts and arguments.fusion_bench_python):
        parser.error("--base, --experts and --fusion-bench-python are needed")
    base = read_encoder_weights(arguments.base)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for index, expert in enumerate(arguments.experts):
            weights = read_encoder_weights(expert)
            vectors = {name: weights[name] - base[name] for name in base if arguments.layers in name}
            save_file(vectors, folder / f"vectors-{index:03d}.safetensors")
        pythons = {"fusion_bench": arguments.fusion_bench_python}
        figures = {
            name: measure(name, pythons.get(name, sys.executable), folder, arguments.steps) for name in IMPLEMENTATIONS
        }
        difference = relative_difference(folder / "adam.safetensors", folder / "fusion_bench.safetensors")
    report(figures, difference)


if __name__ == "__main__":
    main()
