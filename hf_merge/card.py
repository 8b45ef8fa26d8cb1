"""The model card of a merged model: metadata that the Hub understands, the recipe, results, citations.

What is generated stands between two marks; text that people add before or after them, and metadata of their own, are kept when the
card is written again.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub.errors import HFValidationError
from huggingface_hub.repocard_data import ModelCardData
from huggingface_hub.utils import validate_repo_id

from .config import CONFIG_NAME, MergeConfig
from .errors import OutputError
from .methods.output_base import OutputMethod
from .papers import bibtex, papers_of
from .registry import get_merge_method


CARD_NAME = "README.md"
_BEGIN = "<!-- hf_merge: written by `hf-merge card`; text outside of these marks is kept -->"
_END = "<!-- /hf_merge -->"
_GENERATED = re.compile(rf"{re.escape(_BEGIN)}.*?{re.escape(_END)}", re.DOTALL)


def model_card(config: MergeConfig, tasks: Sequence[str], class_name: str, results: str | None = None) -> str:
    """The card of a merged model, as text.

    Args:
        config ([`MergeConfig`]): The recipe with its resolved experts.
        tasks (`Sequence[str]`): The tasks whose heads are kept.
        class_name (`str`): The class of the merged model.
        results (`str`, *optional*): A table in Markdown.
    """
    references = [*(config.experts or {}).values(), *([config.base_model] if config.base_model else [])]
    parents = [reference["model"] for reference in references if _is_hub_id(reference.get("model"))]
    data = ModelCardData(
        base_model=list(dict.fromkeys(parents)) or None,
        base_model_relation="merge",
        library_name="transformers",
        tags=["merge", "hf_merge", config.merge_type],
    )
    return _card(data, _model_text(config, tasks, class_name), config, results)


def adapter_card(config: MergeConfig, tasks: Sequence[str], class_name: str, results: str | None = None) -> str:
    """The card of a merged adapter, as text; arguments as in [`model_card`]."""
    base = (config.base_model or {}).get("model")
    data = ModelCardData(
        base_model=base if _is_hub_id(base) else None,
        base_model_relation="adapter",
        library_name="peft",
        tags=["merge", "hf_merge", "lora", config.merge_type],
    )
    return _card(data, _adapter_text(config, tasks, class_name, base), config, results)


def _card(data: ModelCardData, text: str, config: MergeConfig, results: str | None) -> str:
    measured = ""
    if results is not None:
        measured = (
            f"\n## Results\n\n`normalized` is the merged model's value as a share of the expert's.\n\n{results}\n"
        )
    recipe = f"\n## Recipe\n\n`{CONFIG_NAME}`:\n\n```json\n{config.to_json_string()}```\n"
    generated = f"{_BEGIN}\n{text}{measured}{recipe}{_citations(config)}{_END}\n"
    return f"---\n{data.to_yaml()}\n---\n\n{generated}"


def combine_cards(known: str, card: str, path: Path) -> str:
    """The new card with what people have added to the known one.

    Args:
        known (`str`): The known card.
        card (`str`): The new one.
        path (`Path`): For messages.

    Raises:
        OutputError: The known card has no generated part, or metadata that cannot be read.
    """
    from huggingface_hub import ModelCard

    if not _GENERATED.search(known):
        raise OutputError(f"'{path}' was not written by hf_merge: --force replaces it.")
    try:
        metadata = ModelCard(known, ignore_metadata_errors=True).data.to_dict()
    except (ValueError, yaml.YAMLError) as error:
        raise OutputError(
            f"The metadata of '{path}' are not YAML ({' '.join(str(error).split())}): correct them."
        ) from error
    own = ModelCard(card).data.to_dict()
    tags = list(dict.fromkeys([*own["tags"], *(metadata.get("tags") or [])]))
    # Which parents are on the Hub was decided where the models were merged; here a relative path may look like a Hub id.
    parents = metadata.get("base_model")
    data = ModelCardData(**{**metadata, **own, "tags": tags, "base_model": parents})
    text = ModelCard(known, ignore_metadata_errors=True).text
    generated = _GENERATED.search(card).group()
    text = _GENERATED.sub(lambda _: generated, text, count=1)
    return f"---\n{data.to_yaml()}\n---\n\n{text.lstrip()}"


def _is_hub_id(model: str | None) -> bool:
    """Only what exists on the Hub belongs into the metadata: local paths stay in the recipe."""
    if not model or Path(model).expanduser().exists():
        return False
    try:
        validate_repo_id(model)
    except HFValidationError:
        return False
    return True


def _model_text(config: MergeConfig, tasks: Sequence[str], class_name: str) -> str:
    base = f"\nThe base model is `{_shown(config.base_model)}`.\n" if config.base_model else ""
    heads = ""
    if tasks:
        heads = (
            f"\nThat is the model with the head of `{tasks[0]}`. Each task keeps its own head, on the shared backbone:\n\n```python\n"
            "from hf_merge import AutoMergedModel\n\n"
            f'model = AutoMergedModel.from_pretrained("path/to/this/model", task="{tasks[-1]}")\n```\n\n'
            f"Tasks: {', '.join(f'`{task}`' for task in tasks)}.\n"
        )
    loader = "hf_merge" if _is_ensemble(config) else "transformers"
    loaded = "AutoMergedModel" if _is_ensemble(config) else class_name
    return (
        f"# Merged model\n\nThis model was merged with [hf_merge](https://pypi.org/project/hf_merge) by the method "
        f"`{config.merge_type}` from:\n\n{_experts(config)}\n{base}\n"
        f'```python\nfrom {loader} import {loaded}\n\nmodel = {loaded}.from_pretrained("path/to/this/model")\n```\n'
        f"{heads}"
    )


def _is_ensemble(config: MergeConfig) -> bool:
    """Whether the files are several models, which plain transformers does not load together."""
    return issubclass(get_merge_method(config.merge_type).method_cls, OutputMethod)


def _adapter_text(config: MergeConfig, tasks: Sequence[str], class_name: str, base: str | None) -> str:
    heads = "".join(f"\n- `heads/{task}`: the same adapter with the head of `{task}`" for task in tasks)
    return (
        f"# Merged adapter\n\nThis adapter was merged with [hf_merge](https://pypi.org/project/hf_merge) by the method "
        f"`{config.merge_type}` from:\n\n{_experts(config)}\n{heads}\n\n"
        f"```python\nfrom peft import PeftModel\nfrom transformers import {class_name}\n\n"
        f'base = {class_name}.from_pretrained("{base or "path/to/the/base"}")\n'
        'model = PeftModel.from_pretrained(base, "path/to/this/adapter")\n```\n'
    )


def _experts(config: MergeConfig) -> str:
    return "\n".join(f"- {name}: `{_shown(reference)}`" for name, reference in (config.experts or {}).items())


def _citations(config: MergeConfig) -> str:
    papers = papers_of(config)
    if not papers:
        return ""
    links = ", ".join(f"[arXiv:{paper}](https://arxiv.org/abs/{paper})" for paper in papers)
    return f"\n## Citation\n\n{links}\n\n```bibtex\n{bibtex(papers)}\n```\n"


def _shown(reference: dict[str, Any]) -> str:
    model = reference.get("model") or "a model in memory"
    return f"{model}@{reference['revision']}" if reference.get("revision") else model
