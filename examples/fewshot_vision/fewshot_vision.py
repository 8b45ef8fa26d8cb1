"""Merges image classifiers of different tasks with a few unlabelled images of each.

    python fewshot_vision.py DATA --samples 64 --seeds 0 1 2

DATA holds a folder `base` with the base model, and for every task a folder with its expert and a file `<task>.npz` with
`calibration_images`, `test_images` (n, height, width) of unsigned bytes and `test_labels`. Accuracy is given under every expert's
own head, and under the heads that were fitted to the merged features.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForImageClassification, PreTrainedModel
from transformers.utils import logging

from hf_merge import (
    CalibrationData,
    Chain,
    DirectDistillConfig,
    MergeConfig,
    Merger,
    Mixup,
    ProDistillArguments,
    ProDistillConfig,
    RandomShift,
    RegMeanConfig,
    RegMeanPlusPlusConfig,
    TsvMConfig,
)


COPIES = 16
COSINE = {"init": "regmean_pp", "batch_size": 32, "lr_scheduler": "cosine", "fit_heads": True}
METHODS: dict[str, tuple[MergeConfig, int]] = {
    "tsv_m, no data": (TsvMConfig(), 0),
    "regmean": (RegMeanConfig(fit_heads=True), 1),
    "regmean_pp": (RegMeanPlusPlusConfig(fit_heads=True), 1),
    "prodistill": (ProDistillConfig(fit_heads=True), 1),
    "prodistill, 16 copies": (ProDistillConfig(epochs=10, learning_rate=0.03, **COSINE), COPIES),
    "direct_distill, 16 copies": (DirectDistillConfig(epochs=6, loss="logits", **COSINE), COPIES),
}


def as_pixels(images: np.ndarray) -> Tensor:
    """Bytes (n, height, width) as (n, 1, height, width) in [-1, 1]."""
    return torch.from_numpy(images).float().div(127.5).sub(1)[:, None]


def samples_of(data: Path, tasks: Sequence[str], count: int, seed: int, copies: int) -> CalibrationData:
    """Some calibration images of every task, drawn with the seed, and changed copies of them."""
    chosen = {}
    for task in tasks:
        images = np.load(data / f"{task}.npz")["calibration_images"]
        rows = np.random.default_rng(seed).permutation(len(images))[:count]
        chosen[task] = {"pixel_values": as_pixels(images[rows])}
    augment = Chain([RandomShift(2), Mixup(0.5)]) if copies > 1 else None
    return CalibrationData(chosen, augment=augment, copies=copies, seed=seed)


@torch.no_grad()
def accuracies(model: PreTrainedModel, own: nn.Linear, data: Path, task: str) -> tuple[float, float]:
    """On the test images: under the expert's own head, and under the model's."""
    test = np.load(data / f"{task}.npz")
    features: list[Tensor] = []
    model.classifier.register_forward_pre_hook(lambda module, args: features.append(args[0]))
    fitted = model(pixel_values=as_pixels(test["test_images"])).logits
    correct = [(logits.argmax(-1).numpy() == test["test_labels"]).mean() for logits in (own(features[0]), fitted)]
    return float(correct[0]), float(correct[1])


def report(name: str, seed: int, seconds: float, heads: str, values: Sequence[float], tasks: Sequence[str]) -> None:
    row = " ".join(f"{task} {value:.3f}" for task, value in zip(tasks, values, strict=True))
    print(f"{name:26s} seed {seed} {heads:12s} {row} mean {np.mean(values):.4f} ({seconds:.0f} s)", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD")
    parser.add_argument("--bf16", action="store_true", help="run blocks in bfloat16")
    args = parser.parse_args()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    tasks = sorted(path.stem for path in args.data.glob("*.npz"))
    experts = {task: args.data / task for task in tasks}
    for name in args.methods:
        config, copies = METHODS[name]
        for seed in args.seeds if copies else args.seeds[:1]:
            merger = Merger.from_pretrained(experts, config, base_model=args.data / "base", dtype="float32")
            start = time.perf_counter()
            if copies:
                samples = samples_of(args.data, tasks, args.samples, seed, copies)
                merger.merge(samples, args=ProDistillArguments(bf16=args.bf16))
            else:
                merger.merge()
            seconds = time.perf_counter() - start
            found = []
            for task in tasks:
                own = AutoModelForImageClassification.from_pretrained(experts[task], dtype="float32").classifier
                found.append(accuracies(merger.model_for(task).eval(), own, args.data, task))
            own_heads, fitted_heads = zip(*found, strict=True)
            report(name, seed, seconds, "own heads", own_heads, tasks)
            if copies:
                report(name, seed, seconds, "fitted heads", fitted_heads, tasks)


if __name__ == "__main__":
    main()
