"""Trains one LoRA adapter per task from one base model, by distillation from fully fine-tuned experts.

An adapter starts from the leading singular triplets of the expert's change (`--init svd`) or from PEFT's random factors
(`--init random`, which takes some hundred steps more), and is trained on the expert's answers.

    python train_adapters.py MODELS OUT --bf16

MODELS holds a folder `base` with the base model and its tokenizer, a folder with the fully fine-tuned expert of every task, and
a folder `data` with `<task>.json` for each: `{"calibration": [[text, label], ...], "test": [[text, label], ...]}`. Only the
calibration rows are used: a few labels of the task itself, and the texts of all tasks, whole and cut, under the expert's own
answers. OUT gets a PEFT adapter (rank 16, all linear layers, with the classifier) for every task.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model, load_peft_weights, set_peft_model_state_dict
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging

from hf_merge.engines.extraction import Extraction, extract_lora


MAX_LENGTH = 48
TEMPERATURE = 2.0

Row = tuple[str, int]


def read_rows(models: Path, task: str) -> list[Row]:
    """The calibration rows of a task; its test rows are never read here."""
    return json.loads((models / "data" / f"{task}.json").read_text(encoding="utf-8"))["calibration"]


def cut(text: str, generator: np.random.Generator) -> str:
    """A text without some of its words, from a random place on."""
    words = text.split()
    start = generator.integers(0, max(1, len(words) - 6))
    return " ".join(word for word in words[start : start + MAX_LENGTH] if generator.random() > 0.15) or text


def batches(
    own: Sequence[Row], texts: Sequence[str], steps: int, size: int, generator: np.random.Generator
) -> Iterator[tuple[list[str], list[int]]]:
    """Texts and labels: a quarter of a batch are rows of the task, the rest texts without a label (-100)."""
    for _ in range(steps):
        rows = [own[index] for index in generator.choice(len(own), size // 4)]
        pool = [own[index][0] for index in generator.choice(len(own), size // 2)]
        pool += [texts[index] for index in generator.choice(len(texts), size - len(rows) - len(pool))]
        yield (
            [row[0] for row in rows] + [cut(text, generator) for text in pool],
            [row[1] for row in rows] + [-100] * len(pool),
        )


def loss_of(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """The expert's answers, and the labels where there are some."""
    soft = functional.kl_div(
        functional.log_softmax(student / TEMPERATURE, -1),
        functional.softmax(teacher / TEMPERATURE, -1),
        reduction="batchmean",
    )
    return TEMPERATURE**2 * soft + functional.cross_entropy(student, labels, ignore_index=-100)


def start_from_expert(model: PeftModel, models: Path, task: str, rank: int) -> None:
    """Loads the expert's change, cut to a rank, into the adapter."""
    settings = Extraction(rank=rank, include=[r"(query|key|value|dense)\.weight$", "classifier"])
    with tempfile.TemporaryDirectory() as folder:
        extract_lora(str(models / task), str(models / "base"), Path(folder) / task, settings)
        set_peft_model_state_dict(model, load_peft_weights(str(Path(folder) / task), device="cpu"))


def train(models: Path, task: str, texts: Sequence[str], args: argparse.Namespace) -> PeftModel:
    """One adapter."""
    # Adapters of different people do not start from the same random factors.
    seed = args.seed + sum(map(ord, task))
    generator = np.random.default_rng(seed)
    torch.manual_seed(seed)
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(models / "base")
    expert = AutoModelForSequenceClassification.from_pretrained(models / task).eval()
    base = AutoModelForSequenceClassification.from_pretrained(
        models / "base", num_labels=expert.config.num_labels, id2label=expert.config.id2label
    )
    base.classifier.load_state_dict(expert.classifier.state_dict())
    config = LoraConfig(
        task_type="SEQ_CLS",
        r=args.rank,
        lora_alpha=args.rank,
        target_modules="all-linear",
        modules_to_save=["classifier"],
    )
    model = get_peft_model(base, config).train()
    if args.init == "svd":
        start_from_expert(model, models, task, args.rank)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=args.learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, args.learning_rate, total_steps=args.steps, pct_start=0.1
    )
    for step, (chosen, labels) in enumerate(
        batches(read_rows(models, task), texts, args.steps, args.batch, generator)
    ):
        batch = tokenizer(chosen, truncation=True, max_length=MAX_LENGTH, padding=True, return_tensors="pt")
        with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
            with torch.no_grad():
                answers = expert(**batch).logits.float()
            loss = loss_of(model(**batch).logits.float(), answers, torch.tensor(labels))
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 50 == 0:
            print(f"{task} step {step}: loss {loss.item():.3f}", flush=True)
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tasks", nargs="+")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--init", choices=("svd", "random"), default="svd")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bf16", action="store_true", help="train in bfloat16 (autocast)")
    args = parser.parse_args()
    logging.set_verbosity_error()
    tasks = sorted(path.stem for path in (args.models / "data").glob("*.json"))
    texts = [row[0] for task in tasks for row in read_rows(args.models, task)]
    for task in args.tasks or tasks:
        train(args.models, task, texts, args).save_pretrained(args.out / task)


if __name__ == "__main__":
    main()
