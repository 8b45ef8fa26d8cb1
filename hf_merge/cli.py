"""The command line, `hf-merge`. Heavy imports happen inside the commands, so that `--help` is quick.

Exit codes: 0 done, 2 a problem that the message explains, 130 interrupted.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from . import __version__
from .errors import ConfigError, MergeError


app = typer.Typer(
    name="hf-merge",
    help="Merge HuggingFace models: several fine-tunes in, one model out.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

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
TrustRemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Run code from the models' repositories.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    """Merge HuggingFace models: several fine-tunes in, one model out."""


@app.command()
def run(
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder to write; absent or empty.")],
    recipe: Recipe = None,
    method: Method = None,
    expert: Experts = None,
    base: Base = None,
    settings: Settings = None,
    dtype: Dtype = None,
    max_shard_size: Annotated[str, typer.Option(help="The largest weight file.")] = "5GB",
    device_map: Device = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Merge models into a folder, streamed from disk to disk."""
    merger = _merger(recipe, method, expert, base, settings, dtype, device_map, trust_remote_code)
    try:
        merger.save_pretrained(out, max_shard_size=max_shard_size)
    except KeyboardInterrupt:
        typer.echo("interrupted: run the same command again to continue", err=True)
        raise typer.Exit(130) from None
    report = merger.report
    if as_json:
        summary = {"out": str(out), "seconds": report.seconds, "peak_memory_bytes": report.peak_memory_bytes}
        typer.echo(json.dumps(summary | {"heads": list(merger.plan.heads), "notes": report.notes}))
        return
    for note in report.notes:
        typer.echo(f"note: {note}", err=True)
    seconds = sum(report.seconds.values())
    typer.echo(f"Merged {len(merger.experts)} models with '{merger.config.merge_type}' into {out} in {seconds:.1f} s")
    if merger.plan.heads:
        typer.echo(f"Heads kept per task: {', '.join(merger.plan.heads)}")


@app.command()
def plan(
    recipe: Recipe = None,
    method: Method = None,
    expert: Experts = None,
    base: Base = None,
    settings: Settings = None,
    dtype: Dtype = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Also check that this folder can be written.")
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Show what a merge would do, from headers alone; exit code 2 if it cannot run."""
    merger = _merger(recipe, method, expert, base, settings, dtype, None, trust_remote_code)
    problems = merger.problems(out)
    if as_json:
        typer.echo(json.dumps(merger.plan.to_dict() | {"problems": problems}))
    else:
        typer.echo(str(merger.plan))
        for problem in problems[len(merger.plan.problems) :]:
            typer.echo(f"  PROBLEM: {problem}")
    if problems:
        message = problems[0] if len(problems) == 1 else f"{len(problems)} problems, see the plan"
        typer.echo(f"error: {message}", err=True)
        raise typer.Exit(2)


@app.command()
def methods(as_json: AsJson = False) -> None:
    """List the merge methods and their settings."""
    from .config import MergeConfig
    from .registry import available_merge_methods
    from .settings import settings_of

    common = {field.name for field in dataclasses.fields(MergeConfig)}
    table = {}
    for name, entry in sorted(available_merge_methods().items()):
        fields = [field for field in dataclasses.fields(entry.config_cls) if field.name not in common]
        specs = settings_of(entry.config_cls)
        table[name] = {
            "summary": (entry.config_cls.__doc__ or "").strip().splitlines()[0],
            "requires_base": entry.method_cls.requires_base,
            "requires_data": entry.method_cls.requires_data,
            "settings": {
                field.name: {
                    "default": None if field.default is dataclasses.MISSING else field.default,
                    "help": field.metadata.get("help", ""),
                    "allowed": specs[field.name].describe() if field.name in specs else "",
                }
                for field in fields
            },
        }
    if as_json:
        typer.echo(json.dumps(table))
        return
    for name, row in table.items():
        typer.echo(f"{name}: {row['summary']}")
        for key, field in row["settings"].items():
            typer.echo(f"    {key}={json.dumps(field['default'])}  {field['help']}")


@app.command()
def inspect(
    models: Annotated[list[str], typer.Argument(help="The experts: NAME=PATH_OR_HUB_ID, or only the path.")],
    base: Base = None,
    wudi: Annotated[
        bool, typer.Option("--wudi", help="Also each layer's interference before and after WUDI.")
    ] = False,
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Compare models: classes, shapes, and with a base model norms, cosines and sign conflicts of the task vectors."""
    from .engines.inspection import inspect_models

    method = "wudi" if wudi else "task_arithmetic" if base else "linear"
    merger = _merger(None, method, models, base, None, None, None, trust_remote_code)
    inspection = inspect_models(merger.check())
    typer.echo(json.dumps(inspection.to_dict()) if as_json else str(inspection))


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="Where the demo writes its models.")] = Path("demo-output"),
) -> None:
    """Train small experts on real digits, merge them with several methods and print how good each merge is."""
    from .demo import run_demo

    run_demo(out, echo=typer.echo)


def _merger(recipe, method, expert, base, settings, dtype, device_map, trust_remote_code) -> Any:
    """The merger that the options describe: a recipe, options, or a recipe changed by options."""
    from .merger import Merger

    overrides = _assignments(settings)
    if recipe is None and method is None and overrides:
        method = "wudi" if base else "linear"  # the default of Merger.from_pretrained
    config = _config(recipe, method, overrides)
    experts = _experts(expert) if expert else None
    return Merger.from_pretrained(
        experts,
        config,
        base_model=base,
        dtype=dtype,
        device_map=device_map,
        trust_remote_code=trust_remote_code,
    )


def _config(recipe: Path | None, method: str | None, overrides: dict[str, Any]) -> Any:
    from .config import MergeConfig

    if recipe is None and method is None:
        return None
    data = _read_recipe(recipe) if recipe is not None else {}
    if method is not None and data.get("merge_type", method) != method:
        common = {field.name for field in dataclasses.fields(MergeConfig)}
        data = {key: value for key, value in data.items() if key in common}  # settings belong to their method
    if method is not None:
        data["merge_type"] = method
    return MergeConfig.from_dict(data | overrides, origin=str(recipe) if recipe is not None else "The command line")


def _read_recipe(recipe: Path) -> dict[str, Any]:
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


def _experts(values: list[str]) -> dict[str, str] | list[str]:
    pairs = [_split_expert(value) for value in values]
    if all(name is None for name, _ in pairs):
        return [model for _, model in pairs]
    named = {}
    for name, model in pairs:
        name = name or Path(model).name
        if name in named:
            raise ConfigError(f"Two experts are called '{name}': name them with --expert NAME=PATH.")
        named[name] = model
    return named


def _split_expert(value: str) -> tuple[str | None, str]:
    name, separator, model = value.partition("=")
    if separator and name and "/" not in name:
        return name, model
    return None, value


def _assignments(values: list[str] | None) -> dict[str, Any]:
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


def main() -> None:
    """The entry point: errors of hf_merge become one line on standard error and exit code 2."""
    logging.basicConfig(format="%(levelname)s: %(message)s")
    logging.captureWarnings(True)
    try:
        app()
    except MergeError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
