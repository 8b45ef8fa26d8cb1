"""What belongs into the output folder beside the merged weights: configs, heads, tokenizer, recipe, card, report."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from ..card import model_card
from ..checkpoints.folder import OutputFolder
from ..checkpoints.processors import (
    CHAT_TEMPLATE,
    chat_template_of,
    module_folders,
    processor_files,
    refuse_foreign_links,
)
from ..checkpoints.records import CONFIG_FILE, GENERATION_FILE
from ..checkpoints.source import ModelSource
from ..checkpoints.storage import SAFE_WEIGHTS
from ..config import CONFIG_NAME, MergeConfig
from ..errors import ConfigError
from ..hub import HEADS_FOLDER
from .plan import MergePlan
from .report import MergeReport
from .streaming import checked
from .vocabulary import UNION


REPORT_NAME = "merge_report.json"


def seal(plan: MergePlan, output: OutputFolder, report: MergeReport) -> None:
    """Writes everything but the weights and makes the folder appear.

    Args:
        plan ([`MergePlan`]): What was merged.
        output ([`OutputFolder`]): With all weights written.
        report ([`MergeReport`]): Of the run.
    """
    folder = output.partial
    _save_config(plan, folder)
    _save_generation_config(plan, folder)
    for task, head in plan.heads.items():
        source = next(source for source in plan.experts if source.name == task)
        _save_head(head.model or source, head_tensors(source, head), folder / HEADS_FOLDER / task)
        if head.surgery is not None:
            head.surgery.save(folder / HEADS_FOLDER / task)
    if plan.twin is not None:
        plan.twin.save(folder)
    _copy_processors(plan, folder)
    write_records(plan, output, report, model_card)


def write_records(
    plan: MergePlan,
    output: OutputFolder,
    report: MergeReport,
    card: Callable[[MergeConfig, Sequence[str], str], str],
) -> None:
    """Writes recipe, card and report, and makes the folder appear.

    Args:
        plan ([`MergePlan`]): What was merged.
        output ([`OutputFolder`]): With everything else written.
        report ([`MergeReport`]): Of the run.
        card (`Callable`): Makes the card from the recipe, the tasks with a head and the name of the class.
    """
    folder, recipe = output.partial, plan.resolved_recipe()
    (folder / CONFIG_NAME).write_text(recipe.to_json_string(), encoding="utf-8")
    content = card(recipe, list(plan.heads), plan.target.description.class_name)
    # Paths may have bytes that are no text in the system's encoding.
    (folder / "README.md").write_text(content, encoding="utf-8", errors="replace")
    (folder / REPORT_NAME).write_text(json.dumps(report.to_dict(), indent=1) + "\n", encoding="utf-8")
    output.seal()


def result_dtype(plan: MergePlan) -> torch.dtype:
    """The dtype of most of the merged bytes: what `config.json` says."""
    sizes: dict[torch.dtype, int] = {}
    for info in plan.outputs.values():
        if info.dtype.is_floating_point:
            sizes[info.dtype] = sizes.get(info.dtype, 0) + info.nbytes
    return max(sizes, key=sizes.get) if sizes else torch.float32


def result_config(plan: MergePlan) -> Any:
    """The config of the merged model: the first expert's, with the dtype and ties that the weights really have."""
    config = plan.target.config_for(result_dtype(plan))
    if _is_untied(plan) and getattr(config, "tie_word_embeddings", False):
        config.tie_word_embeddings = False
    return config


def _is_untied(plan: MergePlan) -> bool:
    """Whether parameters that the config ties have values of their own."""
    return not plan.outputs.keys().isdisjoint(plan.target.anatomy.ties)


def _save_config(plan: MergePlan, folder: Path) -> None:
    known = None if _is_untied(plan) else plan.target.saved_file(CONFIG_FILE, result_dtype(plan))
    if known is None:
        result_config(plan).save_pretrained(folder)
    else:
        (folder / CONFIG_FILE).write_text(known, encoding="utf-8")


