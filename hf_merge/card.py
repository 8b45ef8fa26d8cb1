"""The model card of a merged model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from .config import MergeConfig


def model_card(config: MergeConfig, tasks: Sequence[str], class_name: str) -> ModelCard:
    """The card: metadata that the Hub understands, the recipe, and how to load the model.

    Args:
        config ([`MergeConfig`]): The recipe with its resolved experts.
        tasks (`Sequence[str]`): The tasks whose heads are kept.
        class_name (`str`): The class of the merged model.
    """
    references = [*(config.experts or {}).values(), *([config.base_model] if config.base_model else [])]
    parents = [reference["model"] for reference in references if _is_hub_id(reference.get("model"))]
    data = ModelCardData(
        base_model=list(dict.fromkeys(parents)) or None,
        base_model_relation="merge",
        library_name="transformers",
        tags=["merge", "hf_merge", config.merge_type],
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{_text(config, tasks, class_name)}")


def _is_hub_id(model: str | None) -> bool:
    """Only what exists on the Hub belongs into the metadata: local paths stay in the recipe."""
    if not model or Path(model).expanduser().exists():
        return False
    try:
        validate_repo_id(model)
    except HFValidationError:
        return False
    return True


def _text(config: MergeConfig, tasks: Sequence[str], class_name: str) -> str:
    experts = "\n".join(f"- {name}: `{_shown(reference)}`" for name, reference in (config.experts or {}).items())
    base = f"\nThe base model is `{_shown(config.base_model)}`.\n" if config.base_model else ""
    heads = ""
    if tasks:
        heads = (
            "\nEach task keeps its own head, on the shared backbone:\n\n```python\nfrom hf_merge import AutoMergedModel\n\n"
            f'model = AutoMergedModel.from_pretrained("path/to/this/model", task="{tasks[0]}")\n```\n\n'
            f"Tasks: {', '.join(f'`{task}`' for task in tasks)}.\n"
        )
    return (
        f"# Merged model\n\nThis model was merged with [hf_merge](https://pypi.org/project/hf_merge) by the method "
        f"`{config.merge_type}` from:\n\n{experts}\n{base}\n"
        f'```python\nfrom transformers import {class_name}\n\nmodel = {class_name}.from_pretrained("path/to/this/model")\n```\n'
        f"{heads}\n## Recipe\n\n`merge_config.json`:\n\n```json\n{config.to_json_string()}```\n"
    )


def _shown(reference: dict) -> str:
    model = reference.get("model") or "a model in memory"
    return f"{model}@{reference['revision']}" if reference.get("revision") else model
