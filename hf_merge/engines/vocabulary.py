"""One vocabulary for a merge: which tokens the result has, and models whose rows follow them ([`align_vocabularies`]).

Where all models have the same tokens under the same ids nothing is done.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ..checkpoints.processors import moved_tokens
from ..checkpoints.source import ModelSource
from ..checkpoints.tokenizers import (
    Definition,
    added_tokens,
    ids_of,
    procedures_differ,
    read_definition,
    unite,
    write_tokenizer,
)
from ..config import MergeConfig
from ..errors import ConfigError, MergeError, suggest
from ..modeling.vocabulary import map_token_ids, offsets_by_padding, with_vocabulary_size
from ..tokens import ZERO, TokenRule, parse_token_rules
from .retokenized import RetokenizedSource, TokenRows


UNION = "union"


@dataclass
class Alignment:
    """Models under one vocabulary.

    Args:
        experts (`list[ModelSource]`), base ([`ModelSource`], *optional*): The models, those that need it wrapped.
        notes, problems (`list[str]`): For the plan.
    """

    experts: list[ModelSource]
    base: ModelSource | None
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def align_vocabularies(config: MergeConfig, experts: Sequence[ModelSource], base: ModelSource | None) -> Alignment:
    """Brings models to the vocabulary that the recipe asks for; to that of the first tokenizer where the same tokens only have other
    ids.

    Args:
        config ([`MergeConfig`]): The recipe.
        experts (`Sequence[ModelSource]`): The experts.
        base ([`ModelSource`], *optional*): The base model.
    """
    unchanged = Alignment(list(experts), base)
    sources = [*experts, *([base] if base is not None else [])]
    if len({source.description.model_type for source in sources}) > 1:
        return unchanged  # refused elsewhere
    try:
        alignment = _Alignment(config, sources, base)
        if not alignment.is_wanted:
            return unchanged
        aligned = alignment.aligned()
    except MergeError as error:
        unchanged.problems.append(str(error))
        return unchanged
    return Alignment(
        aligned[: len(experts)],
        aligned[-1] if base is not None else None,
        alignment.notes,
    )


class _Alignment:
    """The work on one merge.

    Args:
        config ([`MergeConfig`]): The recipe.
        sources (`Sequence[ModelSource]`): The experts, and the base model last where there is one.
        base ([`ModelSource`], *optional*): The base model.
    """

    def __init__(self, config: MergeConfig, sources: Sequence[ModelSource], base: ModelSource | None):
        self.config = config
        self.sources = list(sources)
        self.base = base
        self.rules = parse_token_rules("tokens", config.tokens)
        self.notes: list[str] = []
        self.keep: Any = None

    # -- whether and with whose tokenizer -------------------------------------------------------------------------

    @cached_property
    def is_wanted(self) -> bool:
        """Whether the recipe asks for a vocabulary, or the models' tokens differ in nothing but their ids."""
        asked = self.config.tokenizer == UNION or self.rules or self.config.pad_to_multiple_of is not None
        if not any(self.tables):
            if asked:
                raise ConfigError(
                    "tokenizer, tokens and pad_to_multiple_of are about tokens, and none of the models has a tokenizer beside it."
                )
            return False
        return bool(asked) or self.config.tokenizer is not None or self._differ_in_ids_only()

    def _differ_in_ids_only(self) -> bool:
        tables = [(source, table) for source, table in zip(self.sources, self.tables, strict=True) if table]
        first, reference = tables[0]
        same = all(table.keys() == reference.keys() for _, table in tables[1:])
        moved = any(moved_tokens(reference, table) for _, table in tables[1:])
        sizes = {source.description.vocabulary_size for source, _ in tables}
        if same and (moved or len(sizes) > 1):
            self.notes.append(
                f"the models have the same tokens under other ids: they are merged by token, as in '{first.name}'"
            )
            return True
        return False

    @cached_property
    def tables(self) -> list[dict[str, int] | None]:
        """Token -> id of each model, `None` where it has no tokenizer."""
        return [source.vocabulary for source in self.sources]

    @cached_property
    def donor(self) -> int:
        """The model whose tokenizer the result has, or whose tokenizer comes first in the union."""
        wanted = self.config.tokenizer
        if wanted in (None, UNION):
            first = [self.sources.index(self.base)] if wanted == UNION and self.base is not None else []
            return next(index for index in (*first, *range(len(self.sources))) if self.tables[index])
        names = [source.name for source in self.sources]
        if wanted not in names:
            raise ConfigError(
                f"tokenizer='{wanted}' is none of the models of this merge: {', '.join(names)}.{suggest(wanted, [*names, UNION])}"
            )
        if not self.tables[names.index(wanted)]:
            raise ConfigError(f"tokenizer='{wanted}': {self.sources[names.index(wanted)]} has no tokenizer.")
        return names.index(wanted)

    # -- the vocabulary of the result -----------------------------------------------------------------------------

    @cached_property
    def _definition(self) -> Definition | None:
        """The tokenizer of the result, where it is none that exists already."""
        extra = [token for token in self.rules if token not in self.tables[self.donor]]
        members = [self.donor]
        if self.config.tokenizer == UNION:
            members += [
                index
                for index, table in enumerate(self.tables)
                if table and index != self.donor and self._extends_donor(index)
            ]
        if len(members) == 1 and not extra:
            return None
        definitions = [read_definition(self.sources[index].processor_folder) for index in members]
        for index, definition in zip(members[1:], definitions[1:], strict=True):
            for part in procedures_differ(definitions[0], definition):
                self.notes.append(
                    f"the '{part}' of the tokenizers of '{self.sources[self.donor].name}' and '{self.sources[index].name}' differ; "
                    "the result has the first"
                )
        return unite(definitions, extra)

    def _extends_donor(self, index: int) -> bool:
        """Whether a tokenizer has tokens that the donor's lacks, or matches some as they are that the donor's may cut."""
        if not self.tables[index].keys() <= self.tables[self.donor].keys():
            return True
        ours, theirs = (added_tokens(self.sources[one].processor_folder) for one in (self.donor, index))
        return bool(ours) and not theirs <= ours

    @cached_property
    def table(self) -> dict[str, int]:
        """Token -> id of the result."""
        return self.tables[self.donor] if self._definition is None else ids_of(self._definition)

    @cached_property
    def processors(self) -> Path:
        """The folder of the result's tokenizer: a model's, or a temporary one that lives as long as the models do."""
        folder = self.sources[self.donor].processor_folder
        if self._definition is None:
            return folder
        self.keep = tempfile.TemporaryDirectory(prefix="hf_merge-tokenizer-")
        write_tokenizer(self._definition, folder, Path(self.keep.name))
        return Path(self.keep.name)

    @cached_property
    def size(self) -> int:
        """How many rows the result's embeddings have."""
        needed, stored = max(self.table.values()) + 1, self._size_of(self.donor)
        multiple = self.config.pad_to_multiple_of
        if multiple is None:
            return max(needed, stored)
        size = -(-needed // multiple) * multiple
        if size < stored:
            self.notes.append(
                f"pad_to_multiple_of={multiple}: {stored - size} row(s) of '{self.sources[self.donor].name}' without a token are left out"
            )
        return size

    def _size_of(self, index: int) -> int:
        return self.sources[index].description.vocabulary_size or 0

    # -- where the rows come from ---------------------------------------------------------------------------------

    def aligned(self) -> list[ModelSource]:
        """The models under the vocabulary of the result."""
        if any(not source.description.vocabulary_size for source in self.sources):
            raise ConfigError(
                f"{self.sources[0].description.class_name} has no single vocabulary that tokens could be matched in: leave 'tokenizer', "
                "'tokens' and 'pad_to_multiple_of' out."
            )
        processors, rows = self.processors, self._rows()
        self._note_size()
        models = []
        for index, source in enumerate(self.sources):
            if rows.is_identity(index, self._size_of(index)) and self._definition is None:
                models.append(source)
            else:
                models.append(self._retokenized(rows, index, processors))
        return models

    def _rows(self) -> TokenRows:
        tokens, ids = list(self.table), np.fromiter(self.table.values(), np.int64, len(self.table))
        own = np.full((len(self.sources), self.size), -1, np.int64)
        for index in range(len(self.sources)):
            table, stored = self._table_of(index), self._size_of(index)
            found = np.fromiter((table.get(token, -1) for token in tokens), np.int64, len(tokens))
            own[index, ids] = np.where(found < stored, found, -1)
            self._note_left_out(index, table)
        model, row = np.full(self.size, -1, np.int64), np.full(self.size, -1, np.int64)
        nameless = np.setdiff1d(np.arange(self.size), ids)
        kept = nameless[nameless < self._size_of(self.donor)]
        own[self.donor, kept] = kept
        model[kept], row[kept] = self.donor, kept
        flags = np.zeros((3, self.size), bool)  # forced, zero, padding
        flags[2, nameless[nameless >= self._size_of(self.donor)]] = True
        for token, rule in self.rules.items():
            self._apply_rule(token, rule, own, model, row, flags)
        absent = [token for token in self.rules if self._is_orphan(token, own, model, flags)]
        if absent:
            raise ConfigError(f"tokens: no model has the token {absent[0]!r}: give it a 'source'.")
        base = self.sources.index(self.base) if self.base is not None else None
        return TokenRows(self.sources, base, own, model, row, *flags, keep=self.keep)

    def _is_orphan(self, token: str, own: np.ndarray, model: np.ndarray, flags: np.ndarray) -> bool:
        place = self.table[token]
        return bool((own[:, place] < 0).all() and model[place] < 0 and not flags[1, place])

    def _table_of(self, index: int) -> Mapping[str, int]:
        """A model's vocabulary; that of the model that gives the tokenizer where it has none and as many rows."""
        if self.tables[index]:
            return self.tables[index]
        if self._size_of(index) != self._size_of(self.donor):
            raise ConfigError(
                f"{self.sources[index]} has no tokenizer beside it to find its {self._size_of(index)} tokens by: save its "
                "tokenizer into its folder."
            )
        self.notes.append(
            f"'{self.sources[index].name}' has no tokenizer: it is taken to have that of '{self.sources[self.donor].name}'"
        )
        return self.tables[self.donor]

    def _note_size(self) -> None:
        """How large the vocabulary is, where it is not that of a model as it stands."""
        own = len(self.tables[self.donor])
        if len(self.table) > own:
            self.notes.append(
                f"the result has {len(self.table)} tokens in {self.size} rows: the {own} of '{self.sources[self.donor].name}' under their "
                f"ids, then {len(self.table) - own} more"
            )

    def _note_left_out(self, index: int, table: Mapping[str, int]) -> None:
        lost = [token for token, row in table.items() if token not in self.table and row < self._size_of(index)]
        if lost:
            shown = ", ".join(repr(token) for token in lost[:3])
            self.notes.append(
                f"{len(lost)} token(s) of '{self.sources[index].name}' are left out, the result's tokenizer lacks them: {shown}"
                f"{', ...' if len(lost) > 3 else ''} (tokenizer='union' keeps all)"
            )

    def _apply_rule(
        self, token: str, rule: TokenRule, own: np.ndarray, model: np.ndarray, row: np.ndarray, flags: np.ndarray
    ) -> None:
        place = self.table[token]
        flags[0, place] = rule.force
        if rule.model is None:
            return
        if rule.model == ZERO:
            flags[1, place] = True
            return
        names = [source.name for source in self.sources]
        if rule.model not in names:
            raise ConfigError(
                f"tokens[{token!r}] names the model '{rule.model}', which is none of this merge: {', '.join(names)}."
            )
        index = names.index(rule.model)
        wanted = rule.token_id if rule.token_id is not None else self._table_of(index).get(rule.token or token, -1)
        if not 0 <= wanted < self._size_of(index):
            what = f"the id {rule.token_id}" if rule.token_id is not None else f"the token {rule.token or token!r}"
            raise ConfigError(f"tokens[{token!r}]: {self.sources[index]} does not have {what}.")
        model[place], row[place] = index, wanted

    # -- the models -----------------------------------------------------------------------------------------------

    def _retokenized(self, rows: TokenRows, index: int, processors: Path) -> ModelSource:
        source = self.sources[index]
        config = with_vocabulary_size(source.config, self.size)
        generation = copy.deepcopy(source.generation_config)
        donor = self.sources[self.donor]
        self._translate(config, index, donor.config)
        if generation is not None:
            self._translate(generation, index, donor.generation_config or donor.config)
        if offsets_by_padding(source.shell) and config.pad_token_id != source.config.pad_token_id:
            raise ConfigError(
                f"{source} counts positions from the id of its padding token, {source.config.pad_token_id}, which would become "
                f"{config.pad_token_id}: choose tokenizer='{source.name}'."
            )
        return RetokenizedSource.of(rows, index, config, generation, self.table, processors)

    def _translate(self, config: Any, index: int, fallback: Any) -> None:
        """Ids in a config follow their tokens; what a token that the result lacks was for is left to the donor's config."""
        if index == self.donor:
            return
        tokens, taken = {row: token for token, row in self._table_of(index).items()}, set(self.table.values())

        def change(old: int) -> int | None:
            if old in tokens:
                return self.table.get(tokens[old])
            return None if old in taken else old  # an id without a token must not become some token of the result

        for key in map_token_ids(config, change, fallback):
            self.notes.append(
                f"the token of '{key}' in the config of '{self.sources[index].name}' is not in the result's tokenizer: it is that of "
                f"'{self.sources[self.donor].name}'"
            )
