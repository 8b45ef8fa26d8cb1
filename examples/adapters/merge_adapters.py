"""Compares PEFT's add_weighted_adapter with hf_merge on the adapters of train_adapters.py.

    python merge_adapters.py MODELS ADAPTERS

MODELS and ADAPTERS are the folders of train_adapters.py. Every task keeps its own classifier on the merged encoder. The accuracy on
the test rows is printed for each adapter alone, for PEFT's combinations and for hf_merge's methods.
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model, load_peft_weights, set_peft_model_state_dict
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from hf_merge import CoreSpaceConfig, KnotsConfig, MergeConfig, Merger, TaskArithmeticConfig, TsvMConfig, WudiConfig


MAX_LENGTH = 48
PEFT_COMBINATIONS = {
    "linear": {},
    "cat": {},
    "ties_svd": {"density": 0.5},
}
METHODS: dict[str, MergeConfig] = {
    "task_arithmetic 0.5": TaskArithmeticConfig(scaling=0.5),
    "knots, ties": KnotsConfig(inner="ties"),
    "core_space, iso_c": CoreSpaceConfig(),
    "tsv_m": TsvMConfig(),
    "wudi, adaptive": WudiConfig(),
}

Row = tuple[str, int]


def read_rows(models: Path, task: str, part: str = "test") -> list[Row]:
    return json.loads((models / "data" / f"{task}.json").read_text(encoding="utf-8"))[part]


@torch.no_grad()
def accuracy(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row]) -> float:
    """Of a classifier."""
    rows = sorted(rows, key=lambda row: len(row[0]))
    correct = 0
    for start in range(0, len(rows), 100):
        texts, labels = zip(*rows[start : start + 100], strict=True)
        batch = tokenizer(list(texts), truncation=True, max_length=MAX_LENGTH, padding=True, return_tensors="pt")
        correct += int((model(**batch).logits.argmax(-1) == torch.tensor(labels)).sum())
    return correct / len(rows)


def encoder_adapters(models: Path, adapters: Path, tasks: Sequence[str]) -> PeftModel:
    """The adapters of all tasks on one encoder, without their classifiers: add_weighted_adapter takes only one module of a name
    that is saved whole."""
    model: PeftModel | None = None
    for task in tasks:
        config = LoraConfig.from_pretrained(str(adapters / task))
        config = replace(config, task_type=None, modules_to_save=None, auto_mapping=None)
        config.target_modules = {name.removeprefix("bert.") for name in config.target_modules}
        if model is None:
            model = get_peft_model(AutoModel.from_pretrained(models / "base"), config, task)
        else:
            model.add_adapter(task, config)
        tensors = load_peft_weights(str(adapters / task), device="cpu")
        state = {key.replace("model.bert.", "model."): value for key, value in tensors.items() if ".lora_" in key}
        set_peft_model_state_dict(model, state, adapter_name=task)
    return model


def with_encoder(model: PreTrainedModel, state: Mapping[str, Tensor]) -> PreTrainedModel:
    """A classifier with another encoder."""
    backbone: nn.Module = getattr(model, model.base_model_prefix)
    backbone.load_state_dict(state)
    return model


def peft_models(
    models: Path, adapters: Path, tasks: Sequence[str], weights: Sequence[float]
) -> Iterator[tuple[str, Callable]]:
    """For each of PEFT's combinations, a name and what gives a task's model."""
    own = Merger.from_pretrained(
        {task: adapters / task for task in tasks}, METHODS["tsv_m"], base_model=models / "base"
    )
    heads = {task: own.model_for(task) for task in tasks}
    for name, settings in PEFT_COMBINATIONS.items():
        for weight in weights:
            model = encoder_adapters(models, adapters, tasks)
            model.add_weighted_adapter(list(tasks), [weight] * len(tasks), "merged", name, **settings)
            model.set_adapter("merged")
            state = model.merge_and_unload(adapter_names=["merged"]).state_dict()
            yield f"PEFT {name}, weights {weight:g}", lambda task, state=state: with_encoder(heads[task], state)


def all_models(
    models: Path, adapters: Path, tasks: Sequence[str], weights: Sequence[float]
) -> Iterator[tuple[str, Callable]]:
    """Everything that is compared: a name, and what gives a task's model."""
    alone = {
        task: Merger.from_pretrained(
            {task: adapters / task}, TaskArithmeticConfig(scaling=1.0), base_model=models / "base"
        )
        for task in tasks
    }
    yield "individual", lambda task: alone[task].model_for(task)
    yield from peft_models(models, adapters, tasks, weights)
    for name, config in METHODS.items():
        config = replace(config, heads="per_task")
        merger = Merger.from_pretrained({task: adapters / task for task in tasks}, config, base_model=models / "base")
        yield name, merger.model_for


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path)
    parser.add_argument("adapters", type=Path)
    parser.add_argument(
        "--weights", type=float, nargs="+", default=[0.25, 0.5, 1.0], help="weights of PEFT's combinations"
    )
    parser.add_argument("--rows", type=int, help="only the first test rows")
    args = parser.parse_args()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    tasks = sorted(path.name for path in args.adapters.iterdir() if (path / "adapter_config.json").is_file())
    tokenizer = AutoTokenizer.from_pretrained(args.models / "base")
    print(f"{'':28s} " + " ".join(f"{task:>9s}" for task in tasks) + f" {'mean':>9s}")
    for name, model_of in all_models(args.models, args.adapters, tasks, args.weights):
        found = [accuracy(model_of(task), tokenizer, read_rows(args.models, task)[: args.rows]) for task in tasks]
        print(f"{name:28s} " + " ".join(f"{value:9.3f}" for value in [*found, np.mean(found)]), flush=True)


if __name__ == "__main__":
    main()
