"""The contracts between a merge method and the engines that run it.

A method says *what* is computed. It never opens a file, never sees a device map and never asks an architecture's name:
it is given groups of tensors that belong together, and returns tensors.

- [`TensorMethod`]: data-free; parameters are independent of each other; runs from disk to disk at any size.
- [`ElementwiseMethod`]: a `TensorMethod` whose entries are independent of each other; computed in pieces that stay in the cache.
- [`LinearMethod`]: a `TensorMethod` defined on the weights of linear layers, given as matrices (out, in).
- `BlockMethod` (in `block_base.py`): needs the activations of calibration samples; one block of the model is there at a time.
- `ModelMethod` (in `model_base.py`): needs gradients through all layers; the merged model is in memory.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from ..kinds import LINEAR_KINDS, ParameterKind
from ..low_rank import Factors, concatenated
from ..threads import one_thread
from .groups import PIECE, LowRankGroup, TensorGroup


FLOAT32 = 4
"""Bytes of a number."""


class MergeMethod:
    """What every method declares, so that the library picks the engine and refuses early.

    **Attributes**:
        - **requires_base** (`bool`) -- The method works on task vectors.
        - **requires_data** (`bool`) -- The method needs calibration samples.
        - **merges_buffers** (`bool`) -- The method also suits statistics such as running means; otherwise they are averaged.
        - **min_experts**, **max_experts** (`int`, *optional*) -- How many experts the method is defined for.
    """

    requires_base: ClassVar[bool] = False
    requires_data: ClassVar[bool] = False
    merges_buffers: ClassVar[bool] = False
    min_experts: ClassVar[int] = 1
    max_experts: ClassVar[int | None] = None

    @classmethod
    def needs_data(cls, settings: Any) -> bool:
        """Whether the method needs calibration samples under a recipe.

        Args:
            settings ([`MergeConfig`]): The recipe.
        """
        return cls.requires_data

    @classmethod
    def refusals(cls, name: str, experts: int, has_base: bool) -> list[str]:
        """Why the method cannot merge so many models, as sentences; empty when it can.

        Args:
            name (`str`): The method's registered name.
            experts (`int`): The number of experts.
            has_base (`bool`): Whether there is a base model.
        """
        refusals = []
        if cls.requires_base and not has_base:
            refusals.append(
                f"The method '{name}' works on task vectors and needs the base model: pass base_model=... (`base_model` in a recipe, --base on the command line)."
            )
        if experts < cls.min_experts:
            refusals.append(f"The method '{name}' needs at least {cls.min_experts} experts, got {experts}.")
        if cls.max_experts is not None and experts > cls.max_experts:
            refusals.append(f"The method '{name}' merges at most {cls.max_experts} expert(s), got {experts}.")
        return refusals


class Step(NamedTuple):
    """A part of the computation of one parameter.

    Args:
        group ([`TensorGroup`]): What is merged: the whole parameter, or a piece of it.
        merge (`Callable`): Returns its value, of shape `group.shape`, in the dtype of the arithmetic.
        places (`torch.Tensor`, *optional*): Where the value is given for some entries of the group only, which entries: int64, flat.
    """

    group: TensorGroup
    merge: Callable[[], Tensor]
    places: Tensor | None = None

    def put(self, value: Tensor, parameter: Tensor, offset: int = 0) -> None:
        """Writes the value into the parameter.

        Args:
            value (`torch.Tensor`): What `merge` returned.
            parameter (`torch.Tensor`): All entries, flat.
            offset (`int`): The offset of the first of them.
        """
        start = self.group.offset - offset
        if self.places is None:
            parameter[start : start + value.numel()].copy_(value.reshape(-1))
        else:
            parameter[(self.places + start).to(parameter.device)] = value.to(parameter.device, parameter.dtype)


class TensorMethod(MergeMethod):
    """A data-free method: parameter by parameter.

    A subclass implements [`~TensorMethod.merge`] and takes every setting from `group.settings`. One instance serves the whole
    merge, in several threads: keep nothing on `self` but what `observe` gathers. A parameter that is too large for the memory of its
    device is merged once more on the CPU.
    """

    kinds: ClassVar[frozenset[ParameterKind] | None] = None
    """The kinds of parameters that the method is defined on; `None` for all. The others go to [`~TensorMethod.merge_other`]."""

    others_by_entry: ClassVar[bool] = True
    """Whether [`~TensorMethod.merge_other`] works entry by entry, and so piece by piece. A subclass with one of its own says so."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "merge_other" in vars(cls) and "others_by_entry" not in vars(cls):
            cls.others_by_entry = False

    def __call__(self, group: TensorGroup) -> Tensor:
        """Merges one parameter by the rule for its kind. Returns a tensor of the parameter's shape, in float32."""
        if self.requires_base and group.base is None:
            return group.mean()
        if self.kinds is not None and group.kind not in self.kinds:
            return self.merge_other(group)
        return self.merge(group)

    def merge(self, group: TensorGroup) -> Tensor:
        """The merged parameter, of shape `group.shape`, in the dtype of the arithmetic."""
        raise NotImplementedError(f"{type(self).__name__} does not implement merge")

    def merge_other(self, group: TensorGroup) -> Tensor:
        """The merged value of a parameter that the method is not defined on: the mean of the experts."""
        return group.mean()

    def steps(self, group: TensorGroup) -> Iterator[Step]:
        """The computation of one parameter in steps, which together make all of it. A step is carried out before the next is asked
        for; a later one may correct single entries."""
        for piece in group.pieces() if self.works_in_pieces(group.kind) else [group]:
            yield Step(piece, partial(self, piece))

    @classmethod
    def works_in_pieces(cls, kind: ParameterKind) -> bool:
        """Whether parameters of a kind are merged in many short operations.

        Args:
            kind ([`ParameterKind`]): The kind.
        """
        return cls.others_by_entry and cls.kinds is not None and kind not in cls.kinds

    @classmethod
    def looks_again(cls, settings: Any) -> bool:
        """Whether every piece is asked for several times, so that small parameters are better held than read again.

        Args:
            settings ([`MergeConfig`]): One parameter's settings.
        """
        return False

    # -- what a merge takes ---------------------------------------------------------------------------------------

    has_spare_thread: bool = True
    """Whether the method may use a thread beside the one that calls it. The engine says so."""

    working_copies: ClassVar[tuple[float, float]] = (4.0, 1.0)
    """How many float32 tensors of the parameter's size are held while it is merged, beside the stored tensors and the rounded
    result: so many, and so many more for each expert. For the plan's estimate of memory: measure it."""

    @classmethod
    def working_memory(cls, kind: ParameterKind, shape: Sequence[int], experts: int, settings: Any) -> int:
        """Bytes that are held while one parameter is merged, beside the stored tensors and the rounded result.

        Args:
            kind ([`ParameterKind`]): What the parameter is.
            shape (`Sequence[int]`): Its shape.
            experts (`int`): The number of experts.
            settings ([`MergeConfig`]): Its settings.
        """
        if cls.kinds is not None and kind not in cls.kinds:
            size = min(math.prod(shape), PIECE) if cls.others_by_entry else math.prod(shape)
            return 4 * FLOAT32 * size  # base, sum, one task vector, the distance to the base model
        fixed, each = cls.working_copies
        return int(FLOAT32 * math.prod(shape) * (fixed + each * experts))

    # -- experts that are adapters --------------------------------------------------------------------------------

    changes_only: ClassVar[bool] = False
    """Whether the result is θ_0 plus a function of the task vectors alone, so that adapters merge without the base model's
    weights."""

    @classmethod
    def works_on_changes(cls, settings: Any) -> bool:
        """`changes_only`, where it depends on the settings.

        Args:
            settings ([`MergeConfig`]): The recipe, or one parameter's settings.
        """
        return cls.changes_only

    def merge_low_rank(self, group: LowRankGroup) -> Factors | None:
        """The merged task vector M = L R of one linear layer whose experts are given as factors; `None` where these settings
        need the dense matrix, which is then formed for this parameter and given to [`~TensorMethod.merge`]."""
        return None

    @classmethod
    def merged_rank(cls, ranks: Sequence[int], settings: Any) -> int | None:
        """The largest rank that the merged task vector of experts of these ranks can have; `None` where it is not bounded by
        theirs.

        Args:
            ranks (`Sequence[int]`): r_i.
            settings ([`MergeConfig`]): One parameter's settings.
        """
        return None

    # -- methods that look at the whole model before they merge it ------------------------------------------------

    def rounds(self, settings: Any) -> int:
        """How many times the engine has to show every parameter to [`~TensorMethod.observe`] before merging."""
        return 0

    def observe(self, group: TensorGroup, round: int) -> Any:
        """Looks at one parameter. What it returns is handed to [`~TensorMethod.conclude`]; it must not depend on the order."""
        return None

    def conclude(self, observations: Iterator[tuple[str, Any]], round: int, settings: Any) -> None:
        """Takes the observations of one round, `(parameter name, observation)`, and keeps what the next step needs."""

    def noticed(self) -> Any:
        """What [`~TensorMethod.remarks`] are made of, for other ranks, which merge other parameters; it can be pickled."""
        return None

    def notice(self, noticed: Any) -> None:
        """Takes what a rank noticed, also this one itself. Some parameters may have been merged on two ranks."""

    def remarks(self) -> list[str]:
        """What the method noticed over the whole merge and the user should know. Called once, at the end."""
        return []


