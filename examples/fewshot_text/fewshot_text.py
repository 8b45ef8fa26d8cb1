"""Merges text classifiers of different tasks with a few unlabelled texts of each.

    python fewshot_text.py MODELS --samples 64 --seeds 0 1 2

MODELS holds a folder `base` with the base model and its tokenizer, a folder with the expert of every task, and a folder `data`
with `<task>.json` for each: `{"calibration": [[text, label], ...], "test": [[text, label], ...]}`. Accuracy is given under every
expert's own head, and under the heads that were fitted to the merged features.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
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
COSINE = {"lr_scheduler": "cosine", "batch_size": 16, "fit_heads": True}
METHODS: dict[str, MergeConfig] = {
    "wudi, no data": WudiConfig(),
    "regmean": RegMeanConfig(fit_heads=True),
    "regmean_pp from wudi": RegMeanPlusPlusConfig(init="wudi", ridge=0.3, fit_heads=True),
    "prodistill": ProDistillConfig(epochs=10, learning_rate=0.05, **COSINE),
    "prodistill from wudi": ProDistillConfig(init="wudi", epochs=5, **COSINE),
    "direct_distill from wudi": DirectDistillConfig(init="wudi", epochs=15, learning_rate=1e-4, **COSINE),
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
def accuracies(
    model: PreTrainedModel, own: nn.Linear, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], bf16: bool
) -> tuple[float, float]:
    """Under the expert's own head, and under the model's."""
    features: list[Tensor] = []
    model.classifier.register_forward_pre_hook(lambda module, args: features.append(args[0].float()))
    rows = sorted(rows, key=lambda row: len(row[0]))
    correct = [0, 0]
    for start in range(0, len(rows), 100):
        texts, labels = zip(*rows[start : start + 100], strict=True)
        batch = tokenizer(list(texts), truncation=True, max_length=MAX_LENGTH, padding=True, return_tensors="pt")
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            model(**batch)
        for index, head in enumerate((own, model.classifier)):
            logits = torch.nn.functional.linear(features[-1], head.weight, head.bias)
            correct[index] += int((logits.argmax(-1) == torch.tensor(labels)).sum())
    return correct[0] / len(rows), correct[1] / len(rows)


def report(name: str, seed: int, seconds: float, heads: str, values: Sequence[float], tasks: Sequence[str]) -> None:
    row = " ".join(f"{task} {value:.3f}" for task, value in zip(tasks, values, strict=True))
    print(f"{name:26s} seed {seed} {heads:12s} {row} mean {np.mean(values):.4f} ({seconds:.0f} s)", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD")
    parser.add_argument("--bf16", action="store_true", help="run models in bfloat16")
    args = parser.parse_args()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    tasks = sorted(path.stem for path in (args.models / "data").glob("*.json"))
    experts = {task: args.models / task for task in tasks}
    tokenizer = AutoTokenizer.from_pretrained(args.models / "base")
    for name in args.methods:
        has_data = not name.endswith("no data")
        for seed in args.seeds if has_data else args.seeds[:1]:
            merger = Merger.from_pretrained(experts, METHODS[name], base_model=args.models / "base", dtype="float32")
            start = time.perf_counter()
            if has_data:
                samples = samples_of(args.models, tasks, args.samples, seed)
                merger.merge(samples, args=ProDistillArguments(bf16=args.bf16))
            else:
                merger.merge()
            seconds = time.perf_counter() - start
            found = []
            for task in tasks:
                own = AutoModelForSequenceClassification.from_pretrained(experts[task], dtype="float32").classifier
                test = read(args.models, task)["test"]
                found.append(accuracies(merger.model_for(task).eval(), own, tokenizer, test, args.bf16))
            own_heads, fitted_heads = zip(*found, strict=True)
            report(name, seed, seconds, "own heads", own_heads, tasks)
            if has_data:
                report(name, seed, seconds, "fitted heads", fitted_heads, tasks)


if __name__ == "__main__":
    main()
