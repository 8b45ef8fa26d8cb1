"""What the commands of `hf-merge` share: options, and recipes put together from files and options."""

from __future__ import annotations

import dataclasses
import gc
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from .errors import ConfigError


Recipe = Annotated[
    Path | None,
    typer.Argument(
        help="A recipe: a merge_config.json, a YAML or JSON file (mergekit's too), or a folder with one.",
        show_default=False,
    ),
]
Experts = Annotated[
    list[str] | None,
    typer.Option("--expert", "-e", help="NAME=PATH_OR_HUB_ID, or only the path. Repeat it.", show_default=False),
]
Base = Annotated[str | None, typer.Option("--base", "-b", help="The base model of the experts.", show_default=False)]
Method = Annotated[
    str | None, typer.Option("--method", "-m", help="The merge method; see `hf-merge methods`.", show_default=False)
]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set", "-s", help="KEY=VALUE, a setting of the method; the value is JSON or text.", show_default=False
    ),
]
Dtype = Annotated[
    str | None, typer.Option(help="Dtype of the merged weights; the first expert's by default.", show_default=False)
]
Device = Annotated[
    str | None,
    typer.Option("--device-map", help="Where the arithmetic is done: cpu, auto, cuda:0.", show_default=False),
]


def _processes(text: str) -> int | str:
    if text == "auto" or (text.isdecimal() and int(text) > 0):
        return text if text == "auto" else int(text)
    raise typer.BadParameter(f"{text!r} is neither 'auto' nor a number of processes, at least 1.")


Processes = Annotated[
    Any,
    typer.Option(
        "--num-proc",
        parser=_processes,
        metavar="NUMBER|auto",
        help="How many processes merge; auto: one on each processor, as far as the memory goes.",
    ),
]
TrustRemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Run code from the models' repositories.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]


def open_merger(recipe, method, expert, base, settings, dtype, device_map, trust_remote_code) -> Any:
    """The merger that the options describe: a recipe, options, or a recipe changed by options."""
    with without_collection():
        from .merger import Merger

        overrides = read_assignments(settings)
        if recipe is None and method is None and overrides:
            method = "wudi" if base else "linear"  # the default of Merger.from_pretrained
        config = build_config(recipe, method, overrides)
        experts = name_experts(expert) if expert else None
        return Merger.from_pretrained(
            experts,
            config,
            base_model=base,
            dtype=dtype,
            device_map=device_map,
            trust_remote_code=trust_remote_code,
        )


@contextmanager
def without_collection() -> Iterator[None]:
    """For imports of torch and transformers, opening models and planning: they make a million objects that stay, and to look for garbage
    among them takes a quarter of the time."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.freeze()


def build_config(recipe: Path | None, method: str | None, overrides: dict[str, Any]) -> Any:
    from .config import MergeConfig

    if recipe is None and method is None:
        return None
    data = read_recipe(recipe) if recipe is not None else {}
    if method is not None and data.get("merge_type", method) != method:
        common = {field.name for field in dataclasses.fields(MergeConfig)}
        data = {key: value for key, value in data.items() if key in common}  # settings belong to their method
    if method is not None:
        data["merge_type"] = method
    return MergeConfig.from_dict(data | overrides, origin=str(recipe) if recipe is not None else "The command line")


def read_recipe(recipe: Path) -> dict[str, Any]:
    from .config import CONFIG_NAME
    from .interop.mergekit import is_mergekit, translate
    from .interop.yaml import YAMLError, load_documents

    path = recipe / CONFIG_NAME if recipe.is_dir() else recipe
    if path.name == CONFIG_NAME and not path.exists():
        raise ConfigError(f"'{recipe}' holds no {CONFIG_NAME}. If it is a model, name it with --expert.")
    try:
        text = path.read_text(encoding="utf-8")
        documents = [json.loads(text)] if path.suffix == ".json" else load_documents(text)
    except (OSError, ValueError, YAMLError, RecursionError) as error:
        raise ConfigError(f"Cannot read the recipe '{path}': {' '.join(str(error).split())}") from error
    if is_mergekit(documents):
        return translate(documents).to_dict()
    if len(documents) != 1 or not isinstance(documents[0], dict):
        raise ConfigError(f"The recipe '{path}' must be a mapping with the key 'merge_type'.")
    return documents[0]


def name_experts(values: list[str]) -> dict[str, str] | list[str]:
    pairs = [split_expert(value) for value in values]
    if all(name is None for name, _ in pairs):
        return [model for _, model in pairs]
    named = {}
    for name, model in pairs:
        name = name or Path(model).name
        if name in named:
            raise ConfigError(f"Two experts are called '{name}': name them with --expert NAME=PATH.")
        named[name] = model
    return named


def split_expert(value: str) -> tuple[str | None, str]:
    name, separator, model = value.partition("=")
    if separator and name and "/" not in name:
        return name, model
    return None, value


def read_assignments(values: list[str] | None) -> dict[str, Any]:
    settings = {}
    for value in values or ():
        key, separator, text = value.partition("=")
        if not separator or not key:
            raise ConfigError(f"--set needs KEY=VALUE, got '{value}'.")
        try:
            settings[key] = json.loads(text)
        except ValueError:
            settings[key] = text
    return settings
