"""Merges two image classifiers that were trained from different seeds: each has a base of its own and a task of its own.

    python fs_merge_vision.py --seeds 0 1 2

Data: scikit-learn's handwritten digits (`pip install scikit-learn`). Two vision transformers are trained on all ten digits
from two seeds; one is fine-tuned to name the digits 0 to 4, the other 5 to 9. 100 unlabelled images of each task, with shifts,
are what the merge is given. Per-task accuracy is over the task's classes; joint accuracy takes the most certain class of both
heads.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Sequence

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor
from transformers import PreTrainedModel, ViTConfig, ViTForImageClassification
from transformers.utils import logging

from hf_merge import CalibrationData, FsMergeConfig, KdConfig, LinearConfig, Merger
from hf_merge.config import MergeConfig


TASKS = {"low": range(5), "high": range(5, 10)}
TRAINING = {"epochs": 100, "batch_size": 50, "logit_weight": 1.0, "feature_weight": 0.1}
METHODS: dict[str, MergeConfig] = {
    "average": LinearConfig(heads="per_task"),
    "kd": KdConfig(learning_rate=1e-3, **TRAINING),
    "fs_merge": FsMergeConfig(
        form="full",
        learning_rate=5e-4,
        vector_learning_rate=1e-3,
        output_learning_rate=1e-3,
        inner_weight=0.3,
        **TRAINING,
    ),
}


def read_digits() -> tuple[Tensor, Tensor]:
    """Images (n, 1, 8, 8) in [-1, 1], and their labels."""
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 8 - 1
    return images, torch.tensor(data.target)


def shifted(images: Tensor, generator: np.random.Generator) -> Tensor:
    """Every image moved by at most one pixel, with some noise."""
    padded = torch.nn.functional.pad(images, (1, 1, 1, 1), value=-1.0)
    moves = generator.integers(0, 3, (len(images), 2))
    moved = [image[:, y : y + 8, x : x + 8] for image, (y, x) in zip(padded, moves, strict=True)]
    noise = torch.from_numpy(generator.normal(0, 0.1, tuple(images.shape))).float()
    return torch.stack(moved) + noise


def augment(task: int, arguments: dict[str, Tensor], generator: np.random.Generator) -> dict[str, Tensor]:
    return {**arguments, "pixel_values": shifted(arguments["pixel_values"], generator)}


def make_model(seed: int, labels: int, width: int) -> PreTrainedModel:
    torch.manual_seed(seed)
    config = ViTConfig(
        image_size=8, patch_size=2, num_channels=1, hidden_size=width, num_hidden_layers=4, num_attention_heads=4,
        intermediate_size=2 * width, hidden_dropout_prob=0.0, num_labels=labels,
    )  # fmt: skip
    return ViTForImageClassification(config)


def train(
    model: PreTrainedModel, images: Tensor, labels: Tensor, epochs: int, rate: float, seed: int
) -> PreTrainedModel:
    """Cross entropy on shifted images."""
    generator = np.random.default_rng(seed)
    steps = epochs * (len(images) // 64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    model.train()
    for _ in range(epochs):
        order = generator.permutation(len(images))
        for step in range(len(images) // 64):
            rows = order[step * 64 : step * 64 + 64]
            logits = model(pixel_values=shifted(images[rows], generator)).logits
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(logits, labels[rows]).backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def fine_tune(
    base: PreTrainedModel, task: Sequence[int], images: Tensor, labels: Tensor, seed: int
) -> PreTrainedModel:
    """The base with a new head, trained on the classes of a task."""
    model = copy.deepcopy(base)
    torch.manual_seed(seed)
    model.classifier = torch.nn.Linear(model.config.hidden_size, len(task))
    model.config.num_labels = len(task)
    rows = torch.isin(labels, torch.tensor(list(task)))
    return train(model, images[rows], labels[rows] - task[0], 10, 3e-4, seed)


@torch.no_grad()
def accuracies(models: dict[str, PreTrainedModel], images: Tensor, labels: Tensor) -> list[float]:
    """Of each task, and of both together."""
    logits = {name: model(pixel_values=images).logits for name, model in models.items()}
    result = []
    for name, classes in TASKS.items():
        rows = torch.isin(labels, torch.tensor(list(classes)))
        result.append(float((logits[name][rows].argmax(1) + classes[0] == labels[rows]).float().mean()))
    joint = torch.cat([logits[name] for name in TASKS], 1).argmax(1)
    return [*result, float((joint == labels).float().mean())]


def run(seed: int, widths: Sequence[int], epochs: int) -> None:
    images, labels = read_digits()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    train_rows, test_rows = order[:1200], order[1200:]
    experts = {}
    for index, (name, classes) in enumerate(TASKS.items()):
        base = make_model(10 * seed + index, 10, widths[index])
        base = train(base, images[train_rows], labels[train_rows], epochs, 2e-3, seed)
        experts[name] = fine_tune(base, classes, images[train_rows], labels[train_rows], seed)
    test = images[test_rows], labels[test_rows]
    report(f"seed {seed} experts", accuracies(experts, *test))
    calibration = {}
    for name, classes in TASKS.items():
        rows = train_rows[torch.isin(labels[train_rows], torch.tensor(list(classes)))][:100]
        calibration[name] = {"pixel_values": images[rows]}
    for method, config in METHODS.items():
        for names in (["low", "high"], ["high", "low"]):
            if method == "average" and (widths[0] != widths[1] or names[0] != "low"):
                continue
            merger = Merger.from_pretrained({name: experts[name] for name in names}, config)
            merger.merge(None if method == "average" else CalibrationData(calibration, augment=augment))
            merged = {name: merger.model_for(name) for name in TASKS}
            report(f"seed {seed} {method}, {names[0]} first", accuracies(merged, *test))


def report(what: str, values: Sequence[float]) -> None:
    low, high, joint = values
    print(f"{what:32s} low {low:.3f} high {high:.3f} mean {(low + high) / 2:.3f} joint {joint:.3f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--widths", type=int, nargs=2, default=[64, 64])
    parser.add_argument("--epochs", type=int, default=30)
    args = parser.parse_args()
    logging.disable_progress_bar()
    for seed in args.seeds:
        run(seed, args.widths, args.epochs)


if __name__ == "__main__":
    main()
