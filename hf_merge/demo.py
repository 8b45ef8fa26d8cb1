"""`hf-merge demo`: the whole way from data to a merged model, on real digits, without a network and in about a minute.

It trains a small base model on the 8×8 digits that scikit-learn bundles, fine-tunes four experts from it with the Trainer,
merges them with several methods, and measures every merged folder under every task's head.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import TensorDataset
from transformers import (
    PrinterCallback,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    set_seed,
)
from transformers.utils import logging as transformers_logging

from .auto import AutoMergedModelForImageClassification
from .config import MergeConfig
from .errors import MissingDependencyError, OutputError
from .merger import Merger
from .methods.linear import LinearConfig
from .methods.task_arithmetic import TaskArithmeticConfig
from .methods.ties import TiesConfig
from .methods.wudi import WudiConfig


RESULTS_NAME = "demo.json"
TRAINING_IMAGES = 1200
HIDDEN_SIZE = 256
DIGITS = tuple(str(digit) for digit in range(10))
METHODS: dict[str, MergeConfig] = {
    "average": LinearConfig(),
    "task arithmetic": TaskArithmeticConfig(scaling=0.4),
    "TIES": TiesConfig(),
    "WUDI": WudiConfig(),
}


@dataclass(frozen=True)
class Task:
    """What one expert learns.

    Args:
        name (`str`): The expert's name.
        labels (`tuple[str]`): The names of the classes.
        view (`Callable`): From images (count, 8, 8) with values in [0, 1] to what the expert sees.
        answer (`Callable`): From digits (count,) to classes.
    """

    name: str
    labels: tuple[str, ...] = DIGITS
    view: Callable[[np.ndarray], np.ndarray] = lambda images: images
    answer: Callable[[np.ndarray], np.ndarray] = lambda digits: digits


BASE_TASK = Task("digits")
TASKS = (
    Task("parity", labels=("even", "odd"), answer=lambda digits: digits % 2),
    Task("rotated", view=lambda images: np.rot90(images, axes=(1, 2))),
    Task("inverted", view=lambda images: 1 - images),
    Task("mirrored", view=lambda images: images[:, :, ::-1]),
)


@dataclass
class DemoResult:
    """How good each model is.

    Args:
        accuracies (`dict[str, dict[str, float]]`): By method and task, on images that no model was trained on. `"individual"`
            are the experts themselves.
        folder (`Path`): The merged model of the last method.
    """

    accuracies: dict[str, dict[str, float]] = field(default_factory=dict)
    folder: Path | None = None

    def mean(self, method: str) -> float:
        """The mean accuracy over the tasks."""
        return float(np.mean(list(self.accuracies[method].values())))

    def normalized(self, method: str) -> float:
        """The mean over the tasks of the accuracy divided by that of the task's own expert."""
        individual, values = self.accuracies["individual"], self.accuracies[method]
        return float(np.mean([values[task] / best if best else float("nan") for task, best in individual.items()]))

    def table(self) -> str:
        """One line for each method."""
        tasks = list(self.accuracies["individual"])
        lines = [" ".join(f"{title:>10}" for title in ("", *tasks, "mean", "normalized"))]
        lines[0] = f"{'accuracy':<16}" + lines[0][10:]
        for method, values in self.accuracies.items():
            numbers = [*(values[task] for task in tasks), self.mean(method), self.normalized(method)]
            lines.append(f"{method:<16}" + "".join(f" {number:>10.3f}" for number in numbers))
        return "\n".join(lines)


def run_demo(output_dir: str | Path, *, echo: Callable[[str], object] = print) -> DemoResult:
    """Trains, merges and measures.

    Args:
        output_dir (`str` or `Path`): Where the models go: `base`, `experts/<task>` and `merged/<method>`. A former demo there is
            replaced.
        echo (`Callable`): Is given each line of the output.

    Returns:
        [`DemoResult`]

    Raises:
        MissingDependencyError: scikit-learn is not installed.
        OutputError: `output_dir` holds something else than a former demo.
    """
    images, digits = load_digits()
    output_dir = Path(output_dir)
    _prepare(output_dir)
    result = DemoResult()
    with _quiet(), _one_thread():
        echo(f"Training a base model and {len(TASKS)} experts on {TRAINING_IMAGES} images of digits ...")
        base, experts = _train_all(output_dir, images[:TRAINING_IMAGES], digits[:TRAINING_IMAGES])
        unseen = images[TRAINING_IMAGES:], digits[TRAINING_IMAGES:]
        result.accuracies["individual"] = {
            task.name: accuracy(ViTForImageClassification.from_pretrained(experts[task.name]), task, *unseen)
            for task in TASKS
        }
        for method, config in METHODS.items():
            echo(f"Merging with {method} ...")
            result.folder = output_dir / "merged" / config.merge_type
            merger = Merger.from_pretrained(experts, config, base_model=base)
            merger.save_pretrained(result.folder)
            result.accuracies[method] = {
                task.name: accuracy(
                    AutoMergedModelForImageClassification.from_pretrained(result.folder, task=task.name), task, *unseen
                )
                for task in TASKS
            }
    (output_dir / RESULTS_NAME).write_text(json.dumps(result.accuracies, indent=2) + "\n", encoding="utf-8")
    echo(f"\n{result.table()}\n\nLoad the merged model with transformers, under the head of '{TASKS[0].name}':\n")
    echo("  from transformers import AutoModelForImageClassification")
    echo(f'  model = AutoModelForImageClassification.from_pretrained("{result.folder.as_posix()}")')
    echo("\nor under the head of another task:\n")
    echo("  from hf_merge import AutoMergedModelForImageClassification")
    echo(
        f'  model = AutoMergedModelForImageClassification.from_pretrained("{result.folder.as_posix()}", task="{TASKS[1].name}")'
    )
    return result


