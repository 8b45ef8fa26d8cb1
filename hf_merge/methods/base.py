"""The contracts between a merge method and the engines that run it.

A method says *what* is computed. It never opens a file, never sees a device map and never asks an architecture's name:
it is given groups of tensors that belong together, and returns tensors.

- [`TensorMethod`]: data-free; parameters are independent of each other; runs from disk to disk at any size.
- [`LinearMethod`]: a `TensorMethod` defined on the weights of linear layers, given as matrices (out, in).
- `BlockMethod` (in `block_base.py`): needs the activations of calibration samples; one block of the model is there at a time.
- `ModelMethod` (in `model_base.py`): needs gradients through all layers; the merged model is in memory.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ..kinds import LINEAR_KINDS, ParameterKind
from ..low_rank import Factors, concatenated


def keyed_generator(seed: int, *words: str) -> np.random.Generator:
    """A counter-based generator (Philox) that depends on the seed and the words, and on nothing else."""
    text = "\0".join((str(seed), *words))
    key = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=16).digest(), "little")
    return np.random.Generator(np.random.Philox(key=key))


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
    """

    name: str
    kind: ParameterKind
    stored_base: Tensor | None
    stored_experts: Sequence[Tensor]
    expert_names: tuple[str, ...]
    settings: Any
    seed: int = 0
    report: dict[str, float] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.stored_experts)

    @property
    def shape(self) -> torch.Size:
        return self.stored_experts[0].shape

    @property
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

    def experts(self) -> Iterator[Tensor]:
        """The experts' values one at a time."""
        for index in range(len(self)):
            yield self.expert(index)

    def task_vector(self, index: int) -> Tensor:
        """τ_i = θ_i − θ_0 as a new tensor, free to be changed in place."""
        return self.expert(index) - self.base

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
        total = torch.zeros(self.shape, dtype=self.dtype, device=self.stored_experts[0].device)
        for expert in self.experts():
            total += expert
        return total.div_(len(self))

    def random(self, index: int, purpose: str = "mask") -> np.random.Generator:
        """A counter-based generator (Philox) keyed by (seed, parameter name, expert name, purpose): the order in which
        parameters are merged, threads, ranks and devices do not change what it draws."""
        return keyed_generator(self.seed, self.name, self.expert_names[index], purpose)

    def keep_mask(self, index: int, probability: float | Tensor) -> Tensor:
        """A Bernoulli mask (bool, the parameter's shape) in which each entry is kept with `probability`.

        Args:
            index (`int`): The expert that the mask is for.
            probability (`float` or `torch.Tensor`): In [0, 1], one for all entries or one per entry.
        """
        device = self.stored_experts[index].device
        uniform = self.random(index).random(self.shape, dtype=np.float32)
        drawn = torch.from_numpy(uniform).to(device)
        return drawn < probability


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


class TensorMethod(MergeMethod):
    """A data-free method: parameter by parameter.

    A subclass implements [`~TensorMethod.merge`] and takes every setting from `group.settings`. One instance serves the whole
    merge, in several threads: keep nothing on `self` but what `observe` gathers.
    """

    kinds: ClassVar[frozenset[ParameterKind] | None] = None
    """The kinds of parameters that the method is defined on; `None` for all. The others go to [`~TensorMethod.merge_other`]."""

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

    def remarks(self) -> list[str]:
        """What the method noticed over the whole merge and the user should know. Called once, at the end."""
        return []


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
