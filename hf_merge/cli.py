"""The command line, `hf-merge`. Heavy imports happen inside the commands, so that `--help` is quick.

Exit codes: 0 done, 2 a problem that the message explains, 130 interrupted.
"""

from __future__ import annotations

import atexit
import dataclasses
import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, NoReturn

import typer

from . import __version__
from .cli_evaluation import app as evaluation_app
from .cli_recipes import (
    AsJson,
    Base,
    Device,
    Dtype,
    Experts,
    Method,
    Processes,
    Recipe,
    Settings,
    TrustRemoteCode,
    open_merger,
    without_collection,
)
from .errors import MergeError


app = typer.Typer(
    name="hf-merge",
    help="Merge HuggingFace models: several fine-tunes in, one model out.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

app.add_typer(evaluation_app)


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
    num_proc: Processes = "auto",
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Merge models into a folder, streamed from disk to disk."""
    with without_collection():
        from .engines.ranks import all_ranks

    ranks = all_ranks()
    try:
        with ranks.quiet():
            merger = ranks.step(
                lambda: open_merger(recipe, method, expert, base, settings, dtype, device_map, trust_remote_code),
                "open the models",
            )
            merger.save_pretrained(out, max_shard_size=max_shard_size, num_proc=num_proc)
    except KeyboardInterrupt:
        if ranks.is_first:
            typer.echo("interrupted: run the same command again to continue", err=True)
        raise typer.Exit(130) from None
    except MergeError as error:
        if ranks.is_first:
            typer.echo(f"error: {error}", err=True)
        with suppress(MergeError):
            ranks.gather(None)  # a launcher kills the others when one ends: not before rank 0 has spoken
        raise typer.Exit(2) from error
    if not ranks.is_first:
        return
    report = merger.report
    if as_json:
        summary = {"out": str(out), "seconds": report.seconds, "peak_memory_bytes": report.peak_memory_bytes}
        typer.echo(json.dumps(summary | {"heads": list(merger.plan.heads), "notes": report.notes}))
        return
    for note in report.notes:
        typer.echo(f"note: {note}", err=True)
    seconds = sum(report.seconds.values())
    forks = f" in {report.num_proc} processes" if report.num_proc > 1 else ""
    merged = f"Merged {len(merger.experts)} models with '{merger.config.merge_type}' into {out}"
    typer.echo(f"{merged} in {seconds:.1f} s{forks}")
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
    device_map: Device = None,
    samples: Annotated[int, typer.Option(help="For methods that need data: samples of each task.", min=0)] = 0,
    tokens: Annotated[int, typer.Option(help="And tokens of each sample.", min=0)] = 0,
    num_proc: Processes = "auto",
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Show what a merge would do and take, from headers alone; exit code 2 if it cannot run."""
    merger = open_merger(recipe, method, expert, base, settings, dtype, device_map, trust_remote_code)
    with without_collection():
        problems = merger.problems(out)
    if not problems:
        merger.estimate(out, samples=samples, tokens=tokens, num_proc=num_proc)
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
    merger = open_merger(None, method, models, base, None, None, None, trust_remote_code)
    inspection = inspect_models(merger.check())
    typer.echo(json.dumps(inspection.to_dict()) if as_json else str(inspection))


@app.command("extract-lora")
def extract_lora(
    model: Annotated[str, typer.Argument(help="The fine-tuned model: a path or Hub id.")],
    base: Annotated[str, typer.Option("--base", "-b", help="The base model that it was fine-tuned from.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder to write; absent or empty.")],
    rank: Annotated[
        int | None, typer.Option(help="The rank, or the largest rank with --energy.", show_default=False)
    ] = None,
    energy: Annotated[
        float | None, typer.Option(help="The part of each task vector's energy to keep.", show_default=False)
    ] = None,
    exact: Annotated[bool, typer.Option("--exact", help="Exact SVDs instead of randomised ones.")] = False,
    include: Annotated[
        list[str] | None, typer.Option(help="Only parameters matching this regex. Repeat it.", show_default=False)
    ] = None,
    exclude: Annotated[
        list[str] | None, typer.Option(help="No parameters matching this regex. Repeat it.", show_default=False)
    ] = None,
    factors_only: Annotated[bool, typer.Option("--factors-only", help="Leave trained norms and biases out.")] = False,
    dtype: Annotated[str, typer.Option(help="Dtype of the adapter.")] = "float32",
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Turn a fine-tune into a PEFT adapter of its base, of a given rank or energy."""
    from .engines.extraction import Extraction
    from .engines.extraction import extract_lora as extract
    from .engines.opening import Opening

    settings = Extraction(
        rank, energy, exact, include, exclude, not factors_only, dtype, opening=Opening(trust_remote_code)
    )
    report = extract(model, base, out, settings)
    if as_json:
        typer.echo(json.dumps(report.to_dict()))
        return
    for name, row in report.parameters.items():
        typer.echo(f"{name}: rank {row['rank']}, keeps {1 - row['discarded_energy']:.2%}")
    for note in report.notes:
        typer.echo(f"note: {note}", err=True)
    typer.echo(f"Wrote an adapter of {len(report.parameters)} weights to {out}")


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="Where the demo writes its models.")] = Path("demo-output"),
) -> None:
    """Train small experts on real digits, merge them with several methods and print how good each merge is."""
    from .demo import run_demo

    run_demo(out, echo=typer.echo)


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Ctrl-C is a `KeyboardInterrupt`, which waits for the parameter that is being merged or written. A second one does not wait:
    what is on the disk can be continued after a kill at any moment."""
    signal.signal(signal.SIGINT, lambda number, frame: os._exit(130))
    raise KeyboardInterrupt


@contextmanager
def _interruptible() -> Iterator[None]:
    """Handles Ctrl-C by [`_interrupt`] where nobody else does."""
    if (
        threading.current_thread() is not threading.main_thread()
        or signal.getsignal(signal.SIGINT) is not signal.default_int_handler
    ):
        yield
        return
    signal.signal(signal.SIGINT, _interrupt)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGINT) is _interrupt:  # else threads are finishing their work after an interrupt
            signal.signal(signal.SIGINT, signal.default_int_handler)


def main() -> None:
    """The entry point: errors of hf_merge become one line on standard error and exit code 2."""
    logging.basicConfig(format="%(levelname)s: %(message)s")
    logging.captureWarnings(True)
    try:
        with _interruptible():
            app()
    except MergeError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(2)


def console() -> NoReturn:
    """[`main`] as a process of its own, which ends at once: to free what torch and transformers made takes up to a second."""
    code: Any = 0
    try:
        main()
    except SystemExit as stop:
        code = stop.code
    if code is not None and not isinstance(code, int):
        sys.exit(code)
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, AttributeError):  # closed, or nobody reads it any more
            stream.flush()
    os._exit(code or 0)


if __name__ == "__main__":
    console()
