"""A model under another vocabulary, as a source for a merge: its embeddings and output layers have one row for each token of the
result, found by the token. Rows of tokens that the model does not know come from the other models.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..checkpoints.names import ConversionGroup, NameMap
from ..checkpoints.source import ModelSource
from ..checkpoints.storage import TensorInfo
from .derived import DerivedSource


if TYPE_CHECKING:
    from transformers import GenerationConfig, PretrainedConfig


@dataclass
class TokenRows:
    """For each row of the result, the row of every model that it comes from. V is the number of rows of the result, S of models.

    Args:
        sources (`Sequence[ModelSource]`): The models.
        base (`int`, *optional*): Which of them is the base model.
        own (`np.ndarray`): (S, V) int64: the row that the model itself has for the token, -1 where it has none.
        model (`np.ndarray`): (V,) int64: the model whose row is taken where one is missing; -1 for the usual rule: the base
            model's where it has one, else the mean over the models that have one.
        row (`np.ndarray`): (V,) int64: that model's row.
        forced (`np.ndarray`): (V,) bool: the rule also holds for models that have a row.
        zero (`np.ndarray`): (V,) bool: a missing row is zero.
        padding (`np.ndarray`): (V,) bool: no token and no model's row: each model gets the mean of its rows.
        keep (`Any`): What has to live as long, such as a temporary folder.
    """

    sources: Sequence[ModelSource]
    base: int | None
    own: np.ndarray
    model: np.ndarray
    row: np.ndarray
    forced: np.ndarray
    zero: np.ndarray
    padding: np.ndarray
    keep: Any = None
    _lock: Any = field(default_factory=threading.Lock, repr=False)
    _last: tuple[str, Tensor, np.ndarray] | None = field(default=None, repr=False)

    @property
    def count(self) -> int:
        """V."""
        return self.own.shape[1]

    def fingerprint(self) -> str:
        """Identifies the rows, wherever the tokenizers' files lie."""
        digest = hashlib.sha256()
        for table in (self.own, self.model, self.row, self.forced, self.zero, self.padding):
            digest.update(f"{table.shape} {table.dtype}".encode() + np.ascontiguousarray(table).tobytes())
        return digest.hexdigest()

    @cached_property
    def shared(self) -> np.ndarray:
        """The rows that some model takes from others, ascending."""
        return np.flatnonzero((self.forced | (self.own < 0).any(0)) & ~self.padding)

    def is_identity(self, index: int, size: int) -> bool:
        """Whether model `index`, with `size` rows, is the same before and after."""
        return size == self.count and not self.forced.any() and np.array_equal(self.own[index], np.arange(size))

    def apply(self, index: int, stored: Tensor, axis: int, canonical: str) -> Tensor:
        """The rows of model `index` for the result.

        Args:
            index (`int`): The model.
            stored (`torch.Tensor`): One of its parameters.
            axis (`int`): The axis of the vocabulary.
            canonical (`str`): The canonical name of the parameter.
        """
        rows = stored.movedim(axis, 0)[torch.from_numpy(self.own[index].clip(0))]
        taken = self.forced[self.shared] | (self.own[index, self.shared] < 0)
        unknown = self.padding.copy()
        if taken.any():
            values, orphans = self._shared_rows(canonical)
            unknown[self.shared[taken & orphans]] = True
            values = values[torch.from_numpy(taken)]
            if not torch.equal(values.to(rows.dtype).to(values.dtype), values):
                rows = rows.to(values.dtype)  # a mean: rounded once, at the end of the merge
            rows[torch.from_numpy(self.shared[taken])] = values.to(rows.dtype)
        if unknown.any():
            # Not zero: the logits of other tokens may all be far below zero.
            mask = torch.from_numpy(unknown)
            rows[mask] = rows[~mask].float().mean(0).to(rows.dtype)
        return rows.movedim(0, axis).contiguous()

    def _shared_rows(self, canonical: str) -> tuple[Tensor, np.ndarray]:
        """The values of the rows in `shared`, first axis the vocabulary, and which of them no model has. Every model asks for one
        parameter after another, so that the last one is kept."""
        with self._lock:
            if self._last is None or self._last[0] != canonical:
                self._last = (canonical, *self._compute_shared(canonical))
            return self._last[1:]

    def _compute_shared(self, canonical: str) -> tuple[Tensor, np.ndarray]:
        names = [stored_name(source, canonical) for source in self.sources]
        holders = [index for index, name in enumerate(names) if name is not None]
        gives = self._givers(holders)
        total, count = None, gives.sum(0)
        for index in holders:
            if total is not None and not gives[index].any():
                continue
            source = self.sources[index]
            stored = source.read(names[index]).movedim(source.vocabulary_axes[names[index]], 0)
            dtype = torch.promote_types(stored.dtype, torch.float32)
            if total is None:
                total = torch.zeros((len(self.shared), *stored.shape[1:]), dtype=dtype)
            explicit = self.model[self.shared] == index
            rows = np.where(explicit, self.row[self.shared], self.own[index, self.shared])[gives[index]]
            chosen = torch.from_numpy(gives[index])
            total = total.to(torch.promote_types(total.dtype, dtype))
            total[chosen] += stored[torch.from_numpy(rows)].to(total.dtype)
        divisor = torch.from_numpy(count.clip(1)).to(total.dtype)
        values = total / divisor.reshape(-1, *[1] * (total.ndim - 1))
        return values, (count == 0) & ~self.zero[self.shared]

    def _givers(self, holders: list[int]) -> np.ndarray:
        """(S, rows in `shared`) bool: the models whose rows are averaged. `holders` are the models that have the parameter."""
        known = self.own[:, self.shared] >= 0
        holds = np.isin(np.arange(len(self.sources)), holders)[:, None]
        gives = known & holds
        if self.base is not None:
            by_base = gives[self.base].copy()
            gives[:, by_base] = False
            gives[self.base, by_base] = True
        model = self.model[self.shared]
        explicit = (model >= 0) & holds[:, 0][model]
        gives[:, explicit] = False
        gives[model[explicit], np.flatnonzero(explicit)] = True
        gives[:, self.zero[self.shared]] = False
        return gives


