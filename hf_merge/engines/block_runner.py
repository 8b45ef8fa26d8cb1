"""One model of a block-wise merge: runs its own forward up to the next block for each of its batches, and keeps what is needed.

Between two blocks only activations are kept; weights outside of blocks are there while a forward needs them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..data.batching import Batch
from ..data.cache import ActivationCache, CachedTensor
from ..errors import NonFiniteError, UnsupportedModelError
from ..modeling.precision import mixed_precision
from ..modeling.reentry import BlockCall, Reentry, compare_outputs, main_output, map_structure, without_caches
from ..modeling.residency import Reader, build_runnable_shell, entries_of, materialise, move_buffers, release
from ..modeling.shell import output_embeddings


if TYPE_CHECKING:
    from transformers import PreTrainedModel


CACHED_FROM = 1 << 12
"""Tensors with fewer elements are kept as they are; larger ones go through the cache, which may spill to disk."""

Key = tuple[int, int]
"""(expert, number of the batch)."""


@dataclass
class _Progress:
    """How far a batch has come: the outputs of its finished blocks, and the next call."""

    outputs: dict[str, Any] = field(default_factory=dict)
    finished: set[str] = field(default_factory=set)
    call: BlockCall | None = None
    is_at_end: bool = False


class _Outputs(Mapping):
    """The outputs of the finished blocks, loaded when they are asked for. Remembers what it handed out."""

    def __init__(self, progress: _Progress, reentry: Reentry, device: torch.device):
        self._progress = progress
        self._slot = (lambda name: name) if reentry.keeps_all else reentry.list_of
        self._device = device
        self._loaded: dict[str, Any] = {}
        self.handed_out: dict[int, CachedTensor] = {}

    def __contains__(self, name: object) -> bool:
        return name in self._progress.finished

    def __getitem__(self, name: str) -> Any:
        slot = self._slot(name)
        if slot not in self._loaded:
            self._loaded[slot] = self._load(self._progress.outputs[slot])
        return self._loaded[slot]

    def _load(self, value: Any) -> Any:
        if isinstance(value, CachedTensor):
            tensor = value.load(self._device)
            self.handed_out[id(tensor)] = value
            return tensor
        return map_structure(self._load, value)

    def __iter__(self) -> Iterator[str]:
        return iter(self._progress.finished)

    def __len__(self) -> int:
        return len(self._progress.finished)


class BlockRunner:
    """Runs one model block by block.

    Args:
        label (`str`): What messages call the model.
        model ([`~transformers.PreTrainedModel`]): A shell made by `build_runnable_shell`.
        read (`Callable`): Gives the stored value of an entry of its state dict.
        batches (`Mapping[Key, Batch]`): What runs through it.
        cache ([`ActivationCache`]): Keeps its activations.
        device (`torch.device`): Where it runs.
        bf16 (`bool`): Whether blocks run in bfloat16 (autocast).

    **Attributes**:
        - **running** (`Key` or `None`) -- The batch that runs now, for hooks.
    """

    def __init__(
        self,
        label: str,
        model: PreTrainedModel,
        read: Reader,
        batches: Mapping[Key, Batch],
        cache: ActivationCache,
        device: torch.device,
        bf16: bool = False,
    ):
        self.label = label
        self.model = model
        self.read = read
        self.batches = batches
        self.cache = cache
        self.device = device
        self.bf16 = bf16
        self.running: Key | None = None
        self.reentry = Reentry(model)
        inside = tuple(f"{name}." for name in self.reentry.blocks)
        self._outside = [name for name in entries_of(model) if not name.startswith(inside)]
        self._outside = [name for name in self._outside if not self._is_output_only(name)]
        self._progress: dict[Key, _Progress] = {key: _Progress() for key in batches}
        move_buffers(model, device)

    def _is_output_only(self, name: str) -> bool:
        """Whether an entry belongs to the output embeddings, which a run never reaches, and to nothing else."""
        head = output_embeddings(self.model)
        owner = self.model.get_submodule(name.rpartition(".")[0])
        return head is not None and owner is head

    # -- weights --------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def outside_resident(self) -> Iterator[None]:
        """The weights outside of blocks are there."""
        materialise(self.model, self._outside, self.read, self.device)
        try:
            yield
        finally:
            release(self.model, self._outside)

    @contextlib.contextmanager
    def block_resident(self, name: str) -> Iterator[nn.Module]:
        """The weights of one block are there."""
        materialise(self.model, self._entries_in(name), self.read, self.device)
        try:
            yield self.reentry.blocks[name]
        finally:
            self.release_block(name)

    def release_block(self, name: str) -> None:
        """Frees the weights of one block."""
        release(self.model, self._entries_in(name))

    def _entries_in(self, block: str) -> list[str]:
        return [entry for entry in entries_of(self.model) if entry.startswith(f"{block}.")]

    # -- running --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def advance(self) -> dict[Key, str]:
        """Runs every batch up to its next block. Returns the block of each; batches at their end are left out."""
        waiting = [key for key, one in self._progress.items() if one.call is None and not one.is_at_end]
        if waiting:
            with self.outside_resident():
                for key in waiting:
                    self.running = key
                    self._advance(key)
                self.running = None
        return {key: one.call.block for key, one in self._progress.items() if one.call is not None}

    def _advance(self, key: Key) -> None:
        progress = self._progress[key]
        outputs = _Outputs(progress, self.reentry, self.device)
        call = self.reentry.next_call(self._inputs(self.batches[key]), outputs)
        if call is None:
            progress.is_at_end = True
            progress.outputs.clear()
            return
        kept: dict[int, CachedTensor] = outputs.handed_out
        first = next((v for v in (*call.args, *call.kwargs.values()) if _is_hidden(v)), None)

        def keep(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return map_structure(keep, value)
            if id(value) not in kept and value.numel() >= CACHED_FROM:
                kept[id(value)] = self.cache.put(value, rounded=value is first)
            return kept.get(id(value), value)

        progress.call = BlockCall(call.block, keep(call.args), keep(call.kwargs))

    def _inputs(self, batch: Batch) -> dict[str, Tensor]:
        return {name: value.to(self.device) for name, value in batch.inputs.items()}

    def call(self, key: Key) -> BlockCall:
        """The next call of a batch, loaded."""
        call = self._progress[key].call
        return BlockCall(call.block, self._loaded(call.args), self._loaded(call.kwargs))

    def _loaded(self, value: Any) -> Any:
        return value.load(self.device) if isinstance(value, CachedTensor) else map_structure(self._loaded, value)

    def run(self, module: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> Any:
        """The output of a block, in the precision that was asked for."""
        with mixed_precision(self.device, self.bf16):
            return module(*args, **kwargs)

    @torch.no_grad()
    def push(self, key: Key, module: nn.Module) -> CachedTensor:
        """Runs a block on the next call of a batch, so that the batch may advance. Returns the main output, as kept.

        Raises:
            NonFiniteError: The output holds NaN or infinity.
        """
        progress, call = self._progress[key], self.call(key)
        output = without_caches(self.run(module, call.args, call.kwargs))
        main = main_output(output)
        if not bool(torch.isfinite(main).all()):
            raise NonFiniteError(
                f"The block '{call.block}' of {self.label} gives NaN or infinity for batch {key[1]} of its calibration samples: "
                "check the samples and the weights, or turn off bf16."
            )
        kept = {id(main): self.cache.put(main.float(), rounded=True)}

        def keep(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return map_structure(keep, value)
            if id(value) not in kept and value.numel() >= CACHED_FROM:
                kept[id(value)] = self.cache.put(value)
            return kept.get(id(value), value)

        slot = call.block if self.reentry.keeps_all else self.reentry.list_of(call.block)
        progress.outputs[slot] = keep(output)
        progress.finished.add(call.block)
        progress.call = None
        return kept[id(main)]

    def final_output(self, key: Key, module: nn.Module) -> Any:
        """What a module gives in a forward in which every block is replaced by its recorded output: differentiable in the weights
        outside of the blocks. Asked for when all blocks are finished and before the batch advances to its end.

        Args:
            key (`tuple[int, int]`): The batch.
            module (`torch.nn.Module`): A part of the model, such as its backbone.
        """
        outputs = _Outputs(self._progress[key], self.reentry, self.device)
        with mixed_precision(self.device, self.bf16):
            return self.reentry.final_output(self._inputs(self.batches[key]), outputs, module)

    def drop(self, key: Key) -> None:
        """Forgets a batch."""
        self._progress.pop(key, None)

    # -- the check ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def check(self) -> None:
        """Compares re-entry with a plain forward on one sample, one block resident at a time.

        Raises:
            UnsupportedModelError: They differ, or the model cannot be run block by block at all.
        """
        key, batch = next(iter(self.batches.items()))
        one = Batch(_first_sample(batch), 1)
        trial = BlockRunner(self.label, self.model, self.read, {key: one}, ActivationCache(), self.device)
        with trial.outside_resident():
            expected = trial.reentry.plain_outputs(trial._inputs(one), trial.block_resident)
        count = 0
        while trial.advance():
            block = trial._progress[key].call.block
            with trial.block_resident(block) as module:
                found = trial.push(key, module).load()
            if block not in expected:
                raise UnsupportedModelError(f"{self.label} reaches the block '{block}' in re-entry only.")
            compare_outputs(self.label, block, found, expected[block].cpu())
            count += 1
        if count < len(expected):
            raise UnsupportedModelError(
                f"{self.label} runs {len(expected)} blocks, of which re-entry reaches {count}."
            )


def open_runner(
    label: str,
    model_class: type[PreTrainedModel],
    config: Any,
    read: Reader,
    batches: Mapping[Key, Batch],
    cache: ActivationCache,
    device: torch.device,
    bf16: bool,
) -> BlockRunner:
    """A [`BlockRunner`] with a shell of its own."""
    return BlockRunner(label, build_runnable_shell(model_class, config), read, batches, cache, device, bf16)


def run_to_the_end(runner: BlockRunner) -> None:
    """Takes every batch through all blocks and what is behind them."""
    while reached := runner.advance():
        block = min(reached.values(), key=runner.reentry.order.__getitem__)
        with runner.block_resident(block) as module:
            for key in [key for key, name in reached.items() if name == block]:
                runner.running = key
                runner.push(key, module)
            runner.running = None


@contextlib.contextmanager
def hooked(
    runner: BlockRunner, layers: Sequence[str], see: Callable[[str, Tensor, Tensor], Tensor | None]
) -> Iterator[None]:
    """Shows `see(name, inputs, output)` every call of the layers; what it returns, if anything, takes the output's place."""
    handles = []
    for name in layers:
        layer = runner.model.get_submodule(name)
        handles.append(layer.register_forward_hook(lambda module, args, output, name=name: see(name, args[0], output)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _is_hidden(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _first_sample(batch: Batch) -> dict[str, Tensor]:
    """The first sample of a batch, where all arguments have one row per sample."""
    if any(value.dim() == 0 or len(value) != batch.count for value in batch.inputs.values()):
        return batch.inputs
    return {name: value[:1] for name, value in batch.inputs.items()}
