"""What a recipe says about single tokens (`MergeConfig.tokens`): where the row of one comes from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .errors import ConfigError, suggest


ZERO = "zero"
"""The source of a token whose row is zero."""


@dataclass(frozen=True)
class TokenRule:
    """Where the row of a token comes from, in the models that do not have the token.

    Args:
        model (`str`, *optional*): The name of a model, or `"zero"`; the usual rule when `None`.
        token (`str`, *optional*): Another token of that model, whose row is taken.
        token_id (`int`, *optional*): The same by its id.
        force (`bool`): Also in the models that have the token.
    """

    model: str | None = None
    token: str | None = None
    token_id: int | None = None
    force: bool = False

    @classmethod
    def parse(cls, where: str, value: Any) -> TokenRule:
        """From `{"source": ..., "force": ...}`, where the source is the name of a model, `"zero"`, or
        `{"model": name, "token": token}` or `{"model": name, "token_id": id}`.

        Raises:
            ConfigError: It says something else.
        """
        _check_keys(where, value, ("source", "force"))
        source, force = value.get("source"), value.get("force", False)
        if not isinstance(force, bool):
            raise ConfigError(f"{where}['force'] must be true or false, got {force!r}.")
        if force and source is None:
            raise ConfigError(f"{where}: 'force' needs a 'source' to take the row from.")
        if source is None or isinstance(source, str):
            return cls(source, force=force)
        _check_keys(f"{where}['source']", source, ("model", "token", "token_id"))
        model, token, token_id = (source.get(key) for key in ("model", "token", "token_id"))
        is_token, is_id = isinstance(token, str), isinstance(token_id, int) and not isinstance(token_id, bool)
        if not isinstance(model, str) or is_token == is_id or (token, token_id).count(None) != 1:
            raise ConfigError(
                f"{where}['source'] must have 'model' and one of 'token' (a string) and 'token_id' (an integer), got {source!r}."
            )
        return cls(model, token, token_id, force)


def _check_keys(where: str, value: Any, known: tuple[str, ...]) -> None:
    if not isinstance(value, Mapping):
        raise ConfigError(f"{where} must be a dictionary with the keys {', '.join(known)}, got {value!r}.")
    for key in value:
        if key not in known:
            raise ConfigError(
                f"{where}: unknown key '{key}'.{suggest(str(key), known)} Known keys: {', '.join(known)}."
            )


def parse_token_rules(where: str, value: Any) -> dict[str, TokenRule]:
    """The rules by token, or [`ConfigError`]."""
    if not isinstance(value, Mapping) or not all(isinstance(token, str) and token for token in value):
        raise ConfigError(f"{where} must be a dictionary {{token: {{'source': ...}}}}, got {value!r}.")
    return {token: TokenRule.parse(f"{where}[{token!r}]", rule) for token, rule in value.items()}
