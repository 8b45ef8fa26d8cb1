"""Merges text classifiers of different tasks with a few unlabelled texts of each.

    python fewshot_text.py MODELS --samples 64 --seeds 0 1 2

MODELS holds a folder `base` with the base model and its tokenizer, a folder with the expert of every task, and a folder `data`
with `<task>.json` for each: `{"calibration": [[text, label], ...], "test": [[text, label], ...]}`. Every expert keeps its own
head.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging

from hf_merge import (
    CalibrationData,
    DirectDistillConfig,
    MergeConfig,
    Merger,
    ProDistillArguments,
    ProDistillConfig,
    RegMeanConfig,
    RegMeanPlusPlusConfig,
    WudiConfig,
)


MAX_LENGTH = 48
METHODS: dict[str, MergeConfig] = {
    "wudi, no data": WudiConfig(),
    "regmean": RegMeanConfig(),
    "regmean_pp from wudi": RegMeanPlusPlusConfig(init="wudi", ridge=0.3),
    "prodistill from task arithmetic": ProDistillConfig(batch_size=16, epochs=10, learning_rate=0.05),
    "prodistill from wudi": ProDistillConfig(init="wudi", batch_size=16, epochs=10, learning_rate=0.05),
    "direct_distill from wudi": DirectDistillConfig(init="wudi", epochs=15, learning_rate=1e-4, lr_scheduler="cosine"),
}

Row = tuple[str, int]


def read(models: Path, task: str) -> dict[str, list[Row]]:
    return json.loads((models / "data" / f"{task}.json").read_text(encoding="utf-8"))


def samples_of(models: Path, tasks: Sequence[str], count: int, seed: int) -> CalibrationData:
    """Some calibration texts of every task, drawn with the seed."""
    chosen = {}
    for task in tasks:
        rows = read(models, task)["calibration"]
        order = np.random.default_rng(seed).permutation(len(rows))[:count]
        chosen[task] = [rows[index][0] for index in order]
    return CalibrationData(chosen, max_length=MAX_LENGTH)


@torch.no_grad()
def accuracy(merger: Merger, tokenizer: PreTrainedTokenizerBase, task: str, rows: Sequence[Row]) -> float:
    """Of the merged backbone under the task's own head."""
    model = merger.model_for(task).eval()
    rows = sorted(rows, key=lambda row: len(row[0]))
    correct = 0
    for start in range(0, len(rows), 100):
        texts, labels = zip(*rows[start : start + 100], strict=True)
        batch = tokenizer(list(texts), truncation=True, max_length=MAX_LENGTH, padding=True, return_tensors="pt")
        correct += int((model(**batch).logits.argmax(-1) == torch.tensor(labels)).sum())
    return correct / len(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--bf16", action="store_true", help="run blocks in bfloat16")
    args = parser.parse_args()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    tasks = sorted(path.stem for path in (args.models / "data").glob("*.json"))
    experts = {task: args.models / task for task in tasks}
    tokenizer = AutoTokenizer.from_pretrained(args.models / "base")
    for name in args.methods:
        for seed in args.seeds:
            merger = Merger.from_pretrained(experts, METHODS[name], base_model=args.models / "base", dtype="float32")
            start = time.perf_counter()
            if name.endswith("no data"):
                merger.merge()
            else:
                samples = samples_of(args.models, tasks, args.samples, seed)
                merger.merge(samples, args=ProDistillArguments(bf16=args.bf16))
            seconds = time.perf_counter() - start
            found = [accuracy(merger, tokenizer, task, read(args.models, task)["test"]) for task in tasks]
            row = " ".join(f"{task} {value:.3f}" for task, value in zip(tasks, found, strict=True))
            print(f"{name:36s} seed {seed}: {row} mean {np.mean(found):.3f} ({seconds:.0f} s)", flush=True)


if __name__ == "__main__":
    main()
