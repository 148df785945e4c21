"""`sam-poll status`, `retry` and `merge`: the state of a share, failed jobs, merged results.

Nothing heavy is imported at the top, so that `--help` answers at once.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sam_poll.cli.error_handling import reports
from sam_poll.cli.options import In, ShareConfig, settings_of
from sam_poll.core.errors import ShareError, UsageError
from sam_poll.formats import registry

if TYPE_CHECKING:
    from sam_poll.config.settings import Settings
    from sam_poll.share.layout import Layout


@reports
def status(
    source: In = None,
    config: ShareConfig = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show the files in the five folders, the oldest waiting job, and all daemons with alarms."""
    settings = settings_of(source, config)
    from sam_poll.core.text import shown
    from sam_poll.runtime import console
    from sam_poll.share.status import status as read_status

    layout = _existing_layout(settings)
    report = read_status(layout)
    # The last report of a dead daemon is out of date.
    living = [worker for worker in report["workers"] if worker["alive"]]
    alarms = [
        {"worker": worker["worker"], **alarm}
        for worker in living
        for alarm in console.alarms_of(worker)
    ]
    if as_json:
        report["alarms"] = alarms
        typer.echo(json.dumps(report))
        return
    rows = [
        [
            name,
            *(
                str(report[name].get(kind, ""))
                for kind in ("pictures", "prompts", "errors", "other")
            ),
            str(folder),
        ]
        for name, folder in layout.folders.items()
    ]
    out = console.result_console()
    out.print(
        console.table(
            "", ["folder", "pictures", "prompts", "errors", "other", ""], rows, right={1, 2, 3, 4}
        )
    )
    oldest = report["oldest"]
    typer.echo(
        f"waiting longest: {shown(oldest['name'])}, {oldest['seconds']:.0f} s"
        if oldest
        else "no job waits"
    )
    lone = report["without_partner"]
    if lone["pictures"] or lone["prompts"]:
        pictures = console.count(lone["pictures"], "picture")
        prompts = console.count(lone["prompts"], "prompt")
        typer.echo(f"without a partner: {pictures}, {prompts}")
    for one in lone["explained"]:
        typer.echo(f"  {shown(one['name'])}: {shown(one['reason'])} ({shown(one['remedy'])})")
    typer.echo("" if report["workers"] else "no daemon runs on this share")
    if report["workers"]:
        columns = ["daemon", "host", "pid", "model", "device", "last heartbeat", "alarms"]
        out.print(console.table("", columns, console.worker_rows(report["workers"])))
    for alarm in alarms:
        message = (
            f"alarm ({shown(alarm['kind'])}) of {shown(alarm['worker'])}: {shown(alarm['message'])}"
        )
        typer.echo(f"{message}, for {alarm['seconds']:.0f} s")
    for line in (line for worker in living for line in console.held_lines(worker)):
        typer.echo(line)


@reports
def retry(
    pattern: Annotated[
        str, typer.Argument(help="Pattern of jobs, by their path below failed: `cam1/*`.")
    ] = "*",
    source: Annotated[
        Path | None, typer.Option("--in", help="Input folder, if no settings file names it.")
    ] = None,
    config: ShareConfig = None,
) -> None:
    """Put failed jobs back into the input folder and remove their error files."""
    settings = settings_of(source, config)
    from sam_poll.core.text import shown
    from sam_poll.runtime import console
    from sam_poll.share.status import retry as put_back

    console.set_up_log("text", "WARNING")
    layout = _existing_layout(settings)
    count = put_back(layout, pattern, on_move=lambda job: typer.echo(shown(job)))
    typer.echo(f"put back into {settings.folders.input}: {console.count(count, 'job')}", err=True)


def _existing_layout(settings: Settings) -> Layout:
    """Return the layout of a share whose input folder exists, else raise ShareError."""
    from sam_poll.runtime.builders import layout_of

    layout = layout_of(settings)
    if not layout.input.is_dir():
        raise ShareError(
            "the share does not exist",
            place=str(layout.input),
            remedy="mount it, or name another folder",
        )
    return layout


@reports
def merge(
    output: Annotated[Path, typer.Argument(metavar="OUT", help="Folder with the results.")],
    target: Annotated[Path, typer.Option("-o", "--output", help="File to write.")],
    format: Annotated[
        str, typer.Option("--format", help=f"{', '.join(registry.mergeable())}.")
    ] = "cvat",
    share_prefix: Annotated[
        str,
        typer.Option(
            "--share-prefix",
            help="Path of the results' share on the server's share. Default: its top folder.",
        ),
    ] = "",
) -> None:
    """Merge the results of many pictures into one file for a CVAT task."""
    from sam_poll.core.files import write_whole
    from sam_poll.core.safe_path import SafePath
    from sam_poll.formats.merge import common
    from sam_poll.share.layout import walk

    if format not in registry.mergeable():
        raise UsageError(
            f"there is no format `{format}` to merge",
            place="--format",
            remedy=", ".join(registry.mergeable()),
        )
    prefix = common.share_prefix(share_prefix)
    endings = registry.suffixes(format)
    if not output.is_dir():
        raise UsageError("there is no such folder", place=str(output))
    made = target.resolve()  # an earlier merge: its objects would be counted twice
    answers = SafePath.at(output)
    names = sorted(
        n for n, _ in walk(answers) if n.endswith(endings) and (output / n).resolve() != made
    )
    if not names:
        remedy = f"add `{format}` to `formats` and run the jobs again"
        raise UsageError(f"no {' and '.join(endings)} files", place=str(output), remedy=remedy)
    body = b"".join(
        registry.merged(format, ((name, (answers / name).read_bytes()) for name in names), prefix)
    )
    target.parent.mkdir(parents=True, exist_ok=True)
    write_whole(SafePath.beside(target), body)
    typer.echo(f"{len(names)} files merged into {target}", err=True)
