"""One mergekit recipe as one recipe of hf_merge."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from ...config import MergeConfig
from ...errors import ConfigError, suggest
from ..chat_templates import CHAT_TEMPLATES
from .checks import check_keys, warn_ignored
from .inputs import InputReader, Reference, Slice, Source
from .methods import METHODS, Method
from .parameters import Settings
from .tokenizer import model_finder, translate_tokenizer


_DOCUMENT_KEYS = (
    "merge_method",
    "models",
    "slices",
    "modules",
    "base_model",
    "parameters",
    "dtype",
    "out_dtype",
    "tokenizer_source",
    "tokenizer",
    "chat_template",
    "name",
)
_BASE = "base"


class Document:
    """One mergekit recipe.

    Args:
        data (`Mapping`): What YAML says.
        where (`str`): What messages call it.
        models (`dict`): Recipes of other documents, by name, that stand for models.
    """

    def __init__(self, data: Mapping[str, Any], where: str, models: Mapping[str, MergeConfig]):
        check_keys(where, data, _DOCUMENT_KEYS)
        self.data = data
        self.where = where
        self.models = models

    @cached_property
    def method(self) -> Method:
        name = self.data.get("merge_method")
        if not isinstance(name, str) or name not in METHODS:
            raise ConfigError(
                f"{self.where}: merge_method is {name!r}, which is no method of mergekit.{suggest(str(name), METHODS)} "
                f"It has: {', '.join(METHODS)}."
            )
        return METHODS[name]

    def translate(self) -> MergeConfig:
        """The recipe of hf_merge."""
        slices = InputReader(self.data, self.where, self.method).slices()
        if self.method.base == "input":
            bases = [None for _ in slices]
        else:
            bases = [one.take_base() for one in slices]
        self._check_structure(slices, bases)
        names = self._expert_names(slices)
        experts = {name: self._model([one.sources[k] for one in slices]) for k, name in enumerate(names)}
        base = self._model(bases) if bases[0] is not None else None
        fields: dict[str, Any] = {
            "merge_type": self.method.merge_type,
            "heads": "auto",
            "dtype": _dtype(self.data.get("out_dtype") or self.data.get("dtype")),
            "chat_template": self._chat_template(),
            "experts": experts,
            "base_model": base,
        } | self._tokenizer(names, slices, bases)
        settings = Settings(self.method, self.where, slices, names)
        return MergeConfig.from_dict(
            fields | self.method.fixed | settings.fields | {"rules": settings.rules}, origin=self.where
        )

    def _check_structure(self, slices: list[Slice], bases: list[Source | None]) -> None:
        method, name = self.method, self.data["merge_method"]
        if method.base == "required" and None in bases:
            where = slices[bases.index(None)].where
            remedy = "set base_model" if slices[0].base is None else "add the base model to the sources of the slice"
            raise ConfigError(f"{where}: '{name}' needs a base model: {remedy}.")
        if len({base is None for base in bases}) > 1:
            raise ConfigError(f"{self.where}: the base model is a source of some slices and not of others.")
        counts = sorted({len(one.sources) for one in slices})
        if len(counts) > 1:
            raise ConfigError(
                f"{self.where}: the slices have {' and '.join(map(str, counts))} sources; every slice must have the same number."
            )
        if counts[0] < method.least or (method.most is not None and counts[0] > method.most):
            limits = f"{method.least}" if method.least == method.most else f"at least {method.least}"
            if method.most is not None and method.least != method.most:
                limits = f"{method.least} to {method.most}"
            beside = "" if method.base == "input" else " beside the base model"
            raise ConfigError(f"{slices[0].where}: '{name}' merges {limits} model(s){beside}, got {counts[0]}.")
        for base in bases:
            if base is not None and base.scope.parameters:
                names = ", ".join(base.scope.parameters)
                warn_ignored(base.scope.where, names, "is given for the base model, which has no parameters")

    def _expert_names(self, slices: list[Slice]) -> list[str]:
        """One name for each position of the sources: the model's, or that of the first slice's model."""
        names: list[str] = []
        for k, source in enumerate(slices[0].sources):
            stem = re.sub(r"[^A-Za-z0-9._-]", "_", Path(source.reference.path).name).lstrip(".-") or f"expert_{k}"
            name = stem
            while name in (*names, _BASE):
                name = f"{name}_{k}"
            names.append(name)
        return names

    def _model(self, pieces: Sequence[Source]) -> dict[str, Any]:
        """A model of the recipe: whole, the result of another document, or made of slices."""
        if pieces[0].layers is None:
            return self._whole(pieces[0].reference)
        return {"slices": [{"model": self._whole(piece.reference), "layers": list(piece.layers)} for piece in pieces]}

    def _whole(self, reference: Reference) -> dict[str, Any]:
        recipe = self.models.get(reference.path)
        return reference.entry if recipe is None else {"merge": recipe.to_dict()}

    # -- tokenizer and chat template --

    def _tokenizer(self, names: list[str], slices: list[Slice], bases: list[Source | None]) -> dict[str, Any]:
        """Whose vocabulary the result gets, and where its rows come from."""
        named = {_BASE: bases[0].reference} if bases[0] is not None else {}
        named |= {name: source.reference for name, source in zip(names, slices[0].sources, strict=True)}
        return translate_tokenizer(self.data, self.where, model_finder(named, slices[0].base))

    def _chat_template(self) -> str | None:
        template = self.data.get("chat_template")
        if template is None or template == "auto":
            return template
        if isinstance(template, str) and "{" in template:
            return template
        if isinstance(template, str) and template in CHAT_TEMPLATES:
            return CHAT_TEMPLATES[template]
        known = ("auto", *CHAT_TEMPLATES)
        raise ConfigError(
            f"{self.where}: chat_template is {template!r}, neither Jinja text nor one of {', '.join(known)}."
            f"{suggest(str(template), known)}"
        )


def _dtype(name: Any) -> Any:
    return name.removeprefix("torch.") if isinstance(name, str) else name
