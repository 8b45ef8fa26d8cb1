"""What a method is given: one parameter of every model that takes part in a merge."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..kinds import ParameterKind
from ..low_rank import Factors


PIECE = 1 << 17
"""How many entries of a parameter are merged at a time on a CPU: what one step reads, is still in the cache in the next."""

LARGE_PIECE = 1 << 24  # elsewhere launches cost more than memory

_DRAWS_PER_WORD = 8  # of 8 bits


def _key(seed: int, *words: str) -> int:
    """128 bits that depend on the seed and the words."""
    text = "\0".join((str(seed), *words))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=16).digest(), "little")


def keyed_generator(seed: int, *words: str) -> np.random.Generator:
    """A counter-based generator (Philox) that depends on the seed and the words, and on nothing else."""
    return np.random.Generator(np.random.Philox(key=_key(seed, *words)))


def _scattered(key: int, places: np.ndarray) -> np.ndarray:
    """A random number of 64 bits for each of some places (splitmix64, Steele et al. 2014): uint64."""
    bits = (places.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    bits += np.uint64(key & (2**64 - 1))
    bits ^= bits >> np.uint64(30)
    bits *= np.uint64(0xBF58476D1CE4E5B9)
    bits ^= bits >> np.uint64(27)
    bits *= np.uint64(0x94D049BB133111EB)
    bits ^= bits >> np.uint64(31)
    return bits


def difference(first: Tensor, second: Tensor, dtype: torch.dtype) -> Tensor:
    """x − y, computed in a dtype, as a new tensor."""
    if first.dtype == dtype and isinstance(first, Tensor):
        return first - second.to(dtype)
    return first.to(dtype).sub_(second.to(dtype))


@dataclass
class TensorGroup:
    """One parameter of every model that takes part, and what a method may know about it.

    Tensors are kept in their storage dtype and cast to float32 (float64 where they are stored so) one at a time on access:
    ask for one expert, use it, let it go.

    Args:
        name (`str`): The module name of the parameter.
        kind ([`ParameterKind`]): What it is.
        stored_base (`torch.Tensor`, *optional*): The base model's value as stored.
        stored_experts (`Sequence[torch.Tensor]`): The experts' values as stored, all of one shape.
        expert_names (`tuple[str]`): Their names.
        settings ([`MergeConfig`]): The method's settings, resolved for this parameter: plain values, and lists with one value
            per expert where a setting's scope is `"expert"`.
        seed (`int`): The recipe's seed.
        report (`dict`): What the method wants to say about this parameter in `merge_report.json`: numbers by name.
        offset (`int`): For a piece of a parameter: how many entries of the parameter come before it.
        foreseen (`Any`): For a piece of a parameter: what its method found for it ahead of its merge.
    """

    name: str
    kind: ParameterKind
    stored_base: Tensor | None
    stored_experts: Sequence[Tensor]
    expert_names: tuple[str, ...]
    settings: Any
    seed: int = 0
    report: dict[str, float] = field(default_factory=dict)
    offset: int = 0
    foreseen: Any = None
    _generators: dict[tuple[str, str], tuple[np.random.PCG64DXSM, int]] = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        return len(self.stored_experts)

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.stored_experts[0].device

    @property
    def shape(self) -> torch.Size:
        return self.stored_experts[0].shape

    @cached_property
    def dtype(self) -> torch.dtype:
        """The dtype of the arithmetic: float32, or float64 when some model is stored in it."""
        stored = [*self.stored_experts, *([] if self.stored_base is None else [self.stored_base])]
        return torch.float64 if any(tensor.dtype == torch.float64 for tensor in stored) else torch.float32

    @cached_property
    def base(self) -> Tensor | None:
        """The base model's value in the dtype of the arithmetic. Do not change it in place."""
        return None if self.stored_base is None else self.stored_base.to(self.dtype)

    def expert(self, index: int) -> Tensor:
        """Expert `index`'s value, in the dtype of the arithmetic. Do not change it in place."""
        return self.stored_experts[index].to(self.dtype)

    def new_expert(self, index: int) -> Tensor:
        """The same as a new tensor, free to be changed in place."""
        stored = self.stored_experts[index]
        return stored.to(self.dtype, copy=True) if isinstance(stored, Tensor) else stored.to(self.dtype)

    def experts(self) -> Iterator[Tensor]:
        """The experts' values one at a time."""
        for index in range(len(self)):
            yield self.expert(index)

    def task_vector(self, index: int) -> Tensor:
        """τ_i = θ_i − θ_0 as a new tensor, free to be changed in place."""
        return difference(self.stored_experts[index], self.base, self.dtype)

    def task_vectors(self) -> Iterator[Tensor]:
        """The task vectors one at a time."""
        for index in range(len(self)):
            yield self.task_vector(index)

    def release_experts(self) -> None:
        """Frees the experts' values; what is known without them, stays."""
        self.stored_experts = [stored.to("meta") for stored in self.stored_experts]
        self.__dict__.pop("base", None)

    def mean(self) -> Tensor:
        """The plain mean of the experts, as a new tensor."""
        total = self.new_expert(0)
        for index in range(1, len(self)):
            total += self.expert(index)
        return total.div_(len(self))

    @property
    def piece_size(self) -> int:
        """How many entries are merged at a time where the parameter is."""
        return PIECE if self.device.type == "cpu" else LARGE_PIECE

    # -- piece by piece -------------------------------------------------------------------------------------------

    def pieces(self, unit: int | None = 1) -> Iterator[TensorGroup]:
        """The parameter in pieces, in the order of its entries, as groups of flat tensors that share the stored memory.

        The pieces are the same on every machine and for every number of threads.

        Args:
            unit (`int`, *optional*): Their sizes are multiples of this: 1 where every entry is on its own, the length of a row where
                rows belong together. `None`: one piece in the parameter's own shape.
        """
        if unit is None:
            yield replace(self, report={})
            return
        size = self.shape.numel()
        step = max(self.piece_size // unit, 1) * unit
        base = None if self.stored_base is None else self.stored_base.reshape(-1)
        experts = [stored.reshape(-1) for stored in self.stored_experts]
        for start in range(0, max(size, 1), step):
            part = slice(start, start + step)
            yield replace(
                self,
                stored_base=None if base is None else base[part],
                stored_experts=[expert[part] for expert in experts],
                report={},
                offset=self.offset + start,
            )

    # -- random numbers -------------------------------------------------------------------------------------------

    def random(self, index: int, purpose: str = "mask") -> np.random.Generator:
        """A counter-based generator (Philox) keyed by (seed, parameter name, expert name, purpose): the order in which
        parameters are merged, threads, ranks and devices do not change what it draws."""
        return keyed_generator(self.seed, self.name, self.expert_names[index], purpose)

    def draws(self, index: int, purpose: str = "mask") -> np.ndarray:
        """One uniform random number for each entry: `uint8`, flat. An entry's number depends on its place in the parameter, and
        not on the piece that it is in.

        They come from PCG64-DXSM (O'Neill 2014), keyed as in [`~TensorGroup.random`], which makes its numbers from any place on, twice as
        fast as Philox.
        """
        first, skipped = divmod(self.offset, _DRAWS_PER_WORD)
        count = skipped + self.shape.numel()
        words = -(-count // _DRAWS_PER_WORD)
        key = self.expert_names[index], purpose
        generator, at = self._generators.pop(key, None) or (np.random.PCG64DXSM(self._key(index, purpose)), 0)
        if at != first:
            generator.advance(first - at)
        drawn = generator.random_raw(words)
        self._generators[key] = generator, first + words
        return drawn.astype("<u8", copy=False).view(np.uint8)[skipped:count]

    def _key(self, index: int, purpose: str) -> int:
        return _key(self.seed, self.name, self.expert_names[index], purpose)

    def keep_mask(self, index: int, probability: float) -> Tensor:
        """A Bernoulli mask (bool, the shape of the group) in which each entry is kept with a probability, to 32 bits.

        Args:
            index (`int`): The expert that the mask is for.
            probability (`float`): In [0, 1].
        """
        if probability == 1.0:
            return torch.ones(self.shape, dtype=torch.bool, device=self.device)
        high, low = divmod(min(round(probability * 2**32), 2**32 - 1), 1 << 24)
        draws = self.draws(index)
        kept = draws < np.uint8(high)
        if low:
            places = np.flatnonzero(draws == high)  # one of 256 is not decided by 8 bits
            kept[places] = self.more_bits(index, places) >> np.uint64(40) < low
        return torch.from_numpy(kept).view(self.shape).to(self.device)

    def more_bits(self, index: int, places: np.ndarray, purpose: str = "mask") -> np.ndarray:
        """64 random bits beside those of [`~TensorGroup.draws`] for the entries at some places (int64): uint64."""
        return _scattered(self._key(index, f"{purpose}, low bits"), places + self.offset)


@dataclass
class LowRankGroup:
    """The task vectors of one linear layer as factors T_i = L_i R_i, for methods that never form the dense matrix.

    Args:
        name (`str`): The module name of the parameter.
        kind ([`ParameterKind`]): What it is.
        experts (`list[Factors]`): L_i (out, r_i) and R_i (r_i, in), whatever the parameter is stored as, in float32 or float64.
        expert_names (`tuple[str]`): Their names.
        settings ([`MergeConfig`]): The method's settings, resolved for this parameter.
        seed (`int`): The recipe's seed.
        report (`dict`): As in [`TensorGroup`].
    """

    name: str
    kind: ParameterKind
    experts: list[Factors]
    expert_names: tuple[str, ...]
    settings: Any
    seed: int = 0
    report: dict[str, float] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.experts)

    @property
    def shape(self) -> torch.Size:
        """(out, in)."""
        return self.experts[0].shape
