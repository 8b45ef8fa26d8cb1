"""A mergekit recipe: a file, text or mappings; one document, or several that build on each other."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...config import MergeConfig
from ...errors import ConfigError, suggest
from ..yaml import YAMLError, load_documents
from .document import Document


def is_mergekit(documents: Sequence[Any]) -> bool:
    """Whether the documents of a YAML file are a mergekit recipe."""
    return any(isinstance(document, Mapping) and "merge_method" in document for document in documents)


def translate(recipe: str | Path | Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> MergeConfig:
    """The config that a mergekit recipe describes; see [`MergeConfig.from_mergekit`]."""
    return _Recipes(_documents(recipe)).translate()


def _documents(recipe: Any) -> list[Mapping[str, Any]]:
    if isinstance(recipe, (str, Path)):
        recipe = _load(recipe)
    documents = [recipe] if isinstance(recipe, Mapping) else recipe
    if not isinstance(documents, Sequence) or not documents or not all(isinstance(one, Mapping) for one in documents):
        raise ConfigError(
            f"A mergekit recipe is a file, YAML text, or a mapping with the key 'merge_method', got {recipe!r}."
        )
    return list(documents)


def _load(recipe: str | Path) -> list[Any]:
    is_text = isinstance(recipe, str) and ("\n" in recipe or ": " in recipe)
    try:
        text = recipe if is_text else Path(recipe).read_text(encoding="utf-8")
        return load_documents(text)
    except (OSError, UnicodeDecodeError, YAMLError, RecursionError) as error:
        what = "The mergekit recipe" if is_text else f"The mergekit recipe '{recipe}'"
        raise ConfigError(f"{what} cannot be read: {' '.join(str(error).split())}") from error


class _Recipes:
    """The documents of one file: the final recipe and the named ones that it is built on."""

    def __init__(self, documents: Sequence[Mapping[str, Any]]):
        self.named: dict[str, Mapping[str, Any]] = {}
        unnamed = []
        for document in documents:
            name = document.get("name")
            if name is None:
                unnamed.append(document)
            elif not isinstance(name, str) or name in self.named:
                raise ConfigError(f"The name {name!r} of a document of the recipe is not text, or is there twice.")
            else:
                self.named[name] = document
        if len(unnamed) > 1:
            raise ConfigError("The recipe has several documents without a name: only the final one may have none.")
        self.final = unnamed[0] if unnamed else list(self.named.values())[-1]
        self.translated: dict[str, MergeConfig] = {}
        self.open: list[str] = []

    def translate(self) -> MergeConfig:
        """The final recipe, with the others inside."""
        where = "The mergekit recipe" if "name" not in self.final else f"The document '{self.final['name']}'"
        config = self._translate(where, self.final)
        unused = [name for name, data in self.named.items() if name not in self.translated and data is not self.final]
        if unused:
            raise ConfigError(
                f"The recipe's document '{unused[0]}' is not used by the final one.{suggest(unused[0], self.translated)} "
                "Name it as a model, or remove it."
            )
        return config

    def _named(self, name: str) -> MergeConfig:
        if name in self.open:
            raise ConfigError(f"The recipe's documents depend on each other: {' -> '.join([*self.open, name])}.")
        if name not in self.translated:
            self.open.append(name)
            config = self._translate(f"The document '{name}'", self.named[name])
            self.open.pop()
            if config.chat_template is not None or config.tokenizer is not None:
                warnings.warn(
                    f"The document '{name}': tokenizer and chat_template of an intermediate model are not used; set them in the "
                    "final document.",
                    stacklevel=2,
                )
            self.translated[name] = config
        return self.translated[name]

    def _translate(self, where: str, data: Mapping[str, Any]) -> MergeConfig:
        mentioned = _texts([data.get(key) for key in ("models", "slices", "modules", "base_model")])
        models = {name: self._named(name) for name in self.named if name in mentioned}
        return Document(data, where, models).translate()


def _texts(value: Any) -> set[str]:
    """The model names in a part of a document: every text outside of its parameters."""
    if isinstance(value, str):
        return {value.partition("@")[0]}
    if isinstance(value, Mapping):
        return set().union(*(_texts(one) for key, one in value.items() if key != "parameters"))
    if isinstance(value, (list, tuple)):
        return set().union(*(_texts(one) for one in value))
    return set()
