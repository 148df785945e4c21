"""`sam-poll models`: list, download and verify the weights of the networks."""

from __future__ import annotations

import functools
from typing import Annotated, Any

import typer

from sam_poll.cli.error_handling import reports
from sam_poll.core import streams
from sam_poll.core.errors import ExitCode

models = typer.Typer(help="List, download and verify model weights.", no_args_is_help=True)


@models.command("list")
@reports
def models_list() -> None:
    """List the models of the catalogue, their licences, and where they are."""
    from sam_poll.engines import catalog, hub
    from sam_poll.runtime import console

    terms: list[str] = []
    rows = [["demo", "sam2", "6", "Apache-2.0", "bundled; for drawn shapes only"]]
    for name in (*catalog.MODELS, *hub.MODELS):
        entry = catalog.listed(name)
        size = "" if entry.size is None else f"{entry.size >> 20}"
        where = str(entry.path or "not downloaded")
        rows.append([name, entry.family, size, entry.license or "", where])
        if entry.terms:
            terms.append(f"{name}: {entry.license}, {entry.terms}")
    console.result_console().print(
        console.table("", ["name", "family", "MiB", "licence", "where"], rows, right={2})
    )
    if streams.write_error() is None:
        for line in terms:
            typer.echo(line, err=True)


@models.command("download")
@reports
def models_download(
    names: Annotated[
        list[str],
        typer.Argument(metavar="NAME…", help="Catalogue names, or models of the Hugging Face hub."),
    ],
) -> None:
    """Download models into the cache folder and verify them."""
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    from sam_poll.engines import catalog, hub
    from sam_poll.runtime.console import error_console, set_up_log

    # An unknown name is reported before the first download begins.
    known = {name: catalog.listed(name) for name in names}
    for name, entry in known.items():
        if entry.terms and entry.path is None:
            typer.echo(f"{name}: {entry.license}, {entry.terms}", err=True)
    columns = (
        "{task.description}",
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    paths: dict[str, Any] = {}
    with Progress(*columns, console=error_console()) as progress:
        set_up_log("text", "WARNING", console=progress.console)
        for name in names:
            task = progress.add_task(name, total=None)
            advance = functools.partial(_advance, progress, task)
            paths[name] = catalog.download(name, progress=advance)
    for name, path in paths.items():
        licence = known[name].license or "see its page on the hub"
        revision = hub.revision_of(path)
        typer.echo(
            f"{name}: licence {licence}{f', revision {revision}' if revision else ''}", err=True
        )
        typer.echo(path)


def _advance(progress: Any, task: Any, done: int, total: int) -> None:
    progress.update(task, completed=done, total=total)


@models.command("verify")
@reports
def models_verify(
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="NAME|FILE…", help="Default: all downloaded models."),
    ] = None,
) -> ExitCode:
    """Compare model files with their known SHA-256."""
    from sam_poll.engines import catalog, hub

    wanted = names or [name for name in (*catalog.MODELS, *hub.MODELS) if catalog.listed(name).path]
    wrong = 0
    for name in wanted:
        if name == "demo":
            typer.echo("demo: part of this program, not downloaded")
            continue
        verdict = catalog.verify(name)
        wrong += verdict is catalog.Verdict.DIFFERENT
        typer.echo(f"{name}: {verdict.value}")
    if not wanted:
        typer.echo("no model is downloaded", err=True)
    return ExitCode.MODEL if wrong else ExitCode.OK
