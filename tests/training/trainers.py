"""Small trainers that train the same way each time."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments, set_seed


SIZE = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 16,
}


def rows(count: int = 24, labels: int = 2, seed: int = 0) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 40, (count, 8), generator=generator)
    return [{"input_ids": row, "labels": row.sum() % labels} for row in ids]


def save_base(folder: Path, seed: int = 0, labels: int = 2) -> Path:
    set_seed(seed)
    BertForSequenceClassification(BertConfig(num_labels=labels, **SIZE)).save_pretrained(folder)
    return folder


def accuracy(prediction) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def make_trainer(
    base: Path | torch.nn.Module, output_dir: Path, *, callbacks=(), labels: int = 2, seed: int = 0, **args
) -> Trainer:
    """Six steps over two epochs; dropout is on, so that a random number that is drawn elsewhere changes the training."""
    set_seed(seed)
    if isinstance(base, Path):
        base = BertForSequenceClassification.from_pretrained(base, num_labels=labels, ignore_mismatched_sizes=True)
    options = {
        "num_train_epochs": 2,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return Trainer(
        base,
        TrainingArguments(output_dir, **{**options, **args}),
        train_dataset=rows(labels=labels, seed=seed),
        eval_dataset=rows(8, labels, seed + 1),
        compute_metrics=accuracy,
        callbacks=list(callbacks),
    )


def state_of(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