class ElementwiseMethod(TensorMethod):
    """A method in which an entry of the result depends on the same entry of the models, or on the same row of them, and on a few
    numbers that are found beforehand.

    It is computed piece by piece: what one operation leaves is still in the cache for the next, and no intermediate is as large as
    the parameter. A subclass implements [`~ElementwiseMethod.merge_piece`], and
    [`~ElementwiseMethod.prepare`] where it needs to know something of the whole parameter.
    """

    working_copies = (0.0, 0.0)

    @classmethod
    def working_memory(cls, kind: ParameterKind, shape: Sequence[int], experts: int, settings: Any) -> int:
        piece = FLOAT32 * cls.entries_at_once(kind, shape, settings) * (experts + 6)
        return piece + super().working_memory(kind, shape, experts, settings)

    @classmethod
    def entries_at_once(cls, kind: ParameterKind, shape: Sequence[int], settings: Any) -> int:
        """How large a piece of a parameter is at most, see [`~ElementwiseMethod.unit`]."""
        return min(math.prod(shape), PIECE)

    @classmethod
    def works_in_pieces(cls, kind: ParameterKind) -> bool:
        return cls.kinds is None or kind in cls.kinds or super().works_in_pieces(kind)

    def unit(self, group: TensorGroup) -> int | None:
        """How many entries belong together, see [`~TensorGroup.pieces`]."""
        return 1

    def prepare(self, group: TensorGroup) -> Any:
        """What [`~ElementwiseMethod.merge_piece`] has to know of the whole parameter."""
        return None

    def foresee(self, piece: TensorGroup, prepared: Any) -> Any:
        """What `piece.foreseen` is: long operations on one piece, which another thread does while the piece before it is merged, where
        there is a processor for it."""
        return None

    def merge_piece(self, piece: TensorGroup, prepared: Any) -> Tensor:
        """The merged entries of a piece, of shape `piece.shape`, a new tensor in the dtype of the arithmetic."""
        raise NotImplementedError(f"{type(self).__name__} does not implement merge_piece")

    def correct(self, piece: TensorGroup, prepared: Any) -> tuple[Tensor, Tensor] | None:
        """The places (int64) and values of entries of a piece that all pieces had to be seen for."""
        return None

    def steps(self, group: TensorGroup) -> Iterator[Step]:
        if self.requires_base and group.stored_base is None:
            yield from mean_steps(group)
        elif self.kinds is not None and group.kind not in self.kinds:
            yield from super().steps(group)
        else:
            yield from self._steps(group)

    def _steps(self, group: TensorGroup) -> Iterator[Step]:
        prepared = self.prepare(group)
        for piece in self.foreseen_pieces(group, prepared):
            yield Step(piece, partial(self.merge_piece, piece, prepared))
        if type(self).correct is ElementwiseMethod.correct:
            return
        for piece in group.pieces(self.unit(group)):
            corrected = self.correct(piece, prepared)
            if corrected is not None:
                places, values = corrected
                yield Step(piece, lambda values=values: values, places)

    def foreseen_pieces(self, group: TensorGroup, prepared: Any) -> Iterator[TensorGroup]:
        """The pieces of a parameter with what [`~ElementwiseMethod.foresee`] finds for each."""
        pieces = group.pieces(self.unit(group))
        if type(self).foresee is ElementwiseMethod.foresee or not self.has_spare_thread:
            yield from pieces
            return
        with ThreadPoolExecutor(1, "hf_merge-foresee") as thread:
            ahead: deque[tuple[TensorGroup, Future]] = deque()
            for piece in pieces:
                ahead.append((piece, thread.submit(self.foresee, piece, prepared)))
                if len(ahead) > _AHEAD:
                    yield _with_foreseen(*ahead.popleft())
            while ahead:
                yield _with_foreseen(*ahead.popleft())

    def merge(self, group: TensorGroup) -> Tensor:
        with one_thread() if group.device.type == "cpu" else nullcontext():
            return whole(group, self._steps(group))


