"""Loading by name, in the manner of transformers' Auto classes: recipes ([`AutoMergeConfig`]) and merged models
([`AutoMergedModel`] and one class per task type)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from .checkpoints.opening import load_config, open_source
from .checkpoints.source import ModelSource
from .checkpoints.storage import open_storage
from .config import CONFIG_NAME, MergeConfig
from .engines.ensembles import member_folders, with_planned_members, with_saved_members
from .engines.lazy import LazyModel, LazyTensor, lazy_source, under_head
from .engines.sealing import HEADS_FOLDER
from .engines.twin_parts import TwinParts
from .errors import CheckpointError, ConfigError, suggest
from .hub import ADAPTER_CONFIG_NAME, HubMixin, fetch_folder
from .merger import Merger
from .modeling.assembly import backbone_names
from .modeling.shell import model_class_of
from .modeling.surgery import HeadSurgery


if TYPE_CHECKING:
    from transformers import PreTrainedModel


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
    (`merge_config.json` without weights), which is merged while loading, parameter by parameter, with nothing on disk. The result of
    `"ensemble"` is one model that runs all experts."""

    auto_class: ClassVar[str] = "AutoModel"

    def __init__(self, *args, **kwargs):
        name = type(self).__name__
        raise ConfigError(f"{name} is not instantiated: use {name}.from_pretrained(folder).")

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path | MergeConfig,
        *,
        task: str | None = None,
        routed: bool = False,
        trust_remote_code: bool = False,
        **kwargs,
    ) -> PreTrainedModel:
        """Loads the model.

        Args:
            pretrained_model_name_or_path (`str`, `Path` or [`MergeConfig`]): A folder or a Hub id, or a recipe that names its
                experts.
            task (`str`, *optional*): The task (expert) whose head is wanted; the folder's own head by default. Of a result of `"twin"` also
                the task whose parts are added to the weights; without a task they are mixed for each sample.
            routed (`bool`): For a result of `"twin"`: mix the parts for each sample under the head of `task`, too.
            trust_remote_code (`bool`): Whether code from the model's repository may run.
            kwargs: The Hub's arguments, and those of `from_pretrained` (`dtype`, `device_map`, `offload_folder`,
                `attn_implementation`, ...). A recipe is merged where its parameters end up.

        Returns:
            [`~transformers.PreTrainedModel`]

        Raises:
            ConfigError: There is no such task, or nothing to route.
            CheckpointError: The folder holds neither weights nor a recipe.
            PlanError: The recipe cannot be carried out.
        """
        hub_kwargs = HubMixin.split_hub_kwargs(kwargs)
        if isinstance(pretrained_model_name_or_path, MergeConfig):
            _refuse_routing(routed, "A recipe")
            return cls._merge(pretrained_model_name_or_path, task, trust_remote_code, hub_kwargs, kwargs)
        folder, _ = fetch_folder(pretrained_model_name_or_path, **hub_kwargs)
        if (folder / ADAPTER_CONFIG_NAME).is_file():
            raise ConfigError(
                f"'{folder}' holds a PEFT adapter: load it with peft.AutoPeftModel... or PeftModel.from_pretrained(base, folder), a "
                f"task's with the folder {HEADS_FOLDER}/<task> in it."
            )
        if not (folder / "config.json").is_file() and (folder / CONFIG_NAME).is_file():
            _refuse_routing(routed, f"The recipe in '{folder}'")
            recipe = MergeConfig.from_pretrained(folder)
            # A revision or a folder inside of a repository is the recipe's, not its experts'.
            shared = {key: value for key, value in hub_kwargs.items() if key not in ("revision", "subfolder")}
            return cls._merge(recipe, task, trust_remote_code, shared, kwargs)
        merged = open_source("merged", str(folder), trust_remote_code=trust_remote_code)
        twin = TwinParts.load(folder, None if routed else task)
        _refuse_routing(routed and twin is None, f"'{folder}'")
        if task is None:
            return cls._whole(merged, folder, twin, kwargs)
        return cls._of_task(merged, folder, task, twin, routed, trust_remote_code, kwargs)

    @classmethod
    def _merge(
        cls, recipe: MergeConfig, task: str | None, trust_remote_code: bool, hub_kwargs: dict, kwargs: dict
    ) -> PreTrainedModel:
        _refuse_loading_info(kwargs)
        merger = Merger.from_pretrained(
            config=recipe,
            device_map=_arithmetic_devices(kwargs.get("device_map")),
            trust_remote_code=trust_remote_code,
            **hub_kwargs,
        )
        model = merger.lazy_model(task)
        cls._check_class(model.model_class, model.config)
        loaded = model.load(**kwargs)
        return with_planned_members(merger.plan, loaded, **kwargs) if merger.plan.members else loaded

    @classmethod
    def _whole(cls, merged: ModelSource, folder: Path, twin: TwinParts | None, kwargs: dict) -> PreTrainedModel:
        """The folder under its own head, with the parts of all tasks, or the other members of the ensemble, where there are some."""
        cls._check_class(merged.model_class, merged.config)
        members = member_folders(folder)
        if twin is None and not members:
            return merged.model_class.from_pretrained(folder, **kwargs)
        _refuse_loading_info(kwargs)
        model = merged.model_class.from_pretrained(folder, **kwargs)
        if members:
            others = [merged.model_class.from_pretrained(path, **kwargs) for path in members]
            return with_saved_members(folder, model, others)
        twin.install(model)
        return model

    @classmethod
    def _of_task(
        cls,
        merged: ModelSource,
        folder: Path,
        task: str,
        twin: TwinParts | None,
        routed: bool,
        trust_remote_code: bool,
        kwargs: dict,
    ) -> PreTrainedModel:
        """The model of a task: under its head where heads are kept, with its parts folded in or with the parts of all tasks."""
        _refuse_loading_info(kwargs)
        state = lazy_source(merged)
        if twin is not None and not routed:
            state = {name: _with_part(twin, task, name, tensor) for name, tensor in state.items()}
        head, names = merged, None
        if twin is None or (folder / HEADS_FOLDER).is_dir():
            head = _open_head(merged, _head_folder(folder, task), trust_remote_code)
            names = {stored: name for name, stored in backbone_names(merged.anatomy, head.anatomy, state).items()}
            state = under_head(merged, state, head) | lazy_source(head)
        cls._check_class(head.model_class, head.config)
        model = LazyModel(head.model_class, head.config, state, merged.dtype, merged.generation_config).load(**kwargs)
        surgery = HeadSurgery.load(folder / HEADS_FOLDER / task)
        if surgery is not None:
            surgery.install(model)
        if routed:
            twin.install(model, names)
        return model

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


