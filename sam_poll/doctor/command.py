"""`sam-poll doctor`: its flags; what it does is in `run`.

Nothing heavy is imported at the top, so that `--help` answers at once. What can still go wrong here: nothing of its
own.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sam_poll.errors import ExitCode, UsageError
from sam_poll.given import Device, Model, ModelCfg
from sam_poll.reporting import reports

if TYPE_CHECKING:
    from sam_poll.doctor.run import Examined, Wishes

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
    try:
        _make_sense(compare, box, output, quick)
        from sam_poll import oneoff
        from sam_poll.doctor import run

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
        done = _examined(wishes)
    except Exception as error:
        if as_json:  # whoever reads stdout gets a document whatever happens; stderr is told as always
            from sam_poll.doctor import report

            typer.echo(report.failed(error))
        raise
    return _told(done, as_json=as_json)


def _make_sense(compare: Path | None, box: str | None, output: Path | None, quick: bool) -> None:
    """UsageError where flags do not fit each other."""
    if compare and quick:
        raise UsageError("--compare needs the model, which --quick does not load")
    if (box or output) and not compare:
        raise UsageError("--box and --output belong to --compare", remedy="give a picture with --compare")
    if compare and not compare.is_file():
        raise UsageError("there is no such picture", place=f"--compare {compare}")
    if output and output.exists() and not output.is_dir():
        raise UsageError("this is no folder", place=f"--output {output}", remedy="name a folder; it is made if needed")


def _examined(wishes: Wishes) -> Examined:
    from sam_poll.console import error_console
    from sam_poll.doctor import run

    with _ended_by_signals(), error_console().status("looking …") as line:  # nothing where stderr is no terminal
        return run.examine(wishes, lambda step: line.update(f"{step} …"))


@contextlib.contextmanager
def _ended_by_signals() -> Iterator[None]:
    """SIGTERM and SIGHUP end the command as Ctrl-C does, by an exception: the trial's process is ended on the way."""

    def end(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _told(done: Examined, *, as_json: bool) -> ExitCode:
    from sam_poll.console import result_console
    from sam_poll.doctor import report
    from sam_poll.doctor.findings import exit_code

    if as_json:
        typer.echo(report.as_json(done.findings, done.ms, done.details))
    else:
        report.show(done.findings, done.ms, result_console())
    return exit_code(done.findings)