def load_digits() -> tuple[np.ndarray, np.ndarray]:
    """The 1797 images, float32 (count, 8, 8) in [0, 1], and their digits, int64 (count,), in a fixed random order."""
    try:
        from sklearn import datasets
    except ImportError:
        raise MissingDependencyError("scikit-learn", "The demo", extra="demo") from None
    bunch = datasets.load_digits()
    order = np.random.default_rng(0).permutation(len(bunch.target))
    return (bunch.images[order] / 16).astype(np.float32), bunch.target[order].astype(np.int64)


def examples(task: Task, images: np.ndarray, digits: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """The task's inputs, float32 (count, 1, 8, 8) in [-1, 1], and its classes, int64 (count,)."""
    pixels = torch.from_numpy(np.ascontiguousarray(task.view(images)))
    return pixels[:, None] * 2 - 1, torch.from_numpy(task.answer(digits))


def accuracy(model: ViTForImageClassification, task: Task, images: np.ndarray, digits: np.ndarray) -> float:
    """The share of images that the model puts into the right class of the task."""
    pixels, classes = examples(task, images, digits)
    with torch.no_grad():
        predicted = model.eval()(pixel_values=pixels).logits.argmax(-1)
    return float((predicted == classes).float().mean())


def _train_all(folder: Path, images: np.ndarray, digits: np.ndarray) -> tuple[Path, dict[str, Path]]:
    """Trains the base model and, from its backbone, the experts. Returns their folders."""
    base = folder / "base"
    model = _train(_new_model(BASE_TASK), BASE_TASK, images, digits, base, epochs=10, learning_rate=1e-3)
    experts = {task.name: folder / "experts" / task.name for task in TASKS}
    for task in TASKS:
        expert = _new_model(task)
        expert.vit.load_state_dict(model.vit.state_dict())
        _train(
            expert, task, images, digits, experts[task.name], epochs=10, learning_rate=1e-4, head_learning_rate=2e-3
        )
    return base, experts


def _new_model(task: Task) -> ViTForImageClassification:
    set_seed(0)
    config = ViTConfig(
        image_size=8,
        patch_size=4,
        num_channels=1,
        hidden_size=HIDDEN_SIZE,
        intermediate_size=2 * HIDDEN_SIZE,
        num_hidden_layers=3,
        num_attention_heads=4,
        id2label=dict(enumerate(task.labels)),
        label2id={label: index for index, label in enumerate(task.labels)},
    )
    return ViTForImageClassification(config)


def _train(
    model: ViTForImageClassification,
    task: Task,
    images: np.ndarray,
    digits: np.ndarray,
    folder: Path,
    *,
    epochs: int,
    learning_rate: float,
    head_learning_rate: float | None = None,
) -> ViTForImageClassification:
    """Trains with the Trainer and saves into `folder`. The head, which is new, may learn faster than the backbone: an expert stays near its base."""
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=64,
        num_train_epochs=epochs,
        learning_rate=learning_rate,
        max_grad_norm=0.0,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        seed=0,
    )
    optimizer = torch.optim.AdamW(
        [
            {"params": list(model.vit.parameters()), "lr": learning_rate},
            {"params": list(model.classifier.parameters()), "lr": head_learning_rate or learning_rate},
        ],
        weight_decay=0.0,
    )
    trainer = Trainer(
        model,
        arguments,
        train_dataset=TensorDataset(*examples(task, images, digits)),
        data_collator=_collate,
        optimizers=(optimizer, None),
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    trainer.save_model()
    return model


def _collate(batch: list[tuple[torch.Tensor, torch.Tensor]]) -> dict[str, torch.Tensor]:
    pixels, classes = zip(*batch)
    return {"pixel_values": torch.stack(pixels), "labels": torch.stack(classes)}


def _prepare(output_dir: Path) -> None:
    """Makes the folder and marks it as the demo's; a former demo is removed."""
    if output_dir.exists() and (output_dir.is_file() or any(output_dir.iterdir())):
        if not (output_dir / RESULTS_NAME).is_file():
            raise OutputError(
                f"'{output_dir}' exists and is no former demo: choose another folder, or remove it first."
            )
        shutil.rmtree(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    (output_dir / RESULTS_NAME).write_text("{}\n", encoding="utf-8")


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences transformers' logging and progress bars, and restores them."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


@contextmanager
def _one_thread() -> Iterator[None]:
    """Computes in one thread: for matrices this small that is faster, and the numbers do not depend on the machine's cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
