"""Fine-tunes one model on several tasks and merges the results, in one call.

    python finetune_then_merge.py MODELS --method wudi --rows 256

MODELS holds a folder `base` with the model to start from and its tokenizer, and a folder `data` with `<task>.json` for each task:
`{"labels": [...], "calibration": [[text, label], ...], "test": [[text, label], ...]}`. The experts are trained on calibration rows,
and on nothing else; methods that need samples get some of the same rows.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    EvalPrediction,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.utils import logging

from hf_merge import MergeConfig, merge_trainers


MAX_LENGTH = 48


def encode(rows: list[tuple[str, int]], tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Any]]:
    texts, labels = zip(*rows, strict=True)
    encoded = tokenizer(list(texts), truncation=True, max_length=MAX_LENGTH)
    return [{"input_ids": ids, "labels": label} for ids, label in zip(encoded["input_ids"], labels, strict=True)]


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def make_trainer(models: Path, task: str, output_dir: Path, args: argparse.Namespace) -> Trainer:
    """A trainer like any other."""
    data = json.loads((models / "data" / f"{task}.json").read_text(encoding="utf-8"))
    tokenizer = AutoTokenizer.from_pretrained(models / "base")
    names = dict(enumerate(data["labels"]))
    set_seed(args.seed)
    model = AutoModelForSequenceClassification.from_pretrained(
        models / "base", id2label=names, label2id={name: index for index, name in names.items()}, dtype="float32"
    )
    order = np.random.default_rng(args.seed).permutation(len(data["calibration"]))[: args.rows]
    options = TrainingArguments(
        output_dir,
        num_train_epochs=args.epochs,
        learning_rate=args.learning_rate,
        per_device_train_batch_size=16,
        per_device_eval_batch_size=100,
        warmup_steps=10,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        bf16=args.bf16,
        use_cpu=args.cpu,
        disable_tqdm=True,
        seed=args.seed,
    )
    trainer = Trainer(
        model,
        options,
        train_dataset=encode([data["calibration"][index] for index in order], tokenizer),
        eval_dataset=encode(data["test"][: args.test_rows], tokenizer),
        data_collator=DataCollatorWithPadding(tokenizer),
        processing_class=tokenizer,
        compute_metrics=accuracy,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path)
    parser.add_argument("--method", default="wudi", help="any method of `hf-merge methods`")
    parser.add_argument("--rows", type=int, default=256, help="training rows of each task")
    parser.add_argument("--test-rows", type=int, default=500)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--num-samples", type=int, default=64, help="samples of each task, for methods that need some")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--out", type=Path, help="also write the merged model")
    args = parser.parse_args()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    tasks = sorted(path.stem for path in (args.models / "data").glob("*.json"))
    with tempfile.TemporaryDirectory() as folder:
        trainers = {task: make_trainer(args.models, task, Path(folder) / task, args) for task in tasks}
        start = time.perf_counter()
        merger = merge_trainers(
            trainers, MergeConfig.from_merge_type(args.method), num_samples=args.num_samples, output_dir=args.out
        )
        print(f"trained and merged in {time.perf_counter() - start:.0f} s")
        for task, trainer in trainers.items():
            alone = trainer.evaluate()["eval_accuracy"]
            trainer.model = trainer.model_wrapped = merger.model_for(task).to(trainer.args.device)
            print(f"{task:10s} expert {alone:.3f}  merged {trainer.evaluate()['eval_accuracy']:.3f}")


if __name__ == "__main__":
    main()
