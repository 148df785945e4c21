"""`sam-poll predict`, `check` and `schema`: predictions for files, checks, the schema of prompts.

Nothing heavy is imported at the top, so that `--help` answers at once.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from sam_poll.cli.error_handling import reports
from sam_poll.cli.options import Config, Device, Formats, Model, ModelCfg
from sam_poll.core import streams
from sam_poll.core.errors import ExitCode
from sam_poll.runtime.console import print_error


@reports
def predict(
    pictures: Annotated[
        list[Path], typer.Argument(metavar="PICTURE…", help="Pictures.", readable=False)
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for the results.")],
    point: Annotated[
        list[str] | None,
        typer.Option("--point", help="x,y or x,y,0 (background); may be repeated."),
    ] = None,
    box: Annotated[
        list[str] | None, typer.Option("--box", help="x0,y0,x1,y1; each of several is an object.")
    ] = None,
    polygon: Annotated[
        list[str] | None,
        typer.Option("--polygon", help="x,y,x,y,x,y,…: a rough outline; each is an object."),
    ] = None,
    mask: Annotated[
        list[Path] | None,
        typer.Option(
            "--mask",
            help="Picture with a rough mask: what is not black; each is an object.",
            readable=False,
        ),
    ] = None,
    everything: Annotated[
        bool, typer.Option("--everything", help="Segment everything, without a prompt.")
    ] = False,
    text: Annotated[
        list[str] | None,
        typer.Option("--text", help="What to find: all objects of a kind; may be repeated."),
    ] = None,
    threshold: Annotated[
        float | None,
        typer.Option("--threshold", help="Score above which --text keeps objects (0.5)."),
    ] = None,
    prompt: Annotated[
        Path | None,
        typer.Option("--prompt", help="Prompt file for all the pictures.", readable=False),
    ] = None,
    label: Annotated[
        str,
        typer.Option("--label", help="Label of the objects of --point, --box, --polygon, --mask."),
    ] = "object",
    config: Config = None,
    model: Model = None,
    model_cfg: ModelCfg = None,
    device: Device = None,
    format: Formats = None,
    log_level: Annotated[
        str, typer.Option("--log-level", help="DEBUG, INFO, WARNING or ERROR.")
    ] = "WARNING",
) -> ExitCode:
    """Segment some pictures and exit.

    Without --point, --box, --polygon, --mask, --text, --everything or --prompt, the prompt file
    beside each picture is used.
    """
    from sam_poll.cli import prompt_flags
    from sam_poll.config import settings as settings_
    from sam_poll.core.text import shown
    from sam_poll.runtime import console

    flags: dict[str, Any] = {"model": model, "model_cfg": model_cfg, "device": device}
    flags["formats"] = format or (None if config else ["mask", "opex", "overlay"])
    settings = settings_.load(config, flags={**flags, "log_level": log_level.upper()})
    console.set_up_log("text", settings.log_level, refusals=False)
    jobs = prompt_flags.jobs_for(
        pictures,
        prompt_flags.prompts_of_flags(
            point or [],
            box or [],
            label,
            everything,
            text or [],
            threshold,
            polygon or [],
            mask or [],
        ),
        prompt,
    )

    refused_ids: set[str] = set()

    def refused(job: Any, error: Any) -> None:
        refused_ids.add(job.id)
        error.place = (
            f"{job.name}: {error.place}"
            if error.place and job.name not in error.place
            else job.name
        )
        print_error(error)

    # Report what is certain to fail before torch is imported and the model is loaded.
    errors = prompt_flags.errors_of(jobs, int(settings.limits.picture_mpx * 1_000_000))
    for job, error in errors.items():
        refused(job, error)
    jobs = [job for job in jobs if job not in errors]
    if not jobs:
        return ExitCode.FAILED_JOBS
    prompt_flags.make_writable(output)
    from sam_poll.runtime.daemon import predict as run

    rows: dict[str, list[list[str]]] = {}

    def result(done: Any) -> None:
        rows[done.job_id] = [
            [
                done.name,
                str(n),
                m.label,
                f"{m.score:.2f}",
                f"{m.area:,}",
                f"{done.timings['total']:.0f}",
            ]
            for n, m in enumerate(done.masks, 1)
        ] or [[done.name, "", "nothing found", "", "", f"{done.timings['total']:.0f}"]]

    code = run(settings, jobs, output, on_result=result, on_reject=refused)
    if rows:
        columns = ["picture", "#", "object", "score", "pixels", "ms"]
        console.result_console().print(
            console.table(
                "",
                columns,
                [row for job in jobs for row in rows.get(job.id, [])],
                right={1, 3, 4, 5},
            )
        )
        console.error_console().print(
            f"written to {shown(output)}", style="dim", markup=False, highlight=False
        )
    left = sum(job.id not in rows and job.id not in refused_ids for job in jobs)
    if left:
        typer.echo(f"stopped: {console.count(left, 'picture')} not processed", err=True)
    return code or (ExitCode.FAILED_JOBS if errors else ExitCode.OK)


@reports
def check(
    paths: Annotated[
        list[Path],
        typer.Argument(
            metavar="PATH…", help="Prompts, pictures, settings, folders.", readable=False
        ),
    ],
) -> ExitCode:
    """Validate prompts, pictures' headers and settings without loading a model."""
    from sam_poll.core.errors import SettingsError
    from sam_poll.core.text import shown
    from sam_poll.diagnostics.validate import check as check_paths

    fine, wrong = 0, []
    for finding in check_paths(paths):
        if streams.reader_closed():
            break
        if finding.error is None:
            fine += 1
        else:
            wrong.append(finding.error)
            place = finding.error.place
            prefix = "" if place and str(finding.path) in place else f"{shown(finding.path)}: "
            typer.echo(f"{prefix}{finding.error}")
    typer.echo(f"{fine} fine, {len(wrong)} wrong", err=bool(wrong))
    if any(isinstance(error, SettingsError) for error in wrong):
        return ExitCode.SETTINGS
    return ExitCode.FAILED_JOBS if wrong else ExitCode.OK


@reports
def schema() -> None:
    """Print the JSON Schema of prompt files."""
    from sam_poll.prompts import parser

    typer.echo(json.dumps(parser.schema(), indent=2))
