"""Merges two antibody language models that were trained apart, one on heavy chains (VH) and one on light chains (VL).

    python fs_merge_antibody.py FOLDER --seeds 0 1 2
    python fs_merge_antibody.py FOLDER --tune

FOLDER holds the two models, `sapiens-vh` and `sapiens-vl` (RobertaForMaskedLM, each with `vocab.json`, one token per residue), and
`sequences.json`: `{"VH": [{"gene": ..., "sequence": ...}, ...], "VL": [...]}`.

Half of the genes of each task are held out for the test. Of the others 64 unlabelled sequences are what a merge is given, with
fresh masks in every batch. Accuracy is over masked residues (15 %) of the test genes. `--tune` never looks at the test genes: it
trains on three quarters of the 64 sequences and reports the divergence of the predictions on the rest.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, RobertaForMaskedLM
from transformers.utils import logging

from hf_merge import (
    CalibrationData,
    FsMergeConfig,
    GitRebasinConfig,
    KdConfig,
    LinearConfig,
    Merger,
    ProDistillArguments,
    ZipItConfig,
)
from hf_merge.config import MergeConfig
from hf_merge.methods.fs_merge import FeatureTrainingConfig


TASKS = {"VH": "sapiens-vh", "VL": "sapiens-vl"}
SEQUENCES, BATCH_SIZE, STEPS, TUNING_STEPS = 64, 16, 600, 300
START, PAD, END, RESIDUES, MASK = 0, 1, 2, 3, 24
LOSSES = {"batch_size": BATCH_SIZE, "logit_weight": 1.0, "feature_weight": 0.1, "fit_maps": True}
FULL = {"form": "full", "vector_learning_rate": 3e-3, "output_learning_rate": 3e-3, **LOSSES}
METHODS: dict[str, MergeConfig] = {
    "average": LinearConfig(heads="per_task"),
    "git_rebasin": GitRebasinConfig(),
    "git_rebasin, repaired": GitRebasinConfig(repair=True),
    "zipit": ZipItConfig(),
    "zipit, repaired": ZipItConfig(repair=True),
    "kd": KdConfig(learning_rate=5e-3, **LOSSES),
    "fs_merge": FsMergeConfig(rank=24, learning_rate=6e-3, **LOSSES),
    "fs_merge, refined": FsMergeConfig(
        rank=24, learning_rate=6e-3, refine_epochs=33, refine_learning_rate=2e-3, **LOSSES
    ),
}
"""Of the recipes that train, `epochs` are set for `STEPS` updates, and `refine_epochs` is the part of them in percent."""
CANDIDATES: list[MergeConfig] = [
    *(KdConfig(learning_rate=rate, **LOSSES) for rate in (3e-3, 5e-3, 8e-3)),
    *(FsMergeConfig(rank=24, learning_rate=rate, **LOSSES) for rate in (3e-3, 6e-3)),
    FsMergeConfig(learning_rate=5e-4, **FULL),
]
"""As many of each method."""


@dataclass
class Split:
    """The sequences of one task, as tokens.

    Args:
        calibration (`list`): What a merge is given.
        genes (`list`): Their genes.
        test (`list`): Of genes that are not among them.
    """

    calibration: list[Tensor]
    genes: list[str]
    test: list[Tensor]


def read_task(folder: Path, task: str, seed: int) -> Split:
    """A split by gene, never by sequence."""
    vocabulary = json.loads((folder / TASKS[task] / "vocab.json").read_text())
    rows = json.loads((folder / "sequences.json").read_text())[task]
    generator = np.random.default_rng([seed, *task.encode()])
    genes = sorted({row["gene"] for row in rows})
    given = set(generator.permutation(genes)[: len(genes) // 2])
    train = [row for row in rows if row["gene"] in given]
    train = [train[index] for index in generator.permutation(len(train))[:SEQUENCES]]

    def tokens(row: Mapping[str, str]) -> Tensor:
        return torch.tensor([START, *(vocabulary[residue] for residue in row["sequence"]), END])

    return Split(
        [tokens(row) for row in train],
        [row["gene"] for row in train],
        [tokens(row) for row in rows if row["gene"] not in given],
    )


def held_out(split: Split, seed: int) -> tuple[list[Tensor], list[Tensor]]:
    """Three quarters of the calibration sequences, and the rest, of other genes."""
    genes = np.random.default_rng(seed).permutation(sorted(set(split.genes)))
    apart: set[str] = set()
    for gene in genes:
        if sum(one in apart for one in split.genes) < len(split.genes) // 4:
            apart.add(gene)
    pairs = list(zip(split.calibration, split.genes, strict=True))
    return [row for row, gene in pairs if gene not in apart], [row for row, gene in pairs if gene in apart]


def masked(ids: Tensor, rate: float, generator: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Tokens with some residues masked, and where."""
    hit = torch.from_numpy(generator.random(tuple(ids.shape)) < rate) & (ids > RESIDUES)
    return ids.masked_fill(hit, MASK), hit


