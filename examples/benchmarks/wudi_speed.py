"""Compares the time, memory and result of hf_merge's WUDI with FusionBench's on the linear layers of the same experts.

    python wudi_speed.py --base BASE --experts A B C --fusion-bench-python VENV/bin/python

FusionBench (`pip install fusion-bench`) lives in an environment of its own, whose python is given. Each implementation runs in fresh
processes, on the CPU, with one thread, on the same task vectors: the weights of the linear layers of the encoder's blocks.

- Time is the processor's, of the solver alone.
- Memory is what the merge of a layer adds at its peak to what the process held before, with the task vectors loaded: the most over
  all layers. It needs three Adam steps and is measured apart, with an allocator that returns what is freed at once, so that it is
  what an implementation uses and not what the allocator keeps. Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


IMPLEMENTATIONS = ("fusion_bench", "adam", "adaptive")
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
RETURN_FREED_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "65536"}
MEMORY_STEPS = 3


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


def reset_peak() -> None:
    """Makes the kernel forget the peak resident size so far, that of the imports."""
    Path("/proc/self/clear_refs").write_text("5")


def resident_megabytes(key: str) -> float:
    """The resident size of this process: now (`VmRSS`) or at its peak (`VmHWM`)."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key)]
    return int(line.split()[1]) / 1024


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


def work(implementation: str, measured: str, folder: Path, steps: int) -> None:
    """A child process: reads the task vectors, merges, writes what is measured, and the result with the time."""
    torch.set_num_threads(1)
    # Copied, because the pages of a mapped file become resident only when they are read.
    vectors = [
        {name: tensor.clone() for name, tensor in load_file(file).items()}
        for file in sorted(folder.glob("vectors-*.safetensors"))
    ]
    # One step on one small matrix: imports and the libraries' own buffers are not what is compared.
    run(implementation, [{"warm": 1e-3 * torch.randn(256, 256)} for _ in vectors], 1)
    if measured == "megabytes":
        figure = max(layer_megabytes(implementation, vectors, name, steps) for name in vectors[0])
    else:
        start = time.process_time()
        merged = run(implementation, vectors, steps)
        figure = time.process_time() - start
        save_file(
            {name: matrix.contiguous() for name, matrix in merged.items()}, folder / f"{implementation}.safetensors"
        )
    (folder / "figure.json").write_text(json.dumps(figure))


def layer_megabytes(implementation: str, vectors: list[dict[str, torch.Tensor]], name: str, steps: int) -> float:
    """The peak of one layer over what was resident before it."""
    reset_peak()
    before = resident_megabytes("VmRSS")
    run(implementation, [{name: vector[name]} for vector in vectors], steps)
    return resident_megabytes("VmHWM") - before


def run(implementation: str, vectors: list[dict[str, torch.Tensor]], steps: int) -> dict[str, torch.Tensor]:
    if implementation == "fusion_bench":
        return run_fusion_bench(vectors, steps)
    return run_hf_merge(vectors, steps, implementation)


def measure(implementation: str, python: str, folder: Path, steps: int) -> dict[str, float]:
    return {
        "seconds": measure_in_child(implementation, python, "seconds", folder, steps, ONE_THREAD),
        "megabytes": measure_in_child(
            implementation, python, "megabytes", folder, MEMORY_STEPS, ONE_THREAD | RETURN_FREED_MEMORY
        ),
    }


def measure_in_child(
    implementation: str, python: str, measured: str, folder: Path, steps: int, environment: dict[str, str]
) -> float:
    command = [python, __file__, "--work", implementation, "--measured", measured]
    command += ["--folder", str(folder), "--steps", str(steps)]
    subprocess.run(
        command, check=True, env=os.environ | environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    return json.loads((folder / "figure.json").read_text())


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
    parser.add_argument("--measured", choices=("seconds", "megabytes"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        work(arguments.work, arguments.measured, arguments.folder, arguments.steps)
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
