"""The models of a block-wise merge as they run through their blocks together, and the activations that reach one block."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..checkpoints.source import ModelSource
from ..data.batching import Batch
from ..data.cache import ActivationCache, CachedTensor
from ..errors import UnsupportedModelError
from ..methods.block_base import BlockActivations, BlockInputs, BlockMethod, K, T
from ..modeling.reentry import main_output
from .block_runner import BlockRunner, Key, open_runner
from .options import EngineOptions
from .plan import MergePlan


@dataclass(frozen=True)
class Stage:
    """The next block, and the batches of each task that have reached it, on any rank."""

    block: str
    keys: list[list[Key]]


class BlockModels:
    """The merged model and the experts, as they run through the blocks together.

    Args:
        plan ([`MergePlan`]): Of a [`BlockMethod`].
        method ([`BlockMethod`]): Its method.
        batches (`Mapping[Key, Batch]`): What runs through the models on this rank.
        student_value (`Callable`): Gives what an entry of the merged model starts from, by its name and the names of all blocks.
        cache ([`ActivationCache`]): Keeps activations.
        device (`torch.device`): Where models run.
        options ([`EngineOptions`]): How to run.
    """

    def __init__(
        self,
        plan: MergePlan,
        method: BlockMethod,
        batches: Mapping[Key, Batch],
        student_value: Callable[[str, frozenset[str]], Tensor | None],
        cache: ActivationCache,
        device: torch.device,
        options: EngineOptions,
    ):
        self.plan, self.method, self.batches, self.device = plan, method, batches, device
        self.ranks = options.ranks
        common = (cache, device, options.bf16)
        target = plan.target
        blocks: set[str] = set()
        self.student = open_runner(
            "the merged model",
            target.model_class,
            target.config,
            lambda name: student_value(name, frozenset(blocks)),
            self.batches if self.method.reads_student else {},
            *common,
        )
        blocks.update(self.student.reentry.blocks)
        self.experts = [
            open_runner(
                str(source),
                source.model_class,
                source.config,
                _reader(source),
                {key: batch for key, batch in self.batches.items() if self.method.reads_teachers and key[0] == task},
                *common,
            )
            for task, source in enumerate(plan.experts)
        ]
        self._expert_names = [_translation(target, self.student, s, r) for s, r in zip(plan.experts, self.experts)]
        reference = plan.experts[0]
        first = {key: batch for key, batch in self.batches.items() if key[0] == 0}
        self.reference = open_runner(
            str(reference), reference.model_class, reference.config, _reader(reference), first, *common[:2], False
        )

    @property
    def blocks(self) -> list[str]:
        """All blocks by the merged model's names, in order."""
        return list(self.student.reentry.blocks)

    def next_stage(self) -> Stage | None:
        """Runs everything up to its next block and picks the first of these blocks, over all ranks."""
        reached: dict[Key, str] = {}
        for part in self.ranks.gather(self._advance()):
            if any(reached.get(key, block) != block for key, block in part.items()):
                raise UnsupportedModelError(
                    "Which blocks run next depends on the samples of a batch: merge in one process."
                )
            reached |= part
        if not reached:
            return None
        block = min(reached.values(), key=self.student.reentry.order.__getitem__)
        tasks = range(len(self.experts))
        keys = sorted(key for key, name in reached.items() if name == block)
        return Stage(block, [[key for key in keys if key[0] == task] for task in tasks])

    def _advance(self) -> dict[Key, str]:
        """Runs everything of this rank up to its next block. Returns the block of each batch."""
        found: dict[Key, str] = self.student.advance() if self.method.reads_student else {}
        if self.method.reads_teachers:
            theirs = {}
            for names, runner in zip(self._expert_names, self.experts, strict=True):
                back = {theirs: ours for ours, theirs in names.items()}
                theirs.update({key: back[block] for key, block in runner.advance().items()})
            if self.method.reads_student and theirs != found:
                raise UnsupportedModelError("The experts and the merged model run their blocks in different orders.")
            found = theirs
        return found

    def release_experts(self, block: str) -> None:
        """Frees the weights of a block of each expert before its time."""
        for names, runner in zip(self._expert_names, self.experts, strict=True):
            runner.release_block(names[block])

    @contextmanager
    def resident(self, block: str) -> Iterator[tuple[nn.Module, list[nn.Module]]]:
        """One block of the merged model and of each expert, with its weights."""
        with ExitStack() as stack, torch.no_grad():
            student = stack.enter_context(self.student.block_resident(block))
            experts = [
                stack.enter_context(runner.block_resident(names[block]))
                for names, runner in zip(self._expert_names, self.experts, strict=True)
            ]
            yield student, experts