_AHEAD = 2  # pieces


def _with_foreseen(piece: TensorGroup, found: Future) -> TensorGroup:
    piece.foreseen = found.result()
    return piece


def mean_steps(group: TensorGroup) -> Iterator[Step]:
    """The plain mean of the experts, piece by piece."""
    return (Step(piece, piece.mean) for piece in group.pieces())


def whole(group: TensorGroup, steps: Iterable[Step]) -> Tensor:
    """The parameter that the steps make, of shape `group.shape`."""
    merged = torch.empty(group.shape, dtype=group.dtype, device=group.device)
    for step in steps:
        step.put(step.merge(), merged.view(-1), group.offset)
    return merged


@dataclass
class TaskMatrices(Sequence):
    """The task vectors T_i of one linear layer as matrices (out, in), made on access, one at a time.

    Args:
        group ([`TensorGroup`]): The parameter.
        index (`int`, *optional*): Which expert of a mixture, for parameters that stack several linear layers.
        transposed (`bool`): Whether the parameter is stored as (in, out).
    """

    group: TensorGroup
    index: int | None = None
    transposed: bool = False

    def __len__(self) -> int:
        return len(self.group)

    def __getitem__(self, expert: int) -> Tensor:
        """T_i in the dtype of the arithmetic, a new tensor."""
        return self._matrix(self.group.stored_experts[expert]) - self.base

    @cached_property
    def base(self) -> Tensor:
        """W_0, shape (out, in). Do not change it in place."""
        return self._matrix(self.group.stored_base)

    @property
    def shape(self) -> torch.Size:
        """(out, in)."""
        return self.base.shape

    def _matrix(self, stored: Tensor) -> Tensor:
        tensor = stored if self.index is None else stored[self.index]
        return (tensor.mT if self.transposed else tensor).to(self.group.dtype)


