"""Merges image classifiers of different tasks with a few unlabelled images of each.

    python fewshot_vision.py DATA --samples 64 --seeds 0 1 2

DATA holds a folder `base` with the base model, and for every task a folder with its expert and a file `<task>.npz` with
`calibration_images`, `test_images` (n, height, width) of unsigned bytes and `test_labels`. Every expert keeps its own head.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers.utils import logging

from hf_merge import (
    CalibrationData,
    DirectDistillConfig,
    MergeConfig,
    Merger,
    ProDistillConfig,
    RegMeanConfig,
    RegMeanPlusPlusConfig,
    TsvMConfig,
)


COPIES = 16
METHODS: dict[str, tuple[MergeConfig, int]] = {
    "tsv_m, no data": (TsvMConfig(), 0),
    "regmean": (RegMeanConfig(), 1),
    "regmean_pp": (RegMeanPlusPlusConfig(), 1),
    "prodistill": (ProDistillConfig(), 1),
    "prodistill from regmean_pp, shifted copies": (
        ProDistillConfig(init="regmean_pp", epochs=6, batch_size=64, lr_scheduler="cosine"),
        COPIES,
    ),
    "direct_distill from regmean_pp, shifted copies": (
        DirectDistillConfig(init="regmean_pp", epochs=6, batch_size=32, lr_scheduler="cosine"),
        COPIES,
    ),
}


def as_pixels(images: np.ndarray) -> Tensor:
    """Bytes (n, height, width) as (n, 1, height, width) in [-1, 1]."""
    return torch.from_numpy(images).float().div(127.5).sub(1)[:, None]


def shifted(task: int, arguments: dict[str, Tensor], generator: np.random.Generator) -> dict[str, Tensor]:
    """Every image moved by at most two pixels."""
    images = arguments["pixel_values"]
    height, width = images.shape[-2:]
    padded = torch.nn.functional.pad(images, (2, 2, 2, 2), value=-1.0)
    moves = generator.integers(0, 5, (len(images), 2))
    moved = [image[:, y : y + height, x : x + width] for image, (y, x) in zip(padded, moves, strict=True)]
    return {**arguments, "pixel_values": torch.stack(moved)}


def samples_of(data: Path, tasks: Sequence[str], count: int, seed: int, copies: int) -> CalibrationData:
    """Some calibration images of every task, drawn with the seed."""
    chosen = {}
    for task in tasks:
        images = np.load(data / f"{task}.npz")["calibration_images"]
        rows = np.random.default_rng(seed).permutation(len(images))[:count]
        chosen[task] = {"pixel_values": as_pixels(images[rows])}
    return CalibrationData(chosen, augment=shifted if copies > 1 else None, copies=copies, seed=seed)


@torch.no_grad()
def accuracy(merger: Merger, data: Path, task: str) -> float:
    """Of the merged backbone under the task's own head, on the test images."""
    test = np.load(data / f"{task}.npz")
    predicted = merger.model_for(task).eval()(pixel_values=as_pixels(test["test_images"])).logits.argmax(-1)
    return float((predicted.numpy() == test["test_labels"]).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    args = parser.parse_args()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    tasks = sorted(path.stem for path in args.data.glob("*.npz"))
    experts = {task: args.data / task for task in tasks}
    for name in args.methods:
        config, copies = METHODS[name]
        for seed in args.seeds:
            merger = Merger.from_pretrained(experts, config, base_model=args.data / "base", dtype="float32")
            start = time.perf_counter()
            merger.merge(samples_of(args.data, tasks, args.samples, seed, copies) if copies else None)
            seconds = time.perf_counter() - start
            found = [accuracy(merger, args.data, task) for task in tasks]
            row = " ".join(f"{task} {value:.3f}" for task, value in zip(tasks, found, strict=True))
            print(f"{name:48s} seed {seed}: {row} mean {np.mean(found):.3f} ({seconds:.0f} s)", flush=True)


if __name__ == "__main__":
    main()
