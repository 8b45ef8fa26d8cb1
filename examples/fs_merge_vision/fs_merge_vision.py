"""Merges two image classifiers that were trained from different seeds: each has a base of its own and a task of its own.

    python fs_merge_vision.py --seeds 0 1
    python fs_merge_vision.py --seeds 0 --widths 192 128
    python fs_merge_vision.py --data digits --seeds 0 1 2

Data: Fashion-MNIST, where Debian's `dataset-fashion-mnist` or `--folder` has it, or scikit-learn's handwritten digits. Two vision
transformers are trained on all ten classes from two seeds; one is fine-tuned to the first five classes, the other to the last
five. 100 unlabelled images of each task, with augmentation, are what a merge is given. Per-task accuracy is over the task's
classes; joint accuracy takes the most certain class of both heads. `--tune` reports the held-out loss of every candidate setting
instead, on a quarter of the 100 images; test images play no part in it.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import gzip
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, ViTConfig, ViTForImageClassification
from transformers.utils import logging

from hf_merge import CalibrationData, FsMergeConfig, KdConfig, LinearConfig, Merger, ProDistillArguments
from hf_merge.config import MergeConfig


TASKS = {"low": range(5), "high": range(5, 10)}
IMAGES = 100
"""Of each task, for a merge."""
TRAINING = {"epochs": 150, "batch_size": 50, "logit_weight": 1.0, "feature_weight": 0.1, "fit_maps": True}
METHODS: dict[str, MergeConfig] = {
    "average": LinearConfig(heads="per_task"),
    "kd": KdConfig(learning_rate=1.25e-4, **TRAINING),
    "fs_merge": FsMergeConfig(rank=24, learning_rate=1e-3, **TRAINING),
}
CANDIDATES: list[MergeConfig] = [
    *(KdConfig(learning_rate=rate, **TRAINING) for rate in (1.25e-4, 2.5e-4, 5e-4, 1e-3)),
    *(FsMergeConfig(rank=24, learning_rate=rate, **TRAINING) for rate in (5e-4, 1e-3, 2e-3, 6e-3)),
]
"""As many of each method."""


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Images (n, 1, size, size) in [-1, 1] with ten classes, and how models of them are made.

    Args:
        images, labels (`torch.Tensor`): For training.
        test_images, test_labels (`torch.Tensor`): For the test.
        patch (`int`): Pixels of a patch.
        layers, heads (`int`): Of the models.
        epochs (`int`): Of the training of a base.
        fine_tuning (`int`): Epochs of a fine-tuning.
        shift (`int`): Pixels by which augmentation moves an image.
        flip (`bool`): Whether augmentation may mirror an image.
        width (`int`): Of the models.
    """

    images: Tensor
    labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    patch: int
    layers: int
    heads: int
    epochs: int
    fine_tuning: int
    shift: int
    flip: bool
    width: int