class LinearMethod(TensorMethod):
    """A method defined on linear layers y = W x.

    The base class brings every stored form (transposed weights, the experts of a mixture) to matrices of shape (out, in) and
    back; a subclass implements [`~LinearMethod.merge_matrix`]. Parameters of other kinds follow the setting
    `other_parameters`.
    """

    requires_base = True
    kinds = LINEAR_KINDS
    others_by_entry = True
    working_copies = (10.0, 5.0)
    square_copies: ClassVar[float] = 20.0
    """What [`~TensorMethod.working_copies`] lacks: so many square matrices of the smaller dimension."""

    @classmethod
    def working_memory(cls, kind: ParameterKind, shape: Sequence[int], experts: int, settings: Any) -> int:
        if kind not in cls.kinds:
            return super().working_memory(kind, shape, experts, settings)
        one = super().working_memory(kind, shape[-2:], experts, settings)
        one += int(FLOAT32 * cls.square_copies * min(shape[-2:]) ** 2)
        return one + (2 * FLOAT32 * math.prod(shape) if len(shape) > 2 else 0)  # all merged matrices, then stacked

    @classmethod
    def needs_factors(cls, settings: Any) -> bool:
        """Whether the settings mean something only where every task vector is given as factors."""
        return False

    def merge(self, group: TensorGroup) -> Tensor:
        transposed = group.kind in (ParameterKind.TRANSPOSED_LINEAR, ParameterKind.TRANSPOSED_EXPERT_LINEAR)
        if group.kind in (ParameterKind.LINEAR, ParameterKind.TRANSPOSED_LINEAR):
            return self._merge_one(TaskMatrices(group, None, transposed))
        return torch.stack([self._merge_one(TaskMatrices(group, e, transposed)) for e in range(group.shape[0])])

    def _merge_one(self, matrices: TaskMatrices) -> Tensor:
        merged = matrices.base + self.merge_matrix(matrices, matrices.group)
        return merged.mT.contiguous() if matrices.transposed else merged

    def merge_matrix(self, task_matrices: TaskMatrices, group: TensorGroup) -> Tensor:
        """The merged task vector M of one linear layer, shape (out, in); the result is W_0 + M."""
        raise NotImplementedError(f"{type(self).__name__} does not implement merge_matrix")

    def merge_low_rank(self, group: LowRankGroup) -> Factors | None:
        if group.kind in self.kinds:
            return self.merge_factors(group)
        policy = group.settings.other_parameters
        if policy == "base":
            return Factors.zero(group.experts[0])
        factor = 1 / len(group) if policy == "mean" else group.settings.other_scaling
        return concatenated(group.experts, [factor] * len(group))

    def merge_factors(self, group: LowRankGroup) -> Factors | None:
        """[`~LinearMethod.merge_matrix`] for task vectors that are given as factors."""
        return None

    def merge_other(self, group: TensorGroup) -> Tensor:
        policy = group.settings.other_parameters
        if policy == "base":
            return group.base.clone()
        if policy == "mean":
            return group.mean()
        total = group.base.clone()
        for vector in group.task_vectors():
            total.add_(vector, alpha=group.settings.other_scaling)
        return total