def _open_head(merged: ModelSource, folder: Path, trust_remote_code: bool) -> ModelSource:
    where = f"the head '{folder.name}'"
    config = load_config(folder, where, trust_remote_code)
    model_class = model_class_of(config, where, trust_remote_code)
    return ModelSource(where, merged.reference, config, model_class, open_storage(folder))


def _with_part(twin: TwinParts, task: str, name: str, tensor: LazyTensor) -> LazyTensor:
    return LazyTensor(tensor.info, lambda: twin.added(task, name, tensor.make()), tensor.errors)


def _refuse_routing(asked: bool, what: str) -> None:
    if asked:
        raise ConfigError(f"{what} has no parts of tasks that could be routed: leave routed=True out.")


def _refuse_loading_info(kwargs: dict) -> None:
    if kwargs.pop("output_loading_info", False):
        raise ConfigError("output_loading_info is for a whole folder: leave it out with 'task' and with a recipe.")


def _arithmetic_devices(device_map: Any) -> Any:
    """Where a merge computes, from where the model is to be: accelerate's strategies mean the accelerator."""
    if isinstance(device_map, str) and device_map in ("auto", "balanced", "balanced_low_0", "sequential"):
        return "auto"
    return device_map


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


class AutoMergedModelForMultipleChoice(AutoMergedModel):
    """[`AutoMergedModel`] for multiple choice."""

    auto_class = "AutoModelForMultipleChoice"


class AutoMergedModelForImageClassification(AutoMergedModel):
    """[`AutoMergedModel`] for image classification."""

    auto_class = "AutoModelForImageClassification"


class AutoMergedModelForObjectDetection(AutoMergedModel):
    """[`AutoMergedModel`] for object detection."""

    auto_class = "AutoModelForObjectDetection"


class AutoMergedModelForSemanticSegmentation(AutoMergedModel):
    """[`AutoMergedModel`] for semantic segmentation."""

    auto_class = "AutoModelForSemanticSegmentation"


class AutoMergedModelForImageTextToText(AutoMergedModel):
    """[`AutoMergedModel`] for models that read images and text and write text."""

    auto_class = "AutoModelForImageTextToText"


class AutoMergedModelForAudioClassification(AutoMergedModel):
    """[`AutoMergedModel`] for audio classification."""

    auto_class = "AutoModelForAudioClassification"


class AutoMergedModelForCTC(AutoMergedModel):
    """[`AutoMergedModel`] for speech recognition by CTC."""

    auto_class = "AutoModelForCTC"


class AutoMergedModelForSpeechSeq2Seq(AutoMergedModel):
    """[`AutoMergedModel`] for speech recognition by an encoder-decoder."""

    auto_class = "AutoModelForSpeechSeq2Seq"