def stored_name(source: ModelSource, canonical: str) -> str | None:
    """The parameter of a model that has a canonical name, or that one of this name is tied to."""
    name = source.by_canonical.get(canonical)
    if name is None:
        known = source.anatomy.by_canonical.get(canonical)
        name = source.tied_stand_in(known) if known is not None else None
    return name


class RetokenizedSource(DerivedSource):
    """A model under the vocabulary of the result. Use [`RetokenizedSource.of`]."""

    rows: TokenRows
    index: int

    @classmethod
    def of(
        cls,
        rows: TokenRows,
        index: int,
        config: PretrainedConfig,
        generation_config: GenerationConfig | None,
        table: dict[str, int],
        processors: Path,
    ) -> RetokenizedSource:
        """Args:
        rows ([`TokenRows`]): Where the rows come from.
        index (`int`): Which of its models.
        config ([`~transformers.PretrainedConfig`]): The model's, for the new vocabulary.
        generation_config ([`~transformers.GenerationConfig`], *optional*): In the same way.
        table (`dict[str, int]`): The new vocabulary.
        processors (`Path`): The folder of the new tokenizer.
        """
        inner = rows.sources[index]
        source = cls.derive(inner, config=config, generation_config=generation_config, processors=processors)
        source.rows, source.index = rows, index
        source.vocabulary_axes, source.vocabulary = inner.vocabulary_axes, table
        return source

    def fingerprint(self) -> list[Any]:
        return [self.rows.fingerprint(), *self.inner.fingerprint()]

    @cached_property
    def names(self) -> NameMap:
        known = self.inner.names
        groups = [
            ConversionGroup({name: self._resized(name, info) for name, info in group.targets.items()}, group.sources)
            for group in known.groups
        ]
        return NameMap(groups, known.unexpected, known.missing, known.ignorable)

    def _resized(self, name: str, info: TensorInfo) -> TensorInfo:
        axis = self.vocabulary_axes.get(name)
        if axis is None:
            return info
        return TensorInfo((*info.shape[:axis], self.rows.count, *info.shape[axis + 1 :]), info.dtype)

    @cached_property
    def parameters(self) -> dict[str, TensorInfo]:
        return {name: self._resized(name, info) for name, info in self.inner.parameters.items()}

    def read(self, name: str) -> Tensor:
        stored = self.inner.read(name)
        if name not in self.vocabulary_axes:
            return stored
        return self.rows.apply(self.index, stored, self.vocabulary_axes[name], self.inner.anatomy.canonical(name))