class StageActivations(BlockActivations):
    """What reaches one block; of each batch, the rows that this rank holds."""

    def __init__(self, models: BlockModels, stage: Stage, student: nn.Module, experts: Sequence[nn.Module]):
        self.models = models
        self.stage = stage
        self.batches = [len(keys) for keys in stage.keys]
        self._held = [[index for index, key in enumerate(keys) if key in models.batches] for keys in stage.keys]
        self._student = student
        self._experts = experts
        self._targets: dict[Key, CachedTensor] = {}
        decoder = models.plan.target.shell.config.is_encoder_decoder and _in_decoder(models, stage.block)
        self._is_decoder = bool(decoder)

    def held(self, task: int) -> Sequence[int]:
        return self._held[task]

    def all_reduce(self, tensors: Mapping[K, Tensor]) -> dict[K, Tensor]:
        return self.models.ranks.all_reduce(tensors, self.models.device)

    def gather(self, value: T) -> list[T]:
        return self.models.ranks.gather(value)

    def student(self, task: int, index: int) -> BlockInputs:
        return self._inputs(self.models.student, task, index)

    def teacher(self, task: int, index: int) -> BlockInputs:
        return self._inputs(self.models.experts[task], task, index)

    def _inputs(self, runner: BlockRunner, task: int, index: int) -> BlockInputs:
        key = self.stage.keys[task][index]
        call = runner.call(key)
        hidden = next(
            v for v in (*call.args, *call.kwargs.values()) if isinstance(v, Tensor) and v.is_floating_point()
        )
        mask = self.models.batches[key].token_mask(hidden.shape, self._is_decoder)
        return BlockInputs(task, index, call.args, call.kwargs, mask if mask is None else mask.to(hidden.device))

    def run(self, module: nn.Module, inputs: BlockInputs) -> Tensor:
        return main_output(self.models.student.run(module, inputs.args, inputs.kwargs)).float()

    def run_teacher(self, task: int, index: int) -> None:
        key = self.stage.keys[task][index]
        if key not in self._targets:
            self._targets[key] = self.models.experts[task].push(key, self._experts[task])

    def target(self, task: int, index: int) -> Tensor:
        return self._targets[self.stage.keys[task][index]].load(self.models.device)

    def push(self) -> None:
        """Takes every batch through the block."""
        for task, keys in enumerate(self.stage.keys):
            for index in self._held[task]:
                if self.models.method.reads_teachers:
                    self.run_teacher(task, index)
                if self.models.method.reads_student:
                    self.models.student.push(keys[index], self._student)
        self._targets.clear()


def _in_decoder(models: BlockModels, block: str) -> bool:
    decoder = models.student.model.get_decoder()
    module = models.student.reentry.blocks[block]
    return any(module is other for other in decoder.modules())


def _reader(source: ModelSource):
    def read(name: str) -> Tensor | None:
        stored = name if name in source.parameters else source.tied_stand_in(name)
        return None if stored is None else source.read(stored)

    return read


def _translation(
    target: ModelSource, student: BlockRunner, source: ModelSource, runner: BlockRunner
) -> dict[str, str]:
    """The blocks of the merged model by name -> those of an expert, whose class may be another over the same backbone."""
    theirs = {source.anatomy.canonical(name): name for name in runner.reentry.blocks}
    return {name: theirs[target.anatomy.canonical(name)] for name in student.reentry.blocks}
