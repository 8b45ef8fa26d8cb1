"""Every method with its default settings on the same real experts: accuracy on each task's test rows, and the seconds of the merge.

    python quality.py FOLDER --bench text
    python quality.py FOLDER --bench antibody --methods fs_merge kd ensemble --write ../../docs/source/benchmarks.md

FOLDER holds the models and data of the bench, as `fewshot_text.py` (text), `fewshot_vision.py` (vision) and `fs_merge_antibody.py`
(antibody: two models of different initialisation) of the neighbouring folders describe them. Methods that need samples get `--samples` of
each task. Methods that cannot merge these experts are listed with the reason. Finished rows are kept in `--results`: what is there already
is not measured again.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.utils import logging

from hf_merge import EvaluationTask, MergeConfig, available_merge_methods, compare_merges
from hf_merge.evaluation.comparison_results import ComparisonRow
from hf_merge.evaluation.tables import markdown_table


COMPARED = 16
"""Calibration rows beside those that methods merge with. `compare_merges` chooses by them; here nothing is chosen."""
MAX_LENGTH = 48
PROTEINS = {"VH": "sapiens-vh", "VL": "sapiens-vl"}
START, END, RESIDUES, MASK, IGNORED = 0, 2, 3, 24, -100


@dataclass
class Bench:
    """Experts and what they are measured on.

    Args:
        experts (`dict[str, Path]`): By task.
        tasks (`dict[str, EvaluationTask]`): Their test rows, and calibration rows.
        base (`Path`, *optional*): The base model.
        settings (`dict`): Of all recipes, where the method has no say in them.
    """

    experts: dict[str, Path]
    tasks: dict[str, EvaluationTask]
    base: Path | None = None
    settings: dict[str, Any] = field(default_factory=dict)


def text(folder: Path, samples: int, test: int | None) -> Bench:
    """Classifiers of texts over one encoder."""

    def task(path: Path) -> EvaluationTask:
        content = json.loads(path.read_text(encoding="utf-8"))
        rows = {
            part: [{"text": one, "label": label} for one, label in content[part]] for part in ("test", "calibration")
        }
        calibration = rows["calibration"][: samples + COMPARED]
        return EvaluationTask(rows["test"], calibration=calibration, max_length=MAX_LENGTH, num_samples=test)

    tasks = {path.stem: task(path) for path in sorted((folder / "data").glob("*.json"))}
    return Bench({name: folder / name for name in tasks}, tasks, folder / "base")


def vision(folder: Path, samples: int, test: int | None) -> Bench:
    """Classifiers of images over one encoder."""

    def task(path: Path) -> EvaluationTask:
        content = np.load(path)
        rows = {part: images(content, part) for part in ("test", "calibration")}
        return EvaluationTask(
            rows["test"], calibration=rows["calibration"][: samples + COMPARED], num_samples=test, batch_size=100
        )

    tasks = {path.stem: task(path) for path in sorted(folder.glob("*.npz"))}
    return Bench({name: folder / name for name in tasks}, tasks, folder / "base")


def images(content: Any, part: str) -> list[dict[str, Any]]:
    """Bytes (n, height, width) as rows of pixels (1, height, width) in [-1, 1]."""
    pixels = torch.from_numpy(content[f"{part}_images"]).float().div(127.5).sub(1)[:, None]
    labels = content[f"{part}_labels"].tolist()
    return [{"pixel_values": one, "label": label} for one, label in zip(pixels, labels, strict=True)]


def antibody(folder: Path, samples: int, test: int | None) -> Bench:
    """Two antibody language models that were trained apart. Half of the genes are held out for the test."""

    def task(name: str) -> EvaluationTask:
        vocabulary = json.loads((folder / PROTEINS[name] / "vocab.json").read_text(encoding="utf-8"))
        rows = json.loads((folder / "sequences.json").read_text(encoding="utf-8"))[name]
        generator = np.random.default_rng([0, *name.encode()])
        genes = sorted({row["gene"] for row in rows})
        given = set(generator.permutation(genes)[: len(genes) // 2])
        tokens = [[START, *(vocabulary[residue] for residue in row["sequence"]), END] for row in rows]
        train = [masked(ids, 0.3, generator) for ids, row in zip(tokens, rows, strict=True) if row["gene"] in given]
        held_out = [ids for ids, row in zip(tokens, rows, strict=True) if row["gene"] not in given]
        repeated = [masked(ids, 0.15, generator) for _ in range(3) for ids in held_out]
        return EvaluationTask(repeated, calibration=train[: samples + COMPARED], num_samples=test)

    experts = {name: folder / model for name, model in PROTEINS.items()}
    return Bench(experts, {name: task(name) for name in experts}, settings={"heads": "per_task"})


def masked(ids: list[int], rate: float, generator: np.random.Generator) -> dict[str, Tensor]:
    """A sequence with some residues masked, and these as labels."""
    tokens = torch.tensor(ids)
    hit = torch.from_numpy(generator.random(len(ids)) < rate) & (tokens > RESIDUES)
    return {"input_ids": tokens.masked_fill(hit, MASK), "labels": tokens.masked_fill(~hit, IGNORED)}


BENCHES: dict[str, Callable[[Path, int, int | None], Bench]] = {"text": text, "vision": vision, "antibody": antibody}


def measure(bench: Bench, method: str, samples: int, results: Path) -> tuple[ComparisonRow, ComparisonRow | str]:
    """The experts' own row, and the method's, or why there is none."""
    # An ensemble keeps every head by itself.
    settings = {} if method == "ensemble" else bench.settings
    comparison = compare_merges(
        bench.experts,
        {method: MergeConfig.from_merge_type(method, **settings)},
        bench.tasks,
        base_model=bench.base,
        results=results,
        num_samples=samples,
        test=True,
        dtype="float32",
    )
    return comparison.individual, comparison.failed.get(method) or comparison.rows[0]


def table(individual: ComparisonRow, rows: Sequence[ComparisonRow]) -> str:
    """Accuracies on test rows, the best mean first."""
    methods = available_merge_methods()

    def cells(row: ComparisonRow, needs: str | None) -> list[Any]:
        seconds = None if row.seconds is None else f"{row.seconds:.1f}"
        return [f"`{row.name}`" if needs else "experts alone", *row.test.values(), row.test_mean, seconds, needs]

    def needs(name: str) -> str:
        entry = methods[name]
        return "yes" if entry.method_cls.needs_data(entry.config_cls()) else "no"

    ranked = sorted(rows, key=lambda row: row.test_mean, reverse=True)
    body = [cells(individual, None), *(cells(row, needs(row.name)) for row in ranked)]
    return markdown_table(["", *individual.test, "mean", "seconds", "samples"], body)


def write(page: Path, bench: str, content: str) -> None:
    """Replaces what stands between the bench's markers in a page."""
    begin, end = f"<!-- quality: {bench} -->", f"<!-- /quality: {bench} -->"
    old = page.read_text(encoding="utf-8")
    found = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
    if not found.search(old):
        raise SystemExit(f"'{page}' has no lines '{begin}' and '{end}': add them where the table belongs.")
    page.write_text(found.sub(lambda _: f"{begin}\n\n{content}\n\n{end}", old), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="holds the experts and the data of the bench")
    parser.add_argument("--bench", choices=BENCHES, default="text")
    known = sorted(available_merge_methods())
    parser.add_argument("--methods", nargs="+", choices=known, default=known, metavar="METHOD")
    parser.add_argument(
        "--samples", type=int, default=64, help="of each task, for methods that need samples; %(default)s by default"
    )
    parser.add_argument("--test", type=int, help="test rows of each task; all when not given")
    parser.add_argument("--results", type=Path, help="keeps finished rows; quality-<bench>.jsonl when not given")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="put the table between the bench's markers")
    args = parser.parse_args()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    bench = BENCHES[args.bench](args.folder, args.samples, args.test)
    missing = [str(path) for path in bench.experts.values() if not (path / "config.json").is_file()]
    if missing or not bench.experts:
        parser.error(
            f"'{args.folder}' has no models for --bench {args.bench}{': ' if missing else ''}{', '.join(missing)}"
        )
    results = args.results or Path(f"quality-{args.bench}.jsonl")
    rows = []
    for method in args.methods:
        individual, row = measure(bench, method, args.samples, results)
        if isinstance(row, str):
            print(f"{method}: {row}", flush=True)
            continue
        rows.append(row)
        print(f"{method}: {row.test_mean:.3f} in {row.seconds:.1f} s", flush=True)
    content = table(individual, rows)
    print(content)
    if args.write is not None:
        write(args.write, args.bench, content)


if __name__ == "__main__":
    main()
