"""The `tokenizer` and `tokenizer_source` of a mergekit recipe."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ...errors import ConfigError
from .checks import check_keys
from .inputs import Reference


UNION = "union"
FindModel = Callable[[str, Any], str]
"""From where a model is named, and how, to the name that hf_merge's recipe has for it."""


def translate_tokenizer(data: Mapping[str, Any], where: str, find: FindModel) -> dict[str, Any]:
    """The settings `tokenizer`, `tokens` and `pad_to_multiple_of` of a recipe.

    Args:
        data (`Mapping`): The document.
        where (`str`): What messages call it.
        find (`Callable`): Gives the name of a model, `"base"` for what mergekit calls so.

    Raises:
        ConfigError: A key or value is unknown, or a model is none of the recipe's.
    """
    source, tokenizer = data.get("tokenizer_source"), data.get("tokenizer")
    if tokenizer is None:
        if source is None:
            return {}
        return {"tokenizer": source if source == UNION else find(f"{where}: tokenizer_source", source)}
    if source is not None:
        raise ConfigError(f"{where} has both 'tokenizer' and 'tokenizer_source': keep one.")
    where = f"{where}: tokenizer"
    check_keys(where, tokenizer, ("source", "tokens", "pad_to_multiple_of"))
    source = tokenizer.get("source", UNION)
    tokens = tokenizer.get("tokens") or {}
    if not isinstance(tokens, Mapping):
        raise ConfigError(f"{where}.tokens must be a mapping from tokens to their sources, got {tokens!r}.")
    return {
        "tokenizer": source if source == UNION else find(f"{where}.source", source),
        "tokens": {token: _rule(f"{where}.tokens[{token!r}]", rule, find) for token, rule in tokens.items()},
        "pad_to_multiple_of": tokenizer.get("pad_to_multiple_of"),
    }


def _rule(where: str, rule: Any, find: FindModel) -> dict[str, Any]:
    check_keys(where, rule, ("source", "force"))
    translated = {"source": _source(f"{where}.source", rule.get("source"), find), "force": rule.get("force", False)}
    return {key: value for key, value in translated.items() if value}


def _source(where: str, source: Any, find: FindModel) -> Any:
    """A model, the row of another token (`kind: model_token`), or zero (`kind: zero`)."""
    if source is None or not isinstance(source, Mapping) or "kind" not in source:
        return source if source is None else find(where, source)
    if source["kind"] == "zero":
        check_keys(where, source, ("kind",))
        return "zero"
    if source["kind"] != "model_token":
        raise ConfigError(f"{where}.kind must be 'model_token' or 'zero', got {source['kind']!r}.")
    check_keys(where, source, ("kind", "model", "token", "token_id"))
    given = {key: source[key] for key in ("token", "token_id") if source.get(key) is not None}
    if len(given) != 1:
        raise ConfigError(f"{where} must have one of 'token' and 'token_id', got {dict(source)!r}.")
    return {"model": find(f"{where}.model", source.get("model"))} | given


def model_finder(named: Mapping[str, Reference], base: Reference | None) -> FindModel:
    """How the models of a recipe are found.

    Args:
        named (`Mapping[str, Reference]`): The models by their names in hf_merge's recipe.
        base ([`Reference`], *optional*): What mergekit calls `"base"`.
    """

    def find(key: str, value: Any) -> str:
        wanted = base if value == "base" else Reference.parse(key, value)
        if wanted is None:
            raise ConfigError(f"{key} is 'base', and there is no base_model.")
        for name, reference in named.items():
            if reference == wanted:
                return name
        raise ConfigError(
            f"{key} is '{wanted.path}', which is none of the models whose first layers are merged: "
            f"{', '.join(reference.path for reference in named.values())}."
        )

    return find
