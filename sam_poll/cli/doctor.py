"""`sam-poll doctor`: checks of machine, model and share, each finding with its remedy.

Nothing heavy is imported at the top, so that `--help` answers at once.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sam_poll.cli.error_handling import reports
from sam_poll.cli.options import Device, Model, ModelCfg
from sam_poll.core.errors import ExitCode, UsageError

if TYPE_CHECKING:
    from sam_poll.diagnostics.doctor.run import DoctorOptions, DoctorReport

Out = Annotated[
    Path | None, typer.Option("-o", "--output", help="With --compare: folder for both masks.")
]


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
        Path | None,
        typer.Option(
            "--compare", help="A picture: the official predictor's mask of it beside ours."
        ),
    ] = None,
    box: Annotated[
        str | None,
        typer.Option("--box", help="x0,y0,x1,y1 for --compare. Default: its middle half."),
    ] = None,
    output: Out = None,
    quick: Annotated[bool, typer.Option("--quick", help="Do not load the model.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> ExitCode:
    """Check machine, device, model and share; list problems with remedies."""
    try:
        _check_flags(compare, box, output, quick)
        from sam_poll.cli import prompt_flags
        from sam_poll.diagnostics.doctor import run

        parsed_box = prompt_flags.box_flag(box) if box else None
        options = run.DoctorOptions(
            config=config,
            share=share,
            flags={"model": model, "model_cfg": model_cfg, "device": device},
            compare=compare,
            box=(parsed_box.x0, parsed_box.y0, parsed_box.x1, parsed_box.y1)
            if parsed_box
            else None,
            out=output,
            quick=quick,
        )
        doctor_report = _examine(options)
    except Exception as error:
        if as_json:  # stdout always gets a JSON document; the error goes to stderr as well
            from sam_poll.diagnostics.doctor import report

            typer.echo(report.failed(error))
        raise
    return _show(doctor_report, as_json=as_json)


def _check_flags(compare: Path | None, box: str | None, output: Path | None, quick: bool) -> None:
    """Check that the flags fit each other. Raises UsageError."""
    if compare and quick:
        raise UsageError("--compare needs the model, which --quick does not load")
    if (box or output) and not compare:
        raise UsageError(
            "--box and --output belong to --compare", remedy="give a picture with --compare"
        )
    if compare and not compare.is_file():
        raise UsageError("the picture does not exist", place=f"--compare {compare}")
    if output and output.exists() and not output.is_dir():
        raise UsageError(
            "not a folder",
            place=f"--output {output}",
            remedy="name a folder; it is created if needed",
        )


def _examine(options: DoctorOptions) -> DoctorReport:
    from sam_poll.diagnostics.doctor import run
    from sam_poll.runtime import signals
    from sam_poll.runtime.console import error_console

    with (
        # The trial process is ended, too.
        signals.termination_raises(lambda number: SystemExit(128 + number)),
        error_console().status("checking …") as line,
    ):  # shows nothing where stderr is not a terminal
        return run.examine(options, lambda step: line.update(f"{step} …"))


def _show(doctor_report: DoctorReport, *, as_json: bool) -> ExitCode:
    from sam_poll.diagnostics.doctor import report
    from sam_poll.diagnostics.doctor.findings import exit_code
    from sam_poll.runtime.console import result_console

    if as_json:
        typer.echo(report.as_json(doctor_report.findings, doctor_report.ms, doctor_report.details))
    else:
        report.show(doctor_report.findings, doctor_report.ms, result_console())
    return exit_code(doctor_report.findings)
