"""`sam-poll doctor`: its flags; what it does is in `run`.

Nothing heavy is imported at the top, so that `--help` answers at once. What can still go wrong here: nothing of its
own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sam_poll.errors import ExitCode, UsageError
from sam_poll.given import Device, Model, ModelCfg
from sam_poll.reporting import reports

Out = Annotated[Path | None, typer.Option("-o", "--output", help="With --compare: folder for both masks.")]


@reports
def doctor(
    share: Annotated[
        Path | None, typer.Option("--share", help="The share: the folder IN, or the one above it.")
    ] = None,
    config: Annotated[
        Path | None, typer.Option("-c", "--config", help="Settings file. Default: ./config.yaml.")
    ] = None,
    model: Model = None,
    model_cfg: ModelCfg = None,
    device: Device = None,
    compare: Annotated[
        Path | None, typer.Option("--compare", help="A picture: the official predictor's mask of it beside ours.")
    ] = None,
    box: Annotated[
        str | None, typer.Option("--box", help="x0,y0,x1,y1 for --compare. Default: its middle half.")
    ] = None,
    output: Out = None,
    quick: Annotated[bool, typer.Option("--quick", help="Do not load the model.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> ExitCode:
    """Look at machine, device, model and share, load the model on trial, and say what is wrong and what to do."""
    if compare and quick:
        raise UsageError("--compare needs the model, which --quick does not load")
    if (box or output) and not compare:
        raise UsageError("--box and --output belong to --compare", remedy="give a picture with --compare")
    if compare and not compare.is_file():
        raise UsageError("there is no such picture", place=f"--compare {compare}")
    from rich.console import Console

    from sam_poll import oneoff
    from sam_poll.console import error_console
    from sam_poll.doctor import report, run
    from sam_poll.doctor.findings import exit_code

    framed = oneoff.box_flag(box) if box else None
    wishes = run.Wishes(
        config=config,
        share=share,
        flags={"model": model, "model_cfg": model_cfg, "device": device},
        compare=compare,
        box=(framed.x0, framed.y0, framed.x1, framed.y1) if framed else None,
        out=output,
        quick=quick,
    )
    errors = error_console()
    with errors.status("looking …") as line:  # nothing where stderr is no terminal
        done = run.examine(wishes, lambda step: line.update(f"{step} …"))
    if as_json:
        typer.echo(report.as_json(done.findings, done.ms, done.details))
    else:
        report.show(done.findings, done.ms, Console())
    return exit_code(done.findings)
