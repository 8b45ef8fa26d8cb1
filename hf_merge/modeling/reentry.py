"""Running a model block by block, with the model's own forward as the driver.

For the next block of a batch the whole forward is run again, with every finished block replaced by its recorded output; it
stops at the first block that has none. Masks, rotary tables, position biases, cross attention and whatever else a forward
hands to its blocks are hence right by construction, for each block, and nothing has to be known about an architecture. A
run costs what lies outside the blocks: embeddings and masks.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from ..errors import UnsupportedModelError
from .blocks import find_block_lists
from .shell import output_embeddings


if TYPE_CHECKING:
    from transformers import PreTrainedModel


CHECK_TOLERANCE = 1e-3
"""Largest deviation of re-entry from a plain forward, relative to the largest activation. Re-entry repeats the same
operations, so that real deviations are far larger and rounding is far smaller."""


@dataclass(frozen=True)
class BlockCall:
    """What a forward hands to a block.

    Args:
        block (`str`): The block's module name.
        args (`tuple`), kwargs (`dict`): The arguments, without key-value caches.
    """

    block: str
    args: tuple
    kwargs: dict[str, Any]


class _Stop(BaseException):
    """Leaves a model's forward; not an `Exception`, so that nothing on the way catches it."""


class Reentry:
    """Finds the next call of a block for a batch.

    Args:
        model ([`~transformers.PreTrainedModel`]): In evaluation mode. Its blocks may be on the meta device; what lies outside
            of them must not be.

    Raises:
        UnsupportedModelError: The model has no blocks, or its blocks exchange more than their inputs and outputs.
    """

    def __init__(self, model: PreTrainedModel):
        self.model = model
        self.lists = {name: list(blocks) for name, blocks in find_block_lists(model).items()}
        self.blocks = {f"{name}.{i}": block for name, blocks in self.lists.items() for i, block in enumerate(blocks)}
        self.order = {name: position for position, name in enumerate(self.blocks)}
        self._accepts_use_cache = "use_cache" in inspect.signature(model.forward).parameters
        # Models made of several (LLaVA) read states of a finished tower other than the last one.
        self.keeps_all = bool(getattr(type(model.config), "sub_configs", None)) and len(self.lists) > 1
        self._refuse()

    def _refuse(self) -> None:
        name = type(self.model).__name__
        if not self.blocks:
            raise UnsupportedModelError(
                f"{name} has no list of blocks, so it cannot be merged block by block: use a method without data, or one "
                "that trains the whole model."
            )
        if getattr(self.model.config.get_text_config(), "num_kv_shared_layers", 0):
            raise UnsupportedModelError(
                f"{name} shares keys and values between its blocks (num_kv_shared_layers > 0), so its blocks cannot be run "
                "one at a time: use a method without data, or one that trains the whole model."
            )

    def _called_twice(self, block: str) -> UnsupportedModelError:
        return UnsupportedModelError(
            f"{type(self.model).__name__} calls its block '{block}' more than once in a forward (shared layers), so its blocks "
            "cannot be merged one at a time: use a method without data, or one that trains the whole model."
        )

    def list_of(self, block: str) -> str:
        """The list that a block is in."""
        return block.rpartition(".")[0]

    def next_call(self, inputs: Mapping[str, Any], outputs: Mapping[str, Any]) -> BlockCall | None:
        """Runs the forward up to the first block without an output.

        Args:
            inputs (`Mapping`): The arguments of the model's forward.
            outputs (`Mapping[str, Any]`): The outputs of the finished blocks for these inputs.

        Returns:
            [`BlockCall`] or `None`: `None` when the forward reaches its end.

        Raises:
            UnsupportedModelError: A block is called twice in one forward.
        """
        reached: list[BlockCall] = []
        called: set[str] = set()

        def stand_in(name: str) -> Callable:
            def forward(*args, **kwargs):
                if name in called:
                    raise self._called_twice(name)
                called.add(name)
                if name in outputs:
                    return outputs[name]
                reached.append(BlockCall(name, without_caches(args), _block_kwargs(kwargs)))
                raise _Stop

            return forward

        self._run(inputs, lambda name, block: stand_in(name))
        return reached[0] if reached else None

    def final_output(self, inputs: Mapping[str, Any], outputs: Mapping[str, Any], module: nn.Module) -> Any:
        """The output of a module in a forward where every block is replaced by its recorded output.

        Args:
            inputs (`Mapping`): The arguments of the model's forward.
            outputs (`Mapping[str, Any]`): The outputs of all blocks for these inputs.
            module (`torch.nn.Module`): A part of the model that is outside of its blocks.
        """
        found: list[Any] = []

        def stop(owner: nn.Module, args: tuple, output: Any) -> None:
            found.append(output)
            raise _Stop

        handle = module.register_forward_hook(stop)
        try:
            self._run(inputs, lambda name, block: lambda *args, **kwargs: outputs[name])
        finally:
            handle.remove()
        return found[0]

    def plain_outputs(self, inputs: Mapping[str, Any], resident: Callable[[str], Any]) -> dict[str, Tensor]:
        """The main output of every block in one plain forward.

        Args:
            inputs (`Mapping`): The arguments of the model's forward.
            resident (`Callable`): Gives a context manager in which a block's weights are there.
        """
        outputs: dict[str, Tensor] = {}

        def recording(name: str, forward: Callable) -> Callable:
            def run(*args, **kwargs):
                if name in outputs:
                    raise self._called_twice(name)
                with resident(name):
                    output = forward(*args, **kwargs)
                outputs[name] = main_output(output).detach()
                return output

            return run

        self._run(inputs, lambda name, block: recording(name, block.forward))
        return outputs

    def _run(self, inputs: Mapping[str, Any], replacement: Callable[[str, nn.Module], Callable]) -> None:
        """One forward with the blocks' own forwards replaced, up to the output embeddings, whose weights may be absent."""

        def stop(*args, **kwargs):
            raise _Stop

        with ExitStack() as stack:
            for name, block in self.blocks.items():
                stack.enter_context(_replaced_forward(block, replacement(name, block)))
            head = output_embeddings(self.model)
            if head is not None:
                stack.enter_context(_replaced_forward(head, stop))
            try:
                self.model(**self._arguments(inputs))
            except _Stop:
                pass

    def _arguments(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        return {**inputs, "use_cache": False} if self._accepts_use_cache else dict(inputs)


@contextmanager
def _replaced_forward(module: nn.Module, forward: Callable) -> Iterator[None]:
    previous = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if previous is None:
            del module.forward
        else:
            module.forward = previous


def _block_kwargs(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    return {key: False if key == "use_cache" else without_caches(value) for key, value in kwargs.items()}


def without_caches(value: Any) -> Any:
    """`value` with every key-value cache in it replaced by `None`: a cache is shared by reference, and running a block a
    second time would append to it."""
    if isinstance(value, Cache) or type(value).__name__.endswith("Cache"):
        return None
    return map_structure(without_caches, value)


def map_structure(function: Callable[[Any], Any], value: Any) -> Any:
    """Applies `function` to the items of tuples, lists and dictionaries; other values are returned as they are."""
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(function, value))
    if isinstance(value, (tuple, list)):
        return type(value)(map(function, value))
    if isinstance(value, dict):
        return type(value)((key, function(item)) for key, item in value.items())
    return value


def main_output(output: Any) -> Tensor:
    """The hidden states in the output of a block: the output itself, or its first tensor."""
    if isinstance(output, Tensor):
        return output
    values = output.values() if isinstance(output, Mapping) else output
    return next(value for value in values if isinstance(value, Tensor))


def compare_outputs(model: str, block: str, found: Tensor, expected: Tensor) -> None:
    """Raises [`UnsupportedModelError`] when a block run by re-entry gives something else than in a plain forward."""
    if found.shape == expected.shape:
        scale = expected.abs().max().clamp_min(1e-12)
        deviation = float((found - expected).abs().max() / scale)
        if deviation <= CHECK_TOLERANCE or not torch.isfinite(expected).all():
            return
        difference = f"by {deviation:.1e} of its largest value"
    else:
        difference = f"in shape, {tuple(found.shape)} against {tuple(expected.shape)}"
    raise UnsupportedModelError(
        f"{model} cannot be run block by block: the output of '{block}' differs from that of a plain forward {difference}. "
        "Its blocks probably exchange more than inputs and outputs: use a method without data, or one that trains the whole "
        "model."
    )