def read_digits() -> Dataset:
    """8 x 8 images of handwritten digits."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images, labels = torch.tensor(data.images, dtype=torch.float32)[:, None] / 8 - 1, torch.tensor(data.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    train, test = order[:1200], order[1200:]
    return Dataset(
        images[train], labels[train], images[test], labels[test],
        patch=2, layers=4, heads=4, epochs=30, fine_tuning=10, shift=1, flip=False, width=64,
    )  # fmt: skip


def read_fashion(folder: Path) -> Dataset:
    """28 x 28 images of clothes: 20 000 for training, 4000 for the test."""

    def read(name: str, count: int, header: int, shape: tuple[int, ...]) -> np.ndarray:
        with gzip.open(folder / f"{name}-ubyte.gz") as file:
            return np.frombuffer(file.read(header + count * int(np.prod(shape))), np.uint8, offset=header).reshape(
                count, *shape
            )

    def pair(part: str, count: int) -> tuple[Tensor, Tensor]:
        images = torch.from_numpy(read(f"{part}-images-idx3", count, 16, (1, 28, 28)).copy()).float() / 127.5 - 1
        return images, torch.from_numpy(read(f"{part}-labels-idx1", count, 8, ()).copy()).long()

    return Dataset(
        *pair("train", 20_000), *pair("t10k", 4000),
        patch=7, layers=6, heads=6, epochs=4, fine_tuning=1, shift=2, flip=True, width=192,
    )  # fmt: skip


class Augmentation:
    """Moves and mirrors images, adds noise, and blends some with another image of the batch.

    Args:
        data ([`Dataset`]): The images.
        blend (`float`): The part of the images that are blended; labels would be wrong then, features of an expert are not.
    """

    def __init__(self, data: Dataset, blend: float = 0.0):
        self.data, self.blend = data, blend

    def images(self, images: Tensor, generator: np.random.Generator) -> Tensor:
        shift, size = self.data.shift, images.shape[-1]
        padded = torch.nn.functional.pad(images, (shift,) * 4, value=-1.0)
        moves = generator.integers(0, 2 * shift + 1, (len(images), 2))
        moved = torch.stack(
            [image[:, y : y + size, x : x + size] for image, (y, x) in zip(padded, moves, strict=True)]
        )
        if self.data.flip:
            mirrored = torch.from_numpy(generator.random(len(images)) < 0.5)
            moved[mirrored] = moved[mirrored].flip(-1)
        if self.blend:
            other = moved[torch.from_numpy(generator.permutation(len(images)))]
            part = generator.random(len(images)) * (generator.random(len(images)) < self.blend)
            weight = torch.from_numpy(part).float().reshape(-1, 1, 1, 1)
            moved = (1 - weight) * moved + weight * other
        return moved + torch.from_numpy(generator.normal(0, 0.1, tuple(images.shape))).float()

    def __call__(self, task: int, arguments: dict[str, Tensor], generator: np.random.Generator) -> dict[str, Tensor]:
        return {**arguments, "pixel_values": self.images(arguments["pixel_values"], generator)}


def make_model(data: Dataset, seed: int, labels: int, width: int) -> PreTrainedModel:
    """A model with random weights; a narrower one has fewer heads of the same size."""
    torch.manual_seed(seed)
    config = ViTConfig(
        image_size=data.images.shape[-1], patch_size=data.patch, num_channels=1, hidden_size=width,
        num_hidden_layers=data.layers, num_attention_heads=data.heads * width // data.width,
        intermediate_size=2 * width, hidden_dropout_prob=0.0, num_labels=labels,
    )  # fmt: skip
    return ViTForImageClassification(config)


def train(
    model: PreTrainedModel, data: Dataset, rows: Tensor, labels: Tensor, epochs: int, rate: float, seed: int
) -> PreTrainedModel:
    """Cross entropy on augmented images, in batches of 64.

    Args:
        model ([`~transformers.PreTrainedModel`]): Is trained in place.
        data ([`Dataset`]): The images.
        rows, labels (`torch.Tensor`): Which images, and their labels for this model.
        epochs (`int`), rate (`float`), seed (`int`): Of the training.
    """
    generator = np.random.default_rng(seed)
    augmentation = Augmentation(data)
    steps = len(rows) // 64
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=epochs * steps)
    model.train()
    for _ in range(epochs):
        order = torch.from_numpy(generator.permutation(len(rows)))
        for step in range(steps):
            chosen = order[step * 64 : step * 64 + 64]
            with torch.autocast("cpu", torch.bfloat16):
                logits = model(pixel_values=augmentation.images(data.images[rows[chosen]], generator)).logits
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(logits.float(), labels[chosen]).backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def make_expert(data: Dataset, task: Sequence[int], seed: int, width: int) -> PreTrainedModel:
    """A base that knows all ten classes, fine-tuned under a new head to those of a task."""
    everything = torch.arange(len(data.images))
    base = train(make_model(data, seed, 10, width), data, everything, data.labels, data.epochs, 2e-3, seed)
    model = copy.deepcopy(base)
    torch.manual_seed(seed)
    model.classifier = torch.nn.Linear(width, len(task))
    model.config.num_labels = len(task)
    rows = rows_of(data.labels, task)
    return train(model, data, rows, data.labels[rows] - task[0], data.fine_tuning, 3e-4, seed)


def experts_of(data: Dataset, seed: int, widths: Sequence[int], folder: Path | None) -> dict[str, PreTrainedModel]:
    """The experts, kept in a folder."""
    experts = {}
    for index, (task, classes) in enumerate(TASKS.items()):
        place = folder / f"{task}-{widths[index]}-{seed}" if folder is not None else None
        if place is None or not place.exists():
            expert = make_expert(data, classes, 10 * seed + index, widths[index])
            if place is not None:
                expert.save_pretrained(place)
        else:
            expert = ViTForImageClassification.from_pretrained(place).eval()
        experts[task] = expert
    return experts


def rows_of(labels: Tensor, classes: Sequence[int]) -> Tensor:
    return torch.isin(labels, torch.tensor(list(classes))).nonzero()[:, 0]


def calibration_of(data: Dataset, seed: int) -> dict[str, Tensor]:
    """Images of each task for a merge."""
    generator = np.random.default_rng([seed, 7])
    rows = {task: rows_of(data.labels, classes).numpy() for task, classes in TASKS.items()}
    return {task: data.images[generator.permutation(one)[:IMAGES]] for task, one in rows.items()}


@torch.no_grad()
def accuracies(models: Mapping[str, PreTrainedModel], data: Dataset) -> list[float]:
    """Of each task, and of both together."""
    logits = {name: model(pixel_values=data.test_images).logits for name, model in models.items()}
    result = []
    for name, classes in TASKS.items():
        rows = rows_of(data.test_labels, classes)
        result.append(float((logits[name][rows].argmax(1) + classes[0] == data.test_labels[rows]).float().mean()))
    joint = torch.cat([logits[name] for name in TASKS], 1).argmax(1)
    return [*result, float((joint == data.test_labels).float().mean())]


def merge(
    experts: Mapping[str, PreTrainedModel], config: MergeConfig, data: Dataset, images: Mapping[str, Tensor]
) -> dict[str, PreTrainedModel]:
    """The merged model for each task."""
    merger = Merger.from_pretrained(dict(experts), config)
    if isinstance(config, LinearConfig):
        merger.merge()
    else:
        samples = {task: {"pixel_values": images[task]} for task in experts}
        calibration = CalibrationData(samples, augment=Augmentation(data, blend=0.5))
        merger.merge(calibration, args=ProDistillArguments("runs", bf16=True, use_cpu=True, disable_tqdm=True))
    return {task: merger.model_for(task) for task in TASKS}


@torch.no_grad()
def divergence(
    models: Mapping[str, PreTrainedModel],
    experts: Mapping[str, PreTrainedModel],
    data: Dataset,
    images: Mapping[str, Tensor],
) -> float:
    """The mean over tasks of KL(expert ‖ merged) on moved and mirrored images."""
    generator, augmentation = np.random.default_rng(5), Augmentation(data)
    total = 0.0
    for task in TASKS:
        pixels = torch.cat([augmentation.images(images[task], generator) for _ in range(8)])
        expected = experts[task](pixel_values=pixels).logits.log_softmax(-1)
        found = models[task](pixel_values=pixels).logits.log_softmax(-1)
        total += float((expected.exp() * (expected - found)).sum(-1).mean())
    return total / len(TASKS)


def test(data: Dataset, seed: int, experts: Mapping[str, PreTrainedModel], names: Sequence[str]) -> None:
    """Accuracies on the test images, in both orders of the experts."""
    report(f"seed {seed} experts", accuracies(experts, data))
    images = calibration_of(data, seed)
    for name in names:
        for order in (list(TASKS), list(TASKS)[::-1]):
            if name == "average" and order[0] != "low":
                continue
            models = merge({task: experts[task] for task in order}, recipe(METHODS[name], seed), data, images)
            report(f"seed {seed} {name}, {order[0]} first", accuracies(models, data))


def tune(data: Dataset, seed: int, experts: Mapping[str, PreTrainedModel]) -> None:
    """The divergence on a quarter of the calibration images, for every candidate setting."""
    images = calibration_of(data, seed)
    held_out = {task: one[: IMAGES // 4] for task, one in images.items()}
    rest = {task: one[IMAGES // 4 :] for task, one in images.items()}
    for config in CANDIDATES:
        models = merge(experts, recipe(config, seed), data, rest)
        settings = {key: value for key, value in vars(config).items() if value != getattr(type(config)(), key)}
        print(
            f"seed {seed} {config.merge_type} {settings}: {divergence(models, experts, data, held_out):.4f}",
            flush=True,
        )


def recipe(config: MergeConfig, seed: int) -> MergeConfig:
    config = copy.deepcopy(config)
    config.seed = seed
    return config


def report(what: str, values: Sequence[float]) -> None:
    low, high, joint = values
    print(f"{what:34s} low {low:.3f} high {high:.3f} mean {(low + high) / 2:.3f} joint {joint:.3f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=("fashion", "digits"), default="fashion")
    parser.add_argument("--folder", type=Path, default=Path("/usr/share/datasets/fashion-mnist"))
    parser.add_argument("--experts", type=Path, help="Where experts are kept from one run to the next.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--widths", type=int, nargs=2, help="Of the two experts; the result has the first one's.")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--tune", action="store_true", help="Compare settings on held-out calibration images.")
    args = parser.parse_args()
    logging.disable_progress_bar()
    data = read_fashion(args.folder) if args.data == "fashion" else read_digits()
    widths = args.widths or (data.width, data.width)
    names = [name for name in args.methods if name != "average" or widths[0] == widths[1]]
    for seed in args.seeds:
        experts = experts_of(data, seed, widths, args.experts)
        if args.tune:
            tune(data, seed, experts)
        else:
            test(data, seed, experts, names)


if __name__ == "__main__":
    main()
