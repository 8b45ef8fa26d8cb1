"""[`Merger`]: from models and a recipe to a merged model.

It opens the models, has a plan made and checked, and hands it to the engine that the method needs. Nothing of a model that
the user passed in is ever changed.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .checkpoints.folder import check_output, work_folder_of
from .checkpoints.source import ModelSource
from .config import MergeConfig
from .data.calibration import CalibrationData
from .engines.adapters import needs_base_values
from .engines.choice import (
    Engine,
    choose_engine,
    estimate_merge,
    find_data_problems,
    is_divisible,
    plan_merge,
    work_bytes,
)
from .engines.estimate import Estimate
from .engines.opening import Opening
from .engines.placement import Placement
from .engines.plan import MergePlan
from .engines.ranks import Ranks, all_ranks
from .engines.report import MergeReport
from .engines.sample_sizes import Samples
from .engines.saving import save_merge, save_model, save_on_ranks, temporary_folder
from .engines.sealing import head_tensors, processor_notes, result_config, result_dtype
from .engines.streaming import StateDictSink, StreamingEngine
from .errors import ConfigError, PlanError, suggest
from .hub import HubMixin, upload_folder
from .modeling.assembly import assemble, transfer_backbone
from .registry import get_merge_method


if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .engines.lazy import LazyModel


class Merger(HubMixin):
    """Merges models. Use [`Merger.from_pretrained`].

    **Attributes**:
        - **plan** ([`MergePlan`]) -- What will happen; made from headers on first use.
        - **report** ([`MergeReport`], *optional*) -- What happened, after a merge.
        - **model** ([`~transformers.PreTrainedModel`], *optional*) -- The merged model, after [`~Merger.merge`].
    """

    def __init__(
        self,
        experts: Sequence[ModelSource],
        config: MergeConfig,
        base: ModelSource | None = None,
        placement: Placement | None = None,
    ):
        self.experts = list(experts)
        self.config = config
        self.base = base
        self.placement = placement or Placement()
        self.report: MergeReport | None = None
        self.model: PreTrainedModel | None = None

    @classmethod
    def from_pretrained(
        cls,
        experts: Mapping[str, Any] | Sequence[Any] | None = None,
        config: MergeConfig | None = None,
        *,
        base_model: Any = None,
        dtype: str | torch.dtype | None = None,
        device_map: str | Mapping[str, str | int] | None = None,
        trust_remote_code: bool = False,
        **hub_kwargs,
    ) -> Merger:
        """Opens the models (configs and headers; no weights yet).

        Args:
            experts (`dict` or `list`, *optional*): The experts, by task name or in order: paths, Hub ids, `PreTrainedModel`s,
                state dicts; PEFT adapters as paths, Hub ids, `PeftModel`s or `{"model": PeftModel, "adapter": name}`. The recipe's
                own when not given.
            config ([`MergeConfig`], *optional*): The recipe. `WudiConfig()` when a base model is known, `LinearConfig()`
                otherwise.
            base_model (*optional*): The model that the experts were fine-tuned from. When not given: the recipe's, or the one
                that the model cards of all experts agree on, when the method needs one or none was chosen.
            dtype (`str` or `torch.dtype`, *optional*): The dtype of the merged weights; the first expert's by default.
            device_map (`str` or `dict`, *optional*): Where the arithmetic is done: `"cpu"` (default), `"auto"` for the accelerators of
                this process, `"cuda:0"`, or a dictionary from module-name prefixes to devices.
            trust_remote_code (`bool`): Whether code from the models' repositories may run.
            hub_kwargs: `revision`, `token`, `cache_dir`, `force_download`, `local_files_only`, for all models.

        Returns:
            [`Merger`]

        Raises:
            MergeError: A model cannot be opened, or the recipe is invalid.
        """
        unknown = sorted(set(hub_kwargs) - set(HubMixin.split_hub_kwargs(dict(hub_kwargs))))
        if unknown:
            raise ConfigError(
                f"Merger.from_pretrained has no argument '{unknown[0]}'.{suggest(unknown[0], _ARGUMENTS)}"
            )
        if config is not None and not isinstance(config, MergeConfig):
            raise ConfigError(f"config must be a MergeConfig such as WudiConfig(), got {type(config).__name__}.")
        if experts is None:
            experts = (config.experts if config is not None else None) or {}
        if base_model is None and config is not None:
            base_model = config.base_model
        placement = Placement(device_map)
        infer = config is None or get_merge_method(config.merge_type).method_cls.requires_base
        opening = Opening(trust_remote_code, hub_kwargs, base_values=config is None or needs_base_values(config))
        sources, base = opening.models(experts, base_model, infer)
        config = copy.deepcopy(config) if config is not None else default_config(base is not None)
        if dtype is not None:
            config.dtype = str(dtype).removeprefix("torch.")
        config.__post_init__()
        if config.align is not None:
            from .engines.aligned import align_experts

            sources = align_experts(sources, base)
        return cls(sources, config, base, placement)

    # -- planning -------------------------------------------------------------------------------------------------

    @cached_property
    def plan(self) -> MergePlan:
        """What will happen, with the problems found; see [`~Merger.check`]."""
        plan = plan_merge(self.config, self.experts, self.base)
        try:
            plan.notes += processor_notes(plan)
        except ConfigError as error:
            plan.problems += [] if str(error) in plan.problems else [str(error)]
        if not plan.problems:
            for source in plan.sources:
                source.keep_record()
        return plan

    def check(self, save_directory: str | os.PathLike | None = None) -> MergePlan:
        """Checks everything that headers and the file system reveal, before a weight is read.

        Args:
            save_directory (`str`, *optional*): Also check that this folder can be written.

        Returns:
            [`MergePlan`]: Print it to read what will happen, and what memory and disk it takes.

        Raises:
            PlanError: Lists all problems at once.
        """
        self._raise(self.problems(save_directory))
        if self.plan.estimate is None:
            self.plan.estimate = estimate_merge(self.plan, self.placement)
        return self.plan

    def estimate(
        self,
        save_directory: str | os.PathLike | None = None,
        *,
        samples: int = 0,
        tokens: int = 0,
        args: Any = None,
        num_proc: int | str | None = None,
    ) -> Estimate:
        """What the merge will take: bytes read and written, disk, peak memory by device, and, where no samples are needed, time. The
        time comes from merging small random tensors on this machine, which takes some tenths of a second; no weight is read.

        Args:
            save_directory (`str`, *optional*): Where the result will go: this disk is tried for the time.
            samples (`int`): For methods that need samples: how many each task will have.
            tokens (`int`): And how many tokens, or patches, each of them.
            args ([`ProDistillArguments`], *optional*): For such methods: as in [`~Merger.merge`].
            num_proc (`int` or `str`, *optional*): As in [`~Merger.save_pretrained`].

        Raises:
            PlanError: The models cannot be merged; lists every reason.
        """
        self._raise(self.problems())
        options = None
        if args is not None:
            from .training.monitor import engine_options

            options = engine_options(args, None)
        folder = Path(save_directory).absolute() if save_directory is not None else None
        size = Samples(samples, tokens)
        self.plan.estimate = estimate_merge(
            self.plan, self.placement, size, options, timed=True, folder=folder, num_proc=checked_num_proc(num_proc)
        )
        return self.plan.estimate

    def problems(self, save_directory: str | os.PathLike | None = None) -> list[str]:
        """What [`~Merger.check`] would raise, as a list of sentences; empty when the merge can run.

        Args:
            save_directory (`str`, *optional*): Also check that this folder can be written.
        """
        return self._problems(None if save_directory is None else Path(save_directory))

    def _problems(self, folder: Path | None, work_dir: Path | None = None) -> list[str]:
        """Those of the plan, and of a folder to save into with a work folder, the one beside it when not given."""
        if folder is None:
            return self.plan.problems
        has_blocks = self.model is None and not self.plan.problems
        work = {work_dir or work_folder_of(folder): work_bytes(self.plan)} if has_blocks else None
        return self.plan.problems + check_output(folder, self.plan.nbytes, work)

    @staticmethod
    def _raise(problems: list[str]) -> None:
        if problems:
            raise PlanError(problems)

    # -- merging --------------------------------------------------------------------------------------------------

    def merge(
        self,
        data: CalibrationData | Mapping[str, Any] | None = None,
        *,
        callbacks: Sequence[Any] | None = None,
        args: Any = None,
    ) -> PreTrainedModel:
        """Merges in memory.

        Args:
            data ([`CalibrationData`] or `dict`, *optional*): Samples by expert, for methods that need some: a
                `datasets.Dataset`, a list of texts or images, a `DataLoader` or tensors for each.
            callbacks (`list`, *optional*): [`~transformers.TrainerCallback`]s, for methods that train.
            args ([`ProDistillArguments`], *optional*): Logging, precision and caches, for methods that need samples.

        Returns:
            [`~transformers.PreTrainedModel`]: Of the first expert's class, on the CPU, in evaluation mode. Where heads are kept per
            task it has the first expert's; see [`~Merger.model_for`].

        Raises:
            PlanError: The models cannot be merged; lists every reason.
        """
        if self.config.output == "adapter":
            raise ConfigError(
                "output='adapter' is written by save_pretrained(folder) and loaded with PeftModel.from_pretrained(base, folder); "
                "hf_merge.peft.add_merged_adapter adds it to a model in memory."
            )
        plan, engine = self._prepare(Ranks(), None, data, callbacks, args)
        sink = StateDictSink()
        self.report = engine.run(plan.groups, sink)
        generation_config = plan.target.generation_config
        self.model = assemble(
            plan.target.model_class, result_config(plan), sink.tensors, result_dtype(plan), generation_config
        )
        if plan.members:
            from .engines.ensembles import with_planned_members

            with_planned_members(plan, self.model)
        return self.model

    def _prepare(
        self, ranks: Ranks, folder: Path | None, data: Any, callbacks: Sequence[Any] | None, args: Any
    ) -> tuple[MergePlan, Engine]:
        """Checks everything and chooses the engine. Rank 0 makes the folder, and checks it."""
        data = CalibrationData.of(data) if data is not None else None
        problems = find_data_problems(self.plan, data, callbacks is not None or args is not None)
        options = None
        if data is not None:
            from .training.monitor import engine_options

            options = engine_options(args, callbacks)
            options.ranks, options.output = ranks, folder
            if options.work_dir is None and folder is not None:
                options.work_dir = work_folder_of(folder)
        work_dir = None if options is None else options.work_dir
        self._raise(self._problems(folder if ranks.is_first else None, work_dir) + problems)
        if options is None:
            return self.plan, choose_engine(self.plan, self.placement)
        return self.plan, choose_engine(self.plan, self.placement, data, options)

    def model_for(self, task: str) -> PreTrainedModel:
        """The merged backbone under one expert's own head; where the experts' heads were merged, the merged model.

        Args:
            task (`str`): The expert's name.

        Returns:
            [`~transformers.PreTrainedModel`]: Of that expert's class and config. It has weights of its own.
        """
        index = self._index_of(task)
        model = self.model if self.model is not None else self.merge()
        head, state = self.plan.heads.get(task), model.state_dict()
        if self.plan.twin is not None:
            state = {name: self.plan.twin.added(task, name, value) for name, value in state.items()}
        if head is None:
            model = copy.deepcopy(model)
            model.load_state_dict(state)
            return model
        source = self.plan.experts[index]
        tensors = head_tensors(source, head)
        source = head.model or source
        state = transfer_backbone(self.plan.target.anatomy, source.anatomy, state)
        model = assemble(source.model_class, source.config, state | tensors, result_dtype(self.plan))
        if head.surgery is not None:
            head.surgery.install(model)
        return model

    def _index_of(self, task: str) -> int:
        """Which expert a task is, or the reason why there is no model for it."""
        names = [source.name for source in self.experts]
        if task not in names:
            raise ConfigError(f"No expert is called '{task}'.{suggest(task, names)} Experts: {', '.join(names)}.")
        if self.config.heads == "first" and task != names[0]:
            raise ConfigError(
                f"heads='first' kept the head of '{names[0]}' only: use heads='per_task' to keep that of '{task}'."
            )
        return names.index(task)

    def lazy_model(self, task: str | None = None) -> LazyModel:
        """The merged model as what [`AutoMergedModel`] loads it from: parameters that are merged when they are asked for. Methods
        that are not defined parameter by parameter are carried out at once.

        Args:
            task (`str`, *optional*): The expert whose head is wanted; the first one's when not given.
        """
        if task is not None:
            self._index_of(task)
        from .engines.lazy import LazyModel, lazy_merge

        plan, engine = self._prepare(Ranks(), None, None, None, None)
        if plan.adapter is not None:
            raise ConfigError(
                "The recipe's result is an adapter: use Merger.from_pretrained(config=recipe).save_pretrained(folder)."
            )
        if isinstance(engine, StreamingEngine):
            return lazy_merge(plan, engine, task)
        model = self.merge() if task is None else self.model_for(task)
        return LazyModel(type(model), model.config, model.state_dict(), result_dtype(plan), model.generation_config)

    # -- saving ---------------------------------------------------------------------------------------------------

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        *,
        data: CalibrationData | Mapping[str, Any] | None = None,
        callbacks: Sequence[Any] | None = None,
        args: Any = None,
        max_shard_size: int | str = "5GB",
        push_to_hub: bool = False,
        repo_id: str | None = None,
        distributed: bool = True,
        num_proc: int | str | None = None,
        **kwargs,
    ) -> None:
        """Writes the merged model as a folder that `from_pretrained` loads.

        Without a [`~Merger.merge`] before, the merge is streamed from disk to disk and the model is never in memory. The folder
        is complete or absent: a merge that was killed leaves `<folder>.partial`, and running it again continues there,
        after the weight files that are finished.

        In a `torch.distributed` job (`torchrun`, `accelerate launch`) all ranks make this call, with the same arguments. They divide the
        weight files among them, and the samples of methods that merge block by block; anything else is done by rank 0. All return when
        the folder is complete, with the same report.

        Args:
            save_directory (`str`): The folder; it must be absent or empty.
            data, callbacks, args: As in [`~Merger.merge`], for methods that need samples. Finished blocks are kept in
                `<folder>.work` until the folder is complete.
            max_shard_size (`int` or `str`): The largest weight file.
            push_to_hub (`bool`): Also upload the folder.
            repo_id (`str`, *optional*): Where to; the folder's name by default.
            distributed (`bool`): Whether the ranks of a `torch.distributed` job do this together; `False` for a call that only one of
                them makes.
            num_proc (`int` or `str`, *optional*): How many processes of this machine merge, for methods that merge entry by entry, on
                Linux, from files: forks of this one. `"auto"`: one on each processor, as far as the memory goes.
            kwargs: `commit_message`, `private`, `token`, `revision`, `create_pr` for the upload.

        Raises:
            PlanError: The models cannot be merged or the folder cannot be written; lists every reason.
            OutputError: Writing failed; nothing is left behind.
            MergeError: Another rank failed; nothing is left behind.
            RankLostError: Another rank was killed; what is finished is kept.
        """
        folder = Path(save_directory).absolute()
        unknown = sorted(set(kwargs) - set(_UPLOAD_ARGUMENTS))
        if unknown or (kwargs and not push_to_hub):
            name = (unknown or sorted(kwargs))[0]
            known = (*_SAVE_ARGUMENTS, *_UPLOAD_ARGUMENTS)
            hint = suggest(name, known) if unknown else " It is for the upload: set push_to_hub=True."
            raise ConfigError(f"Merger.save_pretrained cannot use the argument '{name}'.{hint}")
        ranks = all_ranks() if distributed else Ranks()

        def save_together() -> None:
            self._save(ranks, folder, max_shard_size, num_proc, (data, callbacks, args))
            if push_to_hub:
                ranks.on_first(lambda: upload_folder(folder, repo_id or folder.name, **kwargs), "upload")

        with ranks.quiet():
            ranks.step(save_together)

    def _save_and_upload(
        self,
        upload: Callable[[Path], str],
        *,
        data: CalibrationData | Mapping[str, Any] | None = None,
        callbacks: Sequence[Any] | None = None,
        args: Any = None,
        max_shard_size: int | str = "5GB",
        distributed: bool = True,
        num_proc: int | str | None = None,
        **unknown,
    ) -> str:
        """In a job all ranks call this. Those of one host merge together; where there are several hosts, which have no temporary
        folder in common, rank 0 merges alone. Rank 0 uploads, and all ranks return when it has, or fail with it."""
        if unknown:
            known = (*_SAVE_ARGUMENTS, *_UPLOAD_ARGUMENTS)
            name = next(iter(unknown))
            raise ConfigError(f"Merger.push_to_hub cannot use the argument '{name}'.{suggest(name, known)}")
        ranks = all_ranks("push to the Hub") if distributed else Ranks()

        def push() -> str:
            with temporary_folder(ranks) as (folder, is_shared):
                target = folder / "upload"
                self._save(ranks, target, max_shard_size, num_proc, (data, callbacks, args), is_shared)
                return ranks.on_first(lambda: upload(target), "upload")

        with ranks.quiet():
            return ranks.step(push)

    def _save(
        self,
        ranks: Ranks,
        folder: Path,
        max_shard_size: int | str,
        num_proc: int | str | None,
        given: tuple[Any, Any, Any],
        is_shared: bool = True,
    ) -> None:
        """Saves on all ranks together, where they see the folder. `given` are data, callbacks and args."""
        num_proc = checked_num_proc(num_proc)

        def save(ranks: Ranks) -> MergeReport:
            if self.model is None:
                plan, engine = self._prepare(ranks, folder, *given)
                return save_merge(ranks, plan, engine, folder, max_shard_size, num_proc)
            if given[0] is not None:
                raise ConfigError("The models are merged already, the samples would not be used: leave 'data' out.")
            save_model(self.check(folder), self.model, self.report, folder, max_shard_size)
            return self.report

        divided = is_shared and self.model is None and is_divisible(self.plan)
        self.report = save_on_ranks(ranks, divided, save)


_ARGUMENTS = (
    "experts",
    "config",
    "base_model",
    "dtype",
    "device_map",
    "trust_remote_code",
    "revision",
    "token",
    "cache_dir",
)


_SAVE_ARGUMENTS = (
    "data",
    "callbacks",
    "args",
    "max_shard_size",
    "push_to_hub",
    "repo_id",
    "distributed",
    "num_proc",
)
_UPLOAD_ARGUMENTS = ("commit_message", "private", "token", "revision", "create_pr")


def checked_num_proc(num_proc: Any) -> int | str | None:
    """The argument `num_proc`, or a [`ConfigError`]."""
    if num_proc in (None, "auto") or type(num_proc) is int and num_proc >= 1:
        return num_proc
    raise ConfigError(f"num_proc must be a number of processes, at least 1, or 'auto', got {num_proc!r}.")


def default_config(base_known: bool) -> MergeConfig:
    """`WudiConfig()` when there is a base model to take task vectors from, the plain average otherwise."""
    return get_merge_method("wudi" if base_known else "linear").config_cls()