def augment(task: int, arguments: dict[str, Tensor], generator: np.random.Generator) -> dict[str, Tensor]:
    """Masks 30 % of the residues of a batch."""
    return {**arguments, "input_ids": masked(arguments["input_ids"], 0.3, generator)[0]}


@torch.no_grad()
def predictions(model: PreTrainedModel, rows: Sequence[Tensor], repeats: int = 3) -> tuple[Tensor, Tensor]:
    """Log-probabilities at masked residues, 15 %, and the residues."""
    ids = torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=PAD)
    generator = np.random.default_rng(99)
    found, expected = [], []
    for _ in range(repeats):
        inputs, hit = masked(ids, 0.15, generator)
        logits = model(inputs, attention_mask=(ids != PAD).long()).logits
        found.append(logits[hit].log_softmax(-1))
        expected.append(ids[hit])
    return torch.cat(found), torch.cat(expected)


def accuracy(model: PreTrainedModel, rows: Sequence[Tensor]) -> float:
    found, expected = predictions(model, rows)
    return float((found.argmax(-1) == expected).float().mean())


def divergence(model: PreTrainedModel, expert: PreTrainedModel, rows: Sequence[Tensor]) -> float:
    """KL(expert ‖ merged) of the predictions at masked residues."""
    found, expected = predictions(model, rows, 8)[0], predictions(expert, rows, 8)[0]
    return float((expected.exp() * (expected - found)).sum(-1).mean())


def merge(
    experts: Mapping[str, PreTrainedModel], config: MergeConfig, rows: Mapping[str, Sequence[Tensor]], folder: str
) -> dict[str, PreTrainedModel]:
    """The merged model for each task."""
    merger = Merger.from_pretrained(dict(experts), config)
    if isinstance(config, LinearConfig) or (isinstance(config, GitRebasinConfig) and not config.repair):
        merger.merge()
    else:
        data = CalibrationData({task: [{"input_ids": row} for row in rows[task]] for task in rows}, augment=augment)
        merger.merge(data, args=ProDistillArguments(folder, bf16=True, use_cpu=True, disable_tqdm=True))
    return {task: merger.model_for(task) for task in TASKS}


def load_experts(folder: Path) -> dict[str, PreTrainedModel]:
    return {
        task: RobertaForMaskedLM.from_pretrained(folder / name, attn_implementation="eager").eval()
        for task, name in TASKS.items()
    }


def scheduled(config: MergeConfig, seed: int, count: int, steps: int) -> MergeConfig:
    """A recipe for so many updates on `count` sequences of a task, refinement included."""
    config = copy.deepcopy(config)
    config.seed = seed
    if isinstance(config, FeatureTrainingConfig):
        config.epochs = round(steps / math.ceil(count / BATCH_SIZE))
        if isinstance(config, FsMergeConfig) and config.refine_epochs:
            config.refine_epochs = round(config.refine_epochs * config.epochs / 100)
            config.epochs -= config.refine_epochs
    return config


def test(folder: Path, seed: int, names: Sequence[str], work: str) -> None:
    """Accuracies on the test genes."""
    splits = {task: read_task(folder, task, seed) for task in TASKS}
    experts = load_experts(folder)
    report(seed, "experts", [accuracy(experts[task], splits[task].test) for task in TASKS])
    rows = {task: split.calibration for task, split in splits.items()}
    for name in names:
        models = merge(experts, scheduled(METHODS[name], seed, SEQUENCES, STEPS), rows, work)
        report(seed, name, [accuracy(models[task], splits[task].test) for task in TASKS])


def tune(folder: Path, seed: int, work: str) -> None:
    """Divergences on held-out calibration sequences, for every candidate setting."""
    splits = {task: held_out(read_task(folder, task, seed), seed) for task in TASKS}
    experts = load_experts(folder)
    rows = {task: split[0] for task, split in splits.items()}
    for config in CANDIDATES:
        models = merge(experts, scheduled(config, seed, max(map(len, rows.values())), TUNING_STEPS), rows, work)
        values = [divergence(models[task], experts[task], splits[task][1]) for task in TASKS]
        settings = {key: value for key, value in vars(config).items() if value != getattr(type(config)(), key)}
        report(seed, f"{config.merge_type} {settings}", values)


def report(seed: int, what: str, values: Sequence[float]) -> None:
    print(f"seed {seed} {what}: VH {values[0]:.4f} VL {values[1]:.4f} mean {sum(values) / 2:.4f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--tune", action="store_true", help="Compare settings on held-out calibration sequences.")
    parser.add_argument("--work", default="runs", help="The output folder of the training arguments.")
    args = parser.parse_args()
    logging.disable_progress_bar()
    for seed in args.seeds:
        if args.tune:
            tune(args.folder, seed, args.work)
        else:
            test(args.folder, seed, args.methods, args.work)


if __name__ == "__main__":
    main()
