"""Files beside the weights: tokenizers, image processors, feature extractors. Which exist, and whether token ids agree."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any

from ..errors import CheckpointError


CHAT_TEMPLATE = "chat_template.jinja"
OLD_TOKENIZER_FILES = (
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "vocab.bpe",
    "merges.txt",
    "bpe.codes",
    "spm.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tokenizer.model",
)
"""What tokenizers were saved as before `tokenizer.json`, which says the same where both exist."""
PROCESSOR_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    *OLD_TOKENIZER_FILES,
    "tekken.json",
    "normalizer.json",
    CHAT_TEMPLATE,
    "chat_template.json",
    "preprocessor_config.json",
    "processor_config.json",
    "image_processor_config.json",
    "video_preprocessor_config.json",
    "feature_extractor_config.json",
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
)
MODULES = "modules.json"
_TEMPLATES_FOLDER = "additional_chat_templates"


def processor_files(folder: Path) -> list[Path]:
    """The tokenizer and processor files of a model folder, and those of its sentence-transformers modules, relative to it.

    Raises:
        CheckpointError: `modules.json` is malformed, or names a module outside of the folder; or a file is a link to one that
            does not belong to the model.
    """
    files = [Path(name) for name in (*PROCESSOR_FILES, MODULES) if (folder / name).is_file()]
    for name in (_TEMPLATES_FOLDER, *module_folders(folder)):
        files += sorted(path.relative_to(folder) for path in (folder / name).rglob("*") if path.is_file())
    refuse_foreign_links(folder, files)
    return files


def refuse_foreign_links(folder: Path, files: Iterable[Path]) -> None:
    """Refuses links that lead out of a model's folder, for files whose text becomes a part of the result: a folder from elsewhere
    could name any file of this machine. In the Hub's cache every file is a link to one of the repository's blobs.

    Args:
        folder (`Path`): The model's folder.
        files (`Iterable[Path]`): Relative to it.

    Raises:
        CheckpointError: There is such a link.
    """
    own = folder.resolve()
    snapshots = next((parent for parent in own.parents if parent.name == "snapshots"), None)
    allowed = [own] + ([snapshots.parent / "blobs"] if snapshots is not None else [])
    for path in files:
        target = (folder / path).resolve()
        if not any(target.is_relative_to(place) for place in allowed):
            raise CheckpointError(
                f"'{folder / path}' is a link to '{target}', outside of the model's folder. What is copied into the result must "
                "be in it: replace the link by the file."
            )


def module_folders(folder: Path) -> list[str]:
    """The folders of the sentence-transformers modules that come after the transformer (pooling, dense layers, ...), in order,
    from `modules.json`.

    Raises:
        CheckpointError: It is malformed, or names a module outside of the folder.
    """
    path = folder / MODULES
    if not path.is_file():
        return []
    try:
        paths = [entry["path"] for entry in json.loads(path.read_text(encoding="utf-8"))]
        parts = [PurePosixPath(name).parts for name in paths]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"'{path}' is not a list of sentence-transformers modules: {error!r}.") from error
    for name, pieces in zip(paths, parts, strict=True):
        if name.startswith("/") or ".." in pieces or any(character in name for character in "\\\0:"):
            raise CheckpointError(f"'{path}' names the module {name!r}: only folders inside the model's are read.")
    return [name for name in dict.fromkeys(paths) if name not in ("", ".")]


def read_json(path: Path) -> Any:
    """A JSON file beside the weights, or a [`CheckpointError`] that names it."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"'{path}' cannot be read: {error}.") from error


def chat_template_of(folder: Path) -> str | None:
    """The (default) chat template of a model folder's tokenizer, as Jinja text; `None` when it has none.

    Raises:
        CheckpointError: A file is malformed.
    """
    names = (CHAT_TEMPLATE, "tokenizer_config.json")
    refuse_foreign_links(folder, [Path(name) for name in names if (folder / name).is_file()])
    try:
        if (folder / CHAT_TEMPLATE).is_file():
            return (folder / CHAT_TEMPLATE).read_text(encoding="utf-8")
        if not (folder / "tokenizer_config.json").is_file():
            return None
        template = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8")).get("chat_template")
        if isinstance(template, list):  # several named ones
            template = {entry["name"]: entry["template"] for entry in template}.get("default")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"The chat template in '{folder}' cannot be read: {error!r}.") from error
    return template if isinstance(template, str) else None


def vocabulary_of(folder: Path) -> dict[str, int] | None:
    """Token -> id from the tokenizer's files, read without running its code; `None` when they hold no such table.

    Raises:
        CheckpointError: A file is malformed.
    """
    for name, parse in _TABLES.items():
        if not (folder / name).is_file():
            continue
        try:
            return _checked_ids(parse((folder / name).read_text(encoding="utf-8")))
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise CheckpointError(f"'{folder / name}' is not a tokenizer's vocabulary: {error!r}.") from error
    return None


def _checked_ids(table: dict[str, int] | None) -> dict[str, int] | None:
    for token, index in (table or {}).items():
        if not isinstance(token, str) or type(index) is not int or not 0 <= index < 2**31:
            raise ValueError(f"the token {token!r} has the id {index!r}")
    return table


def _fast_vocabulary(text: str) -> dict[str, int] | None:
    tokenizer = json.loads(text)
    vocabulary = tokenizer["model"].get("vocab")
    if isinstance(vocabulary, list):  # Unigram: [[token, score], ...] in the order of the ids
        vocabulary = {token: index for index, (token, _) in enumerate(vocabulary)}
    if not isinstance(vocabulary, dict):
        return None
    return vocabulary | {added["content"]: added["id"] for added in tokenizer.get("added_tokens") or ()}


def _json_vocabulary(text: str) -> dict[str, int] | None:
    vocabulary = json.loads(text)
    if not isinstance(vocabulary, dict) or any(isinstance(value, dict) for value in vocabulary.values()):
        return None  # such as one table for each language
    return vocabulary


def _listed_vocabulary(text: str) -> dict[str, int]:
    return {token: index for index, token in enumerate(text.splitlines())}


_TABLES = {"tokenizer.json": _fast_vocabulary, "vocab.json": _json_vocabulary, "vocab.txt": _listed_vocabulary}


def moved_tokens(first: dict[str, int], second: dict[str, int]) -> str:
    """Tokens that have other ids in the two tables, in words; empty when there are none."""
    moved = [token for token, index in first.items() if second.get(token, index) != index]
    names = {index: token for token, index in second.items()}
    moved += [token for token, index in first.items() if token not in second and names.get(index, token) != token]
    if not moved:
        return ""
    token = moved[0]
    there = second.get(token, f"absent, {first[token]} being {names.get(first[token])!r}")
    return f"{len(moved)} token(s) have other ids (e.g. {token!r} is {first[token]} and {there})"


def added_tokens(first: dict[str, int], second: dict[str, int]) -> str:
    """Tokens that exist in one of the tables only, in words; empty when there are none."""
    only_first, only_second = _count_missing(first, second), _count_missing(second, first)
    return f"{only_first} and {only_second} token(s) exist in one only" if only_first or only_second else ""


def _count_missing(tokens: Iterable[str], other: dict[str, int]) -> int:
    return sum(1 for token in tokens if token not in other)
