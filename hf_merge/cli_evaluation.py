"""The commands that measure, explain and publish merges: `eval`, `compare`, `report`, `card`, `push`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from .cli_recipes import (
    AsJson,
    Base,
    Device,
    Dtype,
    Experts,
    TrustRemoteCode,
    build_config,
    name_experts,
    read_assignments,
)
from .errors import ConfigError


app = typer.Typer()

Folder = Annotated[Path, typer.Argument(help="The folder of a merged model.")]
Tasks = Annotated[
    Path,
    typer.Option(
        "--tasks", "-t", help="A YAML or JSON file: {task: {data: file, metric: accuracy}}.", show_default=False
    ),
]
RunOn = Annotated[str | None, typer.Option("--device", help="Where models run: cpu, cuda:0.", show_default=False)]


@app.command(name="eval")
def evaluate(
    model: Annotated[str, typer.Argument(help="A merged folder, a folder with a recipe, any model, or a Hub id.")],
    tasks: Tasks,
    experts: Annotated[bool, typer.Option(help="Also measure the experts that the recipe names.")] = True,
    save: Annotated[
        bool, typer.Option(help="Write evaluation.json into the folder, for the report and the card.")
    ] = True,
    device: RunOn = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Measure a merged model on labelled data, each task under its own head, beside its expert."""
    from .evaluation import evaluate_merge, read_tasks

    result = evaluate_merge(
        model, read_tasks(tasks), experts=experts, device=_device(device), trust_remote_code=trust_remote_code
    )
    typer.echo(json.dumps(result.to_dict()) if as_json else str(result))
    if save and Path(model).is_dir():
        path = result.save(model)
        typer.echo(f"saved as {path}", err=True)


@app.command()
def compare(
    recipes: Annotated[list[str], typer.Argument(help="Recipes: files, folders with one, or names of methods.")],
    tasks: Tasks,
    expert: Experts = None,
    base: Base = None,
    sweep: Annotated[
        list[str] | None,
        typer.Option(
            "--sweep", help="METHOD.KEY=[VALUES]: one candidate for each value. Repeat it.", show_default=False
        ),
    ] = None,
    results: Annotated[
        Path | None,
        typer.Option(
            "--results", "-r", help="JSON lines; what is in the file is not measured again.", show_default=False
        ),
    ] = None,
    num_samples: Annotated[int, typer.Option(help="Calibration rows per task for methods that need samples.")] = 64,
    test: Annotated[bool, typer.Option("--test", help="Also measure every candidate on the test rows.")] = False,
    dtype: Dtype = None,
    device_map: Device = None,
    device: RunOn = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Merge the same experts with several recipes and compare quality, time and memory, by calibration rows."""
    from .evaluation import compare_merges, read_tasks

    configs = _candidates(recipes, read_assignments(sweep))
    first = next(iter(configs.values()))
    try:
        comparison = compare_merges(
            name_experts(expert) if expert else first.experts,
            configs,
            read_tasks(tasks),
            base_model=base or first.base_model,
            results=results,
            num_samples=num_samples,
            test=test,
            dtype=dtype,
            device=_device(device),
            device_map=device_map,
            trust_remote_code=trust_remote_code,
        )
    except KeyboardInterrupt:
        hint = ": run the same command again to continue" if results else ""
        typer.echo(f"interrupted{hint}", err=True)
        raise typer.Exit(130) from None
    typer.echo(json.dumps(comparison.to_dict(), default=list) if as_json else str(comparison))
    if not comparison.rows:
        raise ConfigError("None of the recipes could be merged.")


@app.command()
def report(
    folder: Folder,
    comparison: Annotated[
        Path | None, typer.Option(help="The results of `hf-merge compare`, to show them too.", show_default=False)
    ] = None,
    models: Annotated[
        bool, typer.Option(help="Read base and experts, for the cosines and sign conflicts of their task vectors.")
    ] = True,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Where to write; the folder itself by default.", show_default=False),
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Write merge_report.html, one file to look at, and its figures."""
    from .evaluation.report import write_report

    path = write_report(folder, out, comparison=comparison, models=models, trust_remote_code=trust_remote_code)
    typer.echo(f"wrote {path}")


@app.command()
def card(
    folder: Folder,
    force: Annotated[bool, typer.Option("--force", help="Replace a README.md that hf_merge did not write.")] = False,
) -> None:
    """Write the model card again, with the results of `hf-merge eval`; what you added to it is kept."""
    from .evaluation.cards import update_card

    typer.echo(f"wrote {update_card(folder, force=force)}")


@app.command()
def push(
    folder: Folder,
    repo_id: Annotated[str, typer.Argument(help="NAME or NAMESPACE/NAME; it is made when missing.")],
    head: Annotated[
        list[str] | None,
        typer.Option(
            "--head", help="Only this task's head, into a repository that has the backbone.", show_default=False
        ),
    ] = None,
    revision: Annotated[str | None, typer.Option(help="The branch.", show_default=False)] = None,
    message: Annotated[str | None, typer.Option("--message", "-m", help="Of the commit.", show_default=False)] = None,
    private: Annotated[bool, typer.Option("--private", help="A new repository is private.")] = False,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request.")] = False,
) -> None:
    """Upload a merged folder, or single heads of it, to the Hub."""
    from .hub import push_folder, push_heads

    options: dict[str, Any] = {"commit_message": message, "revision": revision, "create_pr": create_pr}
    options["private"] = private or None
    typer.echo(push_heads(folder, repo_id, head, **options) if head else push_folder(folder, repo_id, **options))


def _candidates(recipes: list[str], sweeps: dict[str, Any]) -> dict[str, Any]:
    """The recipes by name, those that a sweep names multiplied."""
    from .evaluation import grid
    from .registry import available_merge_methods

    methods = available_merge_methods()
    configs: dict[str, Any] = {}
    used: set[str] = set()
    for recipe in recipes:
        is_method = recipe in methods and not Path(recipe).exists()
        config = build_config(None if is_method else Path(recipe), recipe if is_method else None, {})
        values = {}
        for key, value in sweeps.items():
            method, separator, setting = key.partition(".")
            if not separator or not isinstance(value, list) or not value:
                raise ConfigError(f"--sweep needs METHOD.KEY=[VALUE, ...], got '{key}={value}'.")
            if method == config.merge_type:
                values[setting] = value
                used.add(key)
        for name, variant in (grid(config, **values) if values else {config.merge_type: config}).items():
            name = name if is_method else f"{Path(recipe).name}: {name}"
            if name in configs:
                raise ConfigError(f"The recipe '{name}' is given twice.")
            configs[name] = variant
    unused = [key for key in sweeps if key not in used]
    if unused:
        raise ConfigError(f"--sweep {unused[0]}: none of the recipes is of this method.")
    return configs


def _device(name: str | None) -> Any:
    """A device, or a [`ConfigError`] that names it."""
    import torch

    if name is None:
        return None
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"--device '{name}' is no device: use 'cpu' or 'cuda:0'.") from error
