"""Whether a model of a merge is an adapter, without the import of PEFT."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from ..checkpoints.source import ModelReference
from ..hub import ADAPTER_CONFIG_NAME


def may_be_adapter(name: str, model: Any, hub_kwargs: Mapping[str, Any]) -> bool:
    """Whether PEFT has to look at a model: it is an adapter's folder or repository, or it is in memory.

    Args:
        name (`str`): What messages call it.
        model: As in [`open_source`].
        hub_kwargs (`Mapping`): The Hub's arguments.
    """
    inner = model.get("model") if isinstance(model, Mapping) else model
    if not isinstance(inner, (str, Path)):
        return isinstance(inner, nn.Module)
    reference = ModelReference.parse(model, f"The expert '{name}'")
    folder = Path(reference.model).expanduser() / (reference.subfolder or "")
    if folder.is_dir():
        return (folder / ADAPTER_CONFIG_NAME).is_file()
    return is_adapter_repository(reference.model, {**hub_kwargs, **reference.to_dict()})


def is_adapter_repository(repository: str, kwargs: Mapping[str, Any]) -> bool:
    """Whether a Hub repository holds an adapter; where that cannot be told, opening it as a model says what is wrong.

    Args:
        repository (`str`): Its id.
        kwargs (`Mapping`): The Hub's arguments.
    """
    from huggingface_hub import constants, file_exists, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError, HTTPError

    filename = "/".join(part for part in (kwargs.get("subfolder"), ADAPTER_CONFIG_NAME) if part)
    revision = kwargs.get("revision")
    try:
        cached = try_to_load_from_cache(repository, filename, cache_dir=kwargs.get("cache_dir"), revision=revision)
        if isinstance(cached, str):
            return True
        if kwargs.get("local_files_only") or constants.HF_HUB_OFFLINE:
            return False
        return file_exists(repository, filename, revision=revision, token=kwargs.get("token"))
    except (HTTPError, HFValidationError, OSError):
        return False
