"""Loading by name, in the manner of transformers' Auto classes: recipes ([`AutoMergeConfig`]) and merged models
([`AutoMergedModel`] and one class per task type)."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from transformers import PreTrainedModel

from .checkpoints.source import ModelSource, load_config, open_source
from .checkpoints.storage import open_storage
from .config import CONFIG_NAME, MergeConfig
from .engines.sealing import HEADS_FOLDER
from .errors import CheckpointError, ConfigError, suggest
from .hub import HubMixin, fetch_folder
from .merger import Merger
from .modeling.assembly import assemble, transfer_backbone
from .modeling.shell import model_class_of


class AutoMergeConfig:
    """Loads the config of whichever method a recipe is for."""

    def __init__(self, *args, **kwargs):
        raise ConfigError("AutoMergeConfig is not instantiated: use AutoMergeConfig.from_pretrained(folder).")

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs) -> MergeConfig:
        """See [`MergeConfig.from_pretrained`]."""
        return MergeConfig.from_pretrained(pretrained_model_name_or_path, **kwargs)


class AutoMergedModel:
    """Loads a merged model: a folder written by [`Merger.save_pretrained`] under any task's head, or a recipe
    (`merge_config.json` without weights), which is merged while loading."""

    auto_class: ClassVar[str] = "AutoModel"

    def __init__(self, *args, **kwargs):
        name = type(self).__name__
        raise ConfigError(f"{name} is not instantiated: use {name}.from_pretrained(folder).")

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        task: str | None = None,
        trust_remote_code: bool = False,
        **kwargs,
    ) -> PreTrainedModel:
        """Loads the model.

        Args:
            pretrained_model_name_or_path (`str` or `Path`): A folder or a Hub id.
            task (`str`, *optional*): The task (expert) whose head is wanted; the folder's own head by default.
            trust_remote_code (`bool`): Whether code from the model's repository may run.
            kwargs: The Hub's arguments, and those of `from_pretrained` (`dtype`, `device_map`, `attn_implementation`, ...).

        Returns:
            [`~transformers.PreTrainedModel`]

        Raises:
            ConfigError: There is no such task.
            CheckpointError: The folder holds neither weights nor a recipe.
        """
        hub_kwargs = HubMixin.split_hub_kwargs(kwargs)
        folder, _ = fetch_folder(pretrained_model_name_or_path, **hub_kwargs)
        if not (folder / "config.json").is_file() and (folder / CONFIG_NAME).is_file():
            merger = Merger.from_pretrained(
                config=MergeConfig.from_pretrained(folder), trust_remote_code=trust_remote_code
            )
            return merger.merge() if task is None else merger.model_for(task)
        merged = open_source("merged", str(folder), trust_remote_code=trust_remote_code)
        if task is None:
            cls._check_class(merged.model_class, merged.config)
            return merged.model_class.from_pretrained(folder, **kwargs)
        return cls._with_head(merged, _head_folder(folder, task), trust_remote_code, kwargs)

    @classmethod
    def _with_head(cls, merged: ModelSource, folder: Path, trust_remote_code: bool, kwargs: dict) -> PreTrainedModel:
        where = f"the head '{folder.name}'"
        config = load_config(folder, where, trust_remote_code)
        model_class = model_class_of(config, where, trust_remote_code)
        cls._check_class(model_class, config)
        head = ModelSource(where, merged.reference, config, model_class, open_storage(folder))
        state = {name: merged.read(name) for name in merged.parameters}
        backbone = transfer_backbone(merged.anatomy, head.anatomy, state)
        own = {name: head.read(name) for name in head.parameters}
        if kwargs.pop("output_loading_info", False):
            raise ConfigError("output_loading_info is for the whole folder: leave 'task' out.")
        dtype = kwargs.pop("dtype", kwargs.pop("torch_dtype", "auto"))
        if dtype in ("auto", None):
            dtype = merged.dtype
        return assemble(model_class, config, backbone | own, dtype, merged.generation_config, **kwargs)

    @classmethod
    def _check_class(cls, model_class: type[PreTrainedModel], config: Any) -> None:
        """Refuses a head of another kind than the class of this loader says."""
        if cls.auto_class == "AutoModel":
            return
        import transformers

        mapping = getattr(transformers, cls.auto_class)._model_mapping
        known = mapping.get(type(config), ())
        if model_class not in (known if isinstance(known, (list, tuple)) else (known,)):
            raise ConfigError(
                f"The model is a {model_class.__name__}, which {cls.__name__} does not load: use AutoMergedModel."
            )


def _head_folder(folder: Path, task: str) -> Path:
    heads = folder / HEADS_FOLDER
    tasks = sorted(path.name for path in heads.iterdir() if path.is_dir()) if heads.is_dir() else []
    if not tasks:
        raise CheckpointError(f"'{folder}' keeps no heads per task: load it without task='{task}'.")
    if task not in tasks:
        raise ConfigError(
            f"'{folder}' has no head for the task '{task}'.{suggest(task, tasks)} Tasks: {', '.join(tasks)}."
        )
    return heads / task


class AutoMergedModelForCausalLM(AutoMergedModel):
    """[`AutoMergedModel`] for causal language models."""

    auto_class = "AutoModelForCausalLM"


class AutoMergedModelForMaskedLM(AutoMergedModel):
    """[`AutoMergedModel`] for masked language models."""

    auto_class = "AutoModelForMaskedLM"


class AutoMergedModelForSeq2SeqLM(AutoMergedModel):
    """[`AutoMergedModel`] for encoder-decoder language models."""

    auto_class = "AutoModelForSeq2SeqLM"


class AutoMergedModelForSequenceClassification(AutoMergedModel):
    """[`AutoMergedModel`] for sequence classification."""

    auto_class = "AutoModelForSequenceClassification"


class AutoMergedModelForTokenClassification(AutoMergedModel):
    """[`AutoMergedModel`] for token classification."""

    auto_class = "AutoModelForTokenClassification"


class AutoMergedModelForQuestionAnswering(AutoMergedModel):
    """[`AutoMergedModel`] for question answering."""

    auto_class = "AutoModelForQuestionAnswering"


class AutoMergedModelForImageClassification(AutoMergedModel):
    """[`AutoMergedModel`] for image classification."""

    auto_class = "AutoModelForImageClassification"