def head_tensors(source: ModelSource, head: Any) -> dict[str, Tensor]:
    """A task's head by module name, in its output dtype."""
    if head.values is not None:
        return {name: head.values[name].to(info.dtype) for name, info in head.outputs.items()}
    return {
        name: checked(name, source.read(name).to("cpu", info.dtype, copy=True), source.name)
        for name, info in head.outputs.items()
    }


def _save_head(source: ModelSource, tensors: dict[str, Tensor], folder: Path) -> None:
    folder.mkdir(parents=True)
    dtype = next((tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()), source.dtype)
    source.config_for(dtype).save_pretrained(folder)
    on_disk = source.converter.to_disk(tensors) if source.live is None else tensors
    content = save({key: value.contiguous() for key, value in on_disk.items()}, metadata={"format": "pt"})
    (folder / SAFE_WEIGHTS).write_bytes(content)


def _save_generation_config(plan: MergePlan, folder: Path) -> None:
    for source in (plan.target, plan.base):
        known = source.saved_file(GENERATION_FILE) if source is not None else None
        if known is not None:
            (folder / GENERATION_FILE).write_text(known, encoding="utf-8")
            return
        if source is not None and source.generation_config is not None:
            source.generation_config.save_pretrained(folder)
            return


def processor_source(plan: MergePlan) -> ModelSource | None:
    """The model whose tokenizer or processor files are copied; `None` when there are none.

    Raises:
        ConfigError: The recipe's `tokenizer` names a model that is not part of the merge, or has no such files; or no model has
            any, and there is a `chat_template`.
    """
    wanted = plan.config.tokenizer
    candidates = {source.name: source for source in plan.sources}
    if wanted in (None, UNION):
        first = [plan.base] if wanted == UNION and plan.base is not None else []
        found = next((source for source in (*first, *plan.sources) if source.processor_folder is not None), None)
        if found is None and plan.config.chat_template is not None:
            raise ConfigError("chat_template: none of the models has a tokenizer that it could belong to.")
        return found
    if wanted not in candidates:
        raise ConfigError(f"tokenizer='{wanted}' is none of the models of this merge: {', '.join(candidates)}.")
    source = candidates[wanted]
    if source.processor_folder is None:
        raise ConfigError(f"tokenizer='{wanted}': {source} has no tokenizer or processor files.")
    return source


def processor_notes(plan: MergePlan) -> list[str]:
    """What a careful user wants to know about the files that are copied: weights of sentence-transformers modules are not merged.

    Raises:
        ConfigError: As [`processor_source`].
    """
    source = processor_source(plan)
    if source is None:
        return []
    folder = source.processor_folder
    heavy = [name for name in module_folders(folder) if any((folder / name).glob("*.safetensors"))]
    if not heavy:
        return []
    return [
        f"the weights of the sentence-transformers module(s) {', '.join(heavy)} are copied from {source}, not merged"
    ]


def _copy_processors(plan: MergePlan, folder: Path) -> None:
    source = processor_source(plan)
    if source is None:
        return
    files = [(source.processor_folder, path) for path in processor_files(source.processor_folder)]
    if source.description.has_code and source.folder is not None:
        code = [path.relative_to(source.folder) for path in sorted(source.folder.glob("*.py"))]
        refuse_foreign_links(source.folder, code)
        files += [(source.folder, path) for path in code]
    for origin, path in files:
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(origin / path, target)
    template = _chat_template(plan)
    if template is not None:
        (folder / CHAT_TEMPLATE).write_text(template, encoding="utf-8")


def _chat_template(plan: MergePlan) -> str | None:
    """The chat template that replaces the copied tokenizer's, or `None`."""
    wanted = plan.config.chat_template
    folders = {source.name: source.folder or source.processor_folder for source in plan.sources}
    folders = {name: folder for name, folder in folders.items() if folder is not None}
    if wanted in folders:
        return chat_template_of(folders[wanted])
    if wanted != "auto":
        return wanted
    templates = Counter(template.strip() for folder in folders.values() if (template := chat_template_of(folder)))
    return templates.most_common(1)[0][0] if templates else None
