"""The tokenizer of several vocabularies: all tokens of the first one under their ids, then what the others add.

It works on the content of `tokenizer.json`: the vocabulary of BPE, WordPiece, Unigram and WordLevel models with their merges
and scores, and the added tokens. How text is normalised and cut into words stays that of the first tokenizer.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from .processors import OLD_TOKENIZER_FILES, processor_files, read_json


TOKENIZER = "tokenizer.json"
_TOKENIZER_CONFIG = "tokenizer_config.json"
# What decides how text becomes tokens, beside the vocabulary.
_PROCEDURE = ("normalizer", "pre_tokenizer", "decoder")

Definition = dict[str, Any]
"""The content of `tokenizer.json`."""


def read_definition(folder: Path) -> Definition:
    """The tokenizer of a model folder, in the form of `tokenizer.json`, whatever form it is stored in.

    Raises:
        CheckpointError: There is none, or it has no such form.
    """
    if (folder / TOKENIZER).is_file():
        definition = read_json(folder / TOKENIZER)
    else:
        definition = _converted(folder)
    kind = definition.get("model", {}).get("type") if isinstance(definition, dict) else None
    if kind not in _ADDERS:
        raise CheckpointError(
            f"The tokenizer in '{folder}' is of the kind {kind!r}; vocabularies of {', '.join(_ADDERS)} can be extended."
        )
    return definition


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a model folder, as transformers loads it; code of the folder's own does not run.

    Raises:
        CheckpointError: It cannot be loaded, or only by such code.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ImportError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise CheckpointError(f"The tokenizer in '{folder}' cannot be loaded: {reason}") from error


def _converted(folder: Path) -> Definition:
    tokenizer = load_tokenizer(folder)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise CheckpointError(
            f"The tokenizer in '{folder}' is a {type(tokenizer).__name__}, which has no fast form ({TOKENIZER})."
        )
    return json.loads(backend.to_str())


def ids_of(definition: Definition) -> dict[str, int]:
    """Token -> id, added tokens included."""
    vocabulary = definition["model"]["vocab"]
    if isinstance(vocabulary, list):  # Unigram: [[token, score], ...] in the order of the ids
        vocabulary = {token: index for index, (token, _) in enumerate(vocabulary)}
    return vocabulary | {added["content"]: added["id"] for added in definition.get("added_tokens") or ()}


def added_tokens(folder: Path) -> set[str]:
    """The tokens that `tokenizer.json` of a model folder adds to its vocabulary; none without such a file."""
    path = folder / TOKENIZER
    return {entry["content"] for entry in read_json(path).get("added_tokens") or ()} if path.is_file() else set()


def unite(definitions: Sequence[Definition], extra: Iterable[str] = ()) -> Definition:
    """The tokenizer that knows all tokens of several ones.

    Tokens of the first one keep their ids. The others' new tokens follow in the order of their ids, and their merges (BPE) after
    the merges that are there, so that they apply where the first tokenizer is done.

    Args:
        definitions (`Sequence[dict]`): At least one; all of one kind.
        extra (`Iterable[str]`): More tokens, which are matched as they are.

    A token that is added in any of them is added in the union: its text is matched as it is, and never cut.

    Raises:
        CheckpointError: The tokenizers are of different kinds.
    """
    united = copy.deepcopy(definitions[0])
    table = ids_of(united)
    added = {entry["content"]: entry for entry in united.get("added_tokens") or ()}
    for other in definitions[1:]:
        _check_kind(united, other)
        entries = {entry["content"]: entry for entry in other.get("added_tokens") or ()}
        new = [token for token in _by_id(ids_of(other)) if token not in table]
        table |= _numbered(table, new)
        added |= {token: entry | {"id": table[token]} for token, entry in entries.items() if token not in added}
        _ADDERS[united["model"]["type"]](united["model"], other["model"], table)
    new = [token for token in dict.fromkeys(extra) if token not in table]
    table |= _numbered(table, new)
    added |= {token: _plain_entry(token, table[token]) for token in new}
    united["added_tokens"] = sorted(added.values(), key=lambda entry: entry["id"])
    # The library numbers added tokens that its model lacks by itself; those that the model has keep their ids.
    _ADDERS[united["model"]["type"]](united["model"], {"vocab": {}}, table)
    return united


def _by_id(table: Mapping[str, int]) -> list[str]:
    return sorted(table, key=table.__getitem__)


def _numbered(table: Mapping[str, int], new: Sequence[str]) -> dict[str, int]:
    start = max(table.values(), default=-1) + 1
    return {token: start + offset for offset, token in enumerate(new)}


def _plain_entry(token: str, index: int) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    return {"id": index, "content": token, **flags}


def _check_kind(first: Definition, other: Definition) -> None:
    kinds = [definition["model"]["type"] for definition in (first, other)]
    if kinds[0] != kinds[1]:
        raise CheckpointError(
            f"A {kinds[0]} and a {kinds[1]} tokenizer have no union: choose one of them with tokenizer='base' or an expert's name."
        )
    for key in ("continuing_subword_prefix", "end_of_word_suffix"):
        values = [definition["model"].get(key) for definition in (first, other)]
        if values[0] != values[1]:
            raise CheckpointError(
                f"The tokenizers have no union: '{key}' is {values[0]!r} in one and {values[1]!r} in another. Choose one of them."
            )


def procedures_differ(first: Definition, other: Definition) -> list[str]:
    """The parts of two tokenizers that treat text differently, by name."""
    return [key for key in _PROCEDURE if first.get(key) != other.get(key)]


def _add_plain(model: dict[str, Any], other: Mapping[str, Any], table: Mapping[str, int]) -> None:
    model["vocab"] = dict(table)


def _add_bpe(model: dict[str, Any], other: Mapping[str, Any], table: Mapping[str, int]) -> None:
    model["vocab"] = dict(table)
    known = {_pair(merge) for merge in model["merges"]}
    new = [pair for pair in map(_pair, other.get("merges") or ()) if pair not in known]
    model["merges"] = [list(_pair(merge)) for merge in model["merges"]] + [list(pair) for pair in new]


def _pair(merge: str | Sequence[str]) -> tuple[str, ...]:
    return tuple(merge.split(" ", 1) if isinstance(merge, str) else merge)


def _add_unigram(model: dict[str, Any], other: Mapping[str, Any], table: Mapping[str, int]) -> None:
    """Pieces are a list in the order of their ids, each with a score."""
    scores = {token: score for entries in (other["vocab"], model["vocab"]) for token, score in entries}
    # An added token is never a piece of other text: it is cut out before the model sees it.
    lowest = min(scores.values(), default=0.0) - 10
    tokens = _by_id(table)
    if table and table[tokens[-1]] != len(tokens) - 1:
        raise CheckpointError("A Unigram tokenizer with unused ids cannot be extended: choose one of the tokenizers.")
    model["vocab"] = [[token, scores.get(token, lowest)] for token in tokens]


_ADDERS = {"BPE": _add_bpe, "WordPiece": _add_plain, "WordLevel": _add_plain, "Unigram": _add_unigram}


def write_tokenizer(definition: Definition, donor: Path, folder: Path) -> None:
    """Writes a tokenizer with the settings, templates and other processor files of a model folder.

    Args:
        definition (`dict`): The tokenizer.
        donor (`Path`): Gives everything else.
        folder (`Path`): Where to.

    Raises:
        CheckpointError: transformers reads other ids from the result than `definition` says.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for path in processor_files(donor):
        # Older tables of the donor would contradict the new tokenizer.json.
        if path.as_posix() not in OLD_TOKENIZER_FILES:
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(donor / path, folder / path)
    (folder / TOKENIZER).write_text(json.dumps(definition, ensure_ascii=False), encoding="utf-8")
    _drop_token_table(folder / _TOKENIZER_CONFIG)
    _check_written(definition, folder)


def _drop_token_table(path: Path) -> None:
    """Removes the table of added tokens that older versions of transformers kept in the tokenizer's config."""
    if not path.is_file():
        return
    config = read_json(path)
    if config.pop("added_tokens_decoder", None) is not None:
        path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _check_written(definition: Definition, folder: Path) -> None:
    loaded, wanted = load_tokenizer(folder).get_vocab(), ids_of(definition)
    wrong = next((token for token, index in wanted.items() if loaded.get(token) != index), None)
    if wrong is not None:
        raise CheckpointError(
            f"transformers reads the token {wrong!r} as {loaded.get(wrong)} and not as {wanted[wrong]} from the united tokenizer: "
            "choose one of the tokenizers with tokenizer='base' or an expert's name."
        )
