"""Merged classifiers on disk, with labelled rows in files, as the commands need them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaForCausalLM

from hf_merge import MergeConfig, Merger, TaskArithmeticConfig
from hf_merge.evaluation import EvaluationTask

from ..methods.helpers_models import models, samples
from ..zoo import ZOO


@dataclass
class Place:
    """A folder with a base model, two experts and the file of their tasks.

    Args:
        folder (`Path`): Holds everything.
    """

    folder: Path

    @property
    def base(self) -> str:
        return str(self.folder / "base")

    @property
    def experts(self) -> dict[str, str]:
        return {name: str(self.folder / name) for name in ("a", "b")}

    @property
    def tasks(self) -> str:
        return str(self.folder / "tasks.yaml")

    @property
    def merged(self) -> Path:
        return self.folder / "merged"

    def merger(self, config: MergeConfig | None = None) -> Merger:
        return Merger.from_pretrained(self.experts, config or TaskArithmeticConfig(), base_model=self.base)

    @property
    def options(self) -> list[str]:
        """Options of `hf-merge` that name the models."""
        experts = [word for name, path in self.experts.items() for word in ("--expert", f"{name}={path}")]
        return [*experts, "--base", self.base]


def rows(count: int) -> dict[str, list[dict[str, Any]]]:
    """Labelled rows of both tasks as plain lists of numbers."""
    drawn = samples(count, labels=True)
    return {
        task: [{"input_ids": row["input_ids"].tolist(), "label": int(row["labels"])} for row in drawn[task]]
        for task in drawn
    }


def tasks(count: int = 12, calibration: int = 20) -> dict[str, EvaluationTask]:
    """The two tasks in memory."""
    test, choosing = rows(count), rows(count + calibration)
    return {name: EvaluationTask(test[name], calibration=choosing[name][count:]) for name in test}


def build_place(folder: Path) -> Place:
    """Writes the models, the rows and a merged model."""
    place = Place(folder)
    base, experts = models()
    for name, model in {"base": base, **experts}.items():
        model.save_pretrained(folder / name)
    for name, task in tasks().items():
        (folder / f"{name}.jsonl").write_text(
            "".join(json.dumps(row) + "\n" for row in task.dataset), encoding="utf-8"
        )
        (folder / f"{name}_calibration.json").write_text(json.dumps(task.calibration), encoding="utf-8")
    entries = {name: {"data": f"{name}.jsonl", "calibration": f"{name}_calibration.json"} for name in experts}
    Path(place.tasks).write_text(json.dumps(entries), encoding="utf-8")  # JSON is YAML too
    place.merger().save_pretrained(place.merged)
    return place


def build_adapters(folder: Path) -> Path:
    """Writes a base language model, two adapters and the adapter that they were merged into; returns the folder of that one."""
    ZOO["llama"].build().save_pretrained(folder / "base")
    for seed, name in enumerate(("code", "math")):
        torch.manual_seed(seed)
        config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], init_lora_weights=False)
        get_peft_model(LlamaForCausalLM.from_pretrained(folder / "base"), config).save_pretrained(folder / name)
    experts = {name: str(folder / name) for name in ("code", "math")}
    merger = Merger.from_pretrained(experts, TaskArithmeticConfig(output="adapter"), base_model=str(folder / "base"))
    merger.save_pretrained(folder / "merged")
    return folder / "merged"
